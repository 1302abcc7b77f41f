"""mmcompress: fewer visual tokens in the vision-language models you already run.

handle = mmcompress.wrap(model, "todre", keep=0.25)
model.generate(**inputs); print(handle.stats)
handle.unwrap()
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmcompress.errors import InputError, MMCompressError, SpecError, UnsupportedError
    from mmcompress.integrations.hf import Handle, wrap
    from mmcompress.integrations.hf.elastic_models import load
    from mmcompress.integrations.hf.processor_dial import processor_kwargs
    from mmcompress.registry import METHODS, POLICIES, register
    from mmcompress.spec import CompressionConfig

__version__ = "0.1.0"

_HOMES = {
    "wrap": "mmcompress.integrations.hf",
    "load": "mmcompress.integrations.hf.elastic_models",
    "processor_kwargs": "mmcompress.integrations.hf.processor_dial",
    "Handle": "mmcompress.integrations.hf",
    "CompressionConfig": "mmcompress.spec",
    "register": "mmcompress.registry",
    "METHODS": "mmcompress.registry",
    "POLICIES": "mmcompress.registry",
    "MMCompressError": "mmcompress.errors",
    "SpecError": "mmcompress.errors",
    "UnsupportedError": "mmcompress.errors",
    "InputError": "mmcompress.errors",
}

__all__ = [
    "METHODS",
    "POLICIES",
    "CompressionConfig",
    "Handle",
    "InputError",
    "MMCompressError",
    "SpecError",
    "UnsupportedError",
    "__version__",
    "load",
    "processor_kwargs",
    "register",
    "wrap",
]


def __getattr__(name: str) -> Any:
    # Names are imported on first use, so that importing the package costs nothing and needs no engine.
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'mmcompress' has no attribute {name!r}")
