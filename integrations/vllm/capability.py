"""Which method and KV policy works in vLLM, told without vLLM and without weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmcompress.budget import Budget
from mmcompress.errors import MMCompressError
from mmcompress.integrations.hf.capability import Capability, models, policy_spec, with_fewest_options
from mmcompress.integrations.vllm.settings import Settings
from mmcompress.integrations.vllm.start import check_model
from mmcompress.registry import METHODS
from mmcompress.spec import CompressionConfig, Spec
from mmcompress.types import Needs

FAMILIES = ("llava", "llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")
"""What vLLM can compress, by the names of transformers."""


def capability(model: Any, spec: Spec) -> Capability:
    """What comes of `spec` in vLLM on a `model` of transformers."""
    card: Any = METHODS.get(spec.name)
    asked = Spec(spec.name, Budget(1.0) if card.info.takes_keep else None, spec.options)
    try:
        compression = check_model(model, Settings(CompressionConfig((asked,))))
        assert compression is not None
        return Capability(spec, compression.needs)
    except MMCompressError as error:
        return Capability(spec, None, str(error))


def policy_capability(model: Any, name: str) -> Capability:
    """What comes of a KV policy with its defaults in vLLM on a `model` of transformers."""
    try:
        check_model(model, Settings(CompressionConfig(kv=(policy_spec(name),))))
        return Capability(Spec(name), Needs())
    except MMCompressError as error:
        return Capability(Spec(name), None, str(error))


def column(names: Sequence[str]) -> dict[str, Capability]:
    """Method -> what comes of it on LLaVA-1.5, which allows most; the fewest options where defaults are refused."""
    model = _llava()
    return {name: with_fewest_options(lambda spec: capability(model, spec), name) for name in names}


def policy_column(names: Sequence[str]) -> dict[str, Capability]:
    """KV policy -> what comes of it there."""
    model = _llava()
    return {name: policy_capability(model, name) for name in names}


def _llava() -> Any:
    return next(model for family, model in models() if family == FAMILIES[0])
