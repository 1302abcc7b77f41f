"""Statistics of vision attention layers, read from the queries and keys that pass through; no attention map, ever.

A tapped module gets its own copy of its config that names our attention function. That function hands query and
key to the statistics and then calls the attention the model was loaded with, so the encoder keeps SDPA or
FlashAttention, and nothing global, serialised or shared is altered.
"""

from __future__ import annotations

import copy
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mmcompress.errors import UnsupportedError
from mmcompress.integrations.hf.attached import Attached
from mmcompress.statistics import STATISTICS
from mmcompress.types import Needs

# transformers decides by this substring whether an implementation takes FlashAttention's variable-length inputs.
TAP, FLASH_TAP = "mmcompress_tap", "mmcompress_flash_tap"

Key = tuple[str, int]
Captured = dict[Key, list[Tensor]]
Collect = Callable[[Tensor, Tensor, Tensor | None, dict[str, Any]], None]
Attend = Callable[[Tensor, Tensor, Tensor, dict[str, Any]], Tensor | None]
FEATURES: Key = ("features", 0)


class _Delegate:
    """A module seen with the config it was loaded with."""

    def __init__(self, module: nn.Module, config: Any) -> None:
        self._module = module
        self.config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _tapped_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> Any:
    config: Any = module.config
    module = module._module if isinstance(module, _Delegate) else module  # tapped twice
    config.mmcompress_tap(query, key, attention_mask, kwargs)
    output = config.mmcompress_attend(query, key, value, kwargs)
    if output is not None:
        return output, None
    original = config.mmcompress_original
    implementation = original._attn_implementation
    if implementation == "eager":
        attend = sys.modules[type(module).__module__].eager_attention_forward
    else:
        attend = ALL_ATTENTION_FUNCTIONS[implementation]
    return attend(_Delegate(module, original), query, key, value, attention_mask, **kwargs)


AttentionInterface.register(TAP, _tapped_attention)
AttentionInterface.register(FLASH_TAP, _tapped_attention)


def _nothing(*args: Any) -> None:
    """See nothing, replace nothing."""


def tap(attention: Any, collect: Collect = _nothing, attend: Attend = _nothing) -> Any:
    """Show `collect` what passes through an attention module; returns the config that undoes it, if put back.

    What `attend` makes of queries, keys and values, `[batch, queries, heads, dim]`, replaces what the module would; it
    may decline by None.
    """
    original = attention.config
    tapped = copy.copy(original)
    tapped._attn_implementation_internal = FLASH_TAP if "flash" in original._attn_implementation else TAP
    tapped.mmcompress_original = original
    tapped.mmcompress_tap = collect
    tapped.mmcompress_attend = attend
    attention.config = tapped
    return original


class Taps(Attached):
    """The taps one method needs on one vision encoder."""

    def __init__(
        self,
        attentions: list[nn.Module],
        feature_source: nn.Module,
        needs: Needs,
        projector: nn.Module | None = None,
    ) -> None:
        """Tap layers of `attentions`, and the output of `feature_source` where features are needed.

        With a `projector` its input is tapped instead, gradients included, so that it can be run on merged features.
        """
        self._collecting: ContextVar[Captured | None] = ContextVar("collecting", default=None)
        self._tapped: list[tuple[nn.Module, Any]] = []
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        names = defaultdict(list)
        for name, layers in needs.layers().items():
            for layer in layers:
                names[layer].append(name)
        for layer, wanted in names.items():
            self._tap(attentions[layer], layer, wanted)
        if projector is not None:
            self._hooks.append(projector.register_forward_pre_hook(self._collect_input))
        elif needs.features:
            self._hooks.append(feature_source.register_forward_hook(self._collect_output))

    def _tap(self, attention: nn.Module, layer: int, names: list[str]) -> None:
        def collect(query: Tensor, key: Tensor, mask: Tensor | None, kwargs: dict[str, Any]) -> None:
            if self._collecting.get() is not None and mask is not None and not _attends_everywhere(mask):
                raise UnsupportedError("vision statistics of partly padded image tiles are not supported.")
            self._collect(layer, names, query, key, kwargs["scaling"], kwargs.get("cu_seq_lens_q"))

        self._tapped.append((attention, tap(attention, collect)))

    def _collect(
        self, layer: int, names: list[str], query: Tensor, key: Tensor, scaling: float, bounds: Tensor | None
    ) -> None:
        """Read the statistics `names` of a layer, stretch by stretch where `bounds` cut a packed call."""
        captured = self._collecting.get()
        if captured is None:
            return
        with torch.no_grad():
            for q, k in _segments(query, key, bounds):
                for name in names:
                    captured.setdefault((name, layer), []).append(STATISTICS[name](q, k, scaling))

    def _collect_input(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._collect_features(args[0])

    def _collect_output(self, module: nn.Module, args: Any, output: Any) -> None:
        self._collect_features((output[0] if isinstance(output, tuple) else output).detach().float())

    def _collect_features(self, hidden: Tensor) -> None:
        captured = self._collecting.get()
        if captured is not None:
            captured.setdefault(FEATURES, []).append(hidden if hidden.dim() == 3 else hidden[None])

    @contextmanager
    def collect(self) -> Iterator[Captured]:
        """While open, encoder calls append `[batch, tokens]` or `[batch, tokens, channels]` under (name, layer)."""
        captured: Captured = {}
        token = self._collecting.set(captured)
        try:
            yield captured
        finally:
            self._collecting.reset(token)

    def remove(self) -> None:
        """Give every module its own config back."""
        for attention, original in self._tapped:
            attention.config = original
        for hook in self._hooks:
            hook.remove()


def _attends_everywhere(mask: Tensor) -> bool:
    return bool(mask.all()) if mask.dtype == torch.bool else not bool(mask.any())


def _segments(query: Tensor, key: Tensor, bounds: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
    """The stretches of a packed FlashAttention call that attend among themselves; else the call itself."""
    if bounds is None:
        yield query, key
        return
    edges = bounds.tolist()
    for begin, end in zip(edges, edges[1:], strict=False):
        yield query[:, :, begin:end], key[:, :, begin:end]
