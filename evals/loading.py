"""Loading what is evaluated: embedded models by name, others by folder or hub name."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from mmcompress.errors import UnsupportedError
from mmcompress.evals.micro import DEFAULT_MODEL, MODELS, model_path
from mmcompress.evals.micro.processing import load_processor
from mmcompress.integrations.hf.families import FAMILIES

WEIGHTS_SEEN = 16
"""Of every parameter, to tell whether a model has been trained on since."""


def load_micro(name: str = DEFAULT_MODEL) -> tuple[Any, Any]:
    """An embedded model in float32 on the CPU, and its processor.

    Raises:
        SpecError: there is none of that name.
    """
    path = model_path(name)
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32)
    return model.eval(), load_processor(path)


def load_model(name: str, device: str | None = None) -> tuple[Any, Any]:
    """A supported model and its processor, on `device` or else on the GPU if there is one.

    Raises:
        UnsupportedError: it cannot be loaded, or its family is not supported.
    """
    if name in MODELS:
        return load_micro(name)
    if name.startswith((".", "/", "~")) and not Path(name).is_dir():
        raise UnsupportedError(f"model folder {name} does not exist.")
    try:
        kind = AutoConfig.from_pretrained(name).model_type
        if kind in FAMILIES:
            model = AutoModelForImageTextToText.from_pretrained(name, dtype="auto").eval()
            processor = AutoProcessor.from_pretrained(name)
            return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")), processor
    except Exception as error:  # there are as many ways as there are broken folders
        raise UnsupportedError(f"cannot load model {name!r}: {' '.join(str(error).split())}") from error
    raise UnsupportedError(f"model {name!r} is of type {kind!r}; supported families: {', '.join(sorted(FAMILIES))}.")


def weights_fingerprint(model: Any) -> str:
    """Equal for equal weights, seen at a few places of each."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        some = weight.detach().flatten()[:: max(1, weight.numel() // WEIGHTS_SEEN)]
        digest.update(name.encode() + some.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
