"""A method on a model of vLLM, told by its configuration alone: the same before and after weights are loaded."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText

from mmcompress.budget import Budget
from mmcompress.errors import InputError, SpecError
from mmcompress.integrations.hf.families import FAMILIES, Family, Layout
from mmcompress.integrations.vllm.nested import Nested
from mmcompress.integrations.vllm.settings import Settings
from mmcompress.method import VisualMethod
from mmcompress.projector_method import ProjectorMethod
from mmcompress.registry import METHODS
from mmcompress.types import EncoderFacts, Needs

# vLLM resizes large images to nine tiles whatever the config says.
_ONEVISION_PACKING = "anyres_max_9"


def weightless(hf_config: Any) -> Any:
    """The transformers model of a configuration, without weights."""
    config = copy.deepcopy(hf_config)
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config)


@dataclass(frozen=True)
class Compression:
    """What the front end and the workers must agree on.

    Args:
        settings: what was asked for.
        family: the model as transformers has it, without weights.
        method: the configured method.
        encoder: what it knows of the vision encoder.
        needs: what it reads.
    """

    settings: Settings
    family: Family
    method: VisualMethod
    encoder: EncoderFacts
    needs: Needs

    @classmethod
    def of(cls, hf_config: Any) -> Compression:
        """What was stored in a model's configuration when vLLM started."""
        return _of(_Identity(hf_config))

    @classmethod
    def build(cls, settings: Settings, model: Any) -> Compression:
        """What `settings` are on a `model` of transformers.

        Raises:
            SpecError: a budget of the settings is none that the method can have.
            UnsupportedError: the method cannot be had on this model.
        """
        family = FAMILIES[model.config.model_type](model.base_model)
        encoder = family.facts()
        method: Any = METHODS.build(settings.spec.name, settings.spec.options)
        if isinstance(method, ProjectorMethod):
            method = Nested.on(family, method)
            for budget in (settings.keep, *(settings.keep_range or ())):
                method.require(budget)
        return cls(settings, family, method, encoder, method.needs(encoder))

    def requested(self, options: Mapping[str, Any]) -> Budget:
        """The budget of a request with these `mm_processor_kwargs`.

        Raises:
            InputError: it asks for one that is malformed, not allowed, or none that the method can have.
        """
        budget = self.settings.requested(options)
        if isinstance(self.method, Nested):
            try:
                self.method.require(budget)
            except SpecError as error:
                raise InputError(str(error)) from error
        return budget

    @property
    def reads_prompt(self) -> bool:
        """Whether what is kept depends on what is asked."""
        return self.needs.text or self.needs.text_tower is not None

    def call(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """The encoder call of images with these processed `fields`, as the family reads it."""
        names = [name for name in ("image_sizes", "image_grid_thw") if name in fields]
        return {**{name: fields[name] for name in names}, "vision_aspect_ratio": _ONEVISION_PACKING}

    def layouts(self, images: int, call: Mapping[str, Any], device: torch.device | None = None) -> list[Layout]:
        """Where the tokens of `images` come from."""
        return self.family.layouts("image", torch.empty(images * self.family.patches, 0, device=device), call)

    def placeholders(self, layout: Layout, budget: int) -> int:
        """Tokens of an image in the prompt, of which `budget` are no separators."""
        return budget + (int(layout.separator.sum()) if self.method.newlines else 0)


@dataclass(frozen=True, eq=False)
class _Identity:
    """A configuration that equals nothing but itself, so that it can be looked up."""

    config: Any

    def __hash__(self) -> int:
        return id(self.config)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and other.config is self.config


@lru_cache(maxsize=8)  # vLLM's server makes a processor for every request with an image
def _of(identity: _Identity) -> Compression:
    hf_config = identity.config
    return Compression.build(Settings.parse(hf_config.mmcompress), weightless(hf_config))


def origins(layout: Layout, anchor: Tensor, newlines: bool) -> Tensor:
    """For each token of an image that enters the LLM, the original one that gives its place.

    Args:
        layout: of the image.
        anchor: `[kept]` candidates in output order.
        newlines: whether its separators stay.
    """
    separator = layout.separator.to(anchor.device)
    chosen = (~separator).nonzero().flatten()[anchor]
    keep = separator & newlines
    keep[chosen] = True
    source = torch.arange(len(keep), device=anchor.device)
    source[chosen.sort().values] = chosen
    return source[keep]
