"""Lets torchvision be imported beside a torch that cannot load its compiled operators; on PYTHONPATH for these tests.

PyPI's torchvision is built for CUDA. Beside a CPU build of torch `import torchvision` fails, for it describes operators
that do not exist. Image processors use none of them, so declaring them is enough. Where they load, nothing happens.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType


class _TorchvisionWatcher(MetaPathFinder):
    """Finds nothing, but sees torchvision before it is imported."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name == "torchvision":
            _declare_missing_operators()
        return None


@cache
def _declare_missing_operators() -> object:
    """What holds the declarations; they last as long as it does, hence the cache."""
    installed = PathFinder.find_spec("torchvision")
    if installed is None or installed.origin is None:
        return None
    import torch

    for library in Path(installed.origin).parent.glob("_C*.so"):
        with suppress(OSError):
            torch.ops.load_library(library)
    if hasattr(torch.ops.torchvision, "nms"):
        return None
    operators = torch.library.Library("torchvision", "DEF")
    operators.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    operators.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return operators


sys.meta_path.insert(0, _TorchvisionWatcher())
