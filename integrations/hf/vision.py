"""The vision side of the engine: what was encoded, in which layout, with which statistics."""

from __future__ import annotations

import functools
import hashlib
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmcompress.integrations.hf.clock import StageClock
from mmcompress.integrations.hf.families import ENCODERS, Family, Layout
from mmcompress.integrations.hf.taps import FEATURES, Key, Taps
from mmcompress.types import Modality, Needs


@dataclass(frozen=True)
class Encoded:
    """The items of one encoder call: layouts, and statistics per item as `(name, layer) -> [candidates, channels]`."""

    layouts: list[Layout]
    statistics: list[dict[Key, Tensor]]


class Vision:
    """Watches the model's feature methods; what they encode waits here for the text model's forward pass.

    `generate` of transformers >= 5.19 encodes before the prefill and hides the pixel inputs from the forward pass,
    so the feature methods are the only place that sees layout information in every version.
    """

    def __init__(self, family: Family, needs: Needs, clock: StageClock) -> None:
        self._family = family
        self._clock = clock
        self._local = threading.local()
        self._replaced: list[str] = []
        self._memo: dict[Any, tuple[Any, Encoded]] | None = None
        self._taps = Taps(family.attentions, family.feature_source, needs)
        for modality in family.token_ids:
            name = ENCODERS[modality]
            setattr(family.base, name, self._watch(modality, getattr(family.base, name)))
            self._replaced.append(name)

    def remove(self) -> None:
        """Give the model its own methods back."""
        for name in self._replaced:
            delattr(self._family.base, name)
        self._taps.remove()

    @property
    def pending(self) -> dict[Modality, Encoded]:
        """What this thread encoded and no forward pass has used yet."""
        if not hasattr(self._local, "pending"):
            self._local.pending = {}
        return self._local.pending

    @contextmanager
    def reuse(self) -> Iterator[None]:
        """While open, identical encoder inputs are encoded once."""
        self._memo = {}
        try:
            yield
        finally:
            self._memo = None

    def _watch(self, modality: Modality, encode: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(encode)

        # generate() chooses the arguments it passes by this function's signature, hence `wraps`.
        @functools.wraps(encode)
        def watched(*args: Any, **kwargs: Any) -> Any:
            if getattr(self._local, "encoding", False):  # a video method may call the image method
                return encode(*args, **kwargs)
            if not self.pending:
                self._clock.reset()
            call = signature.bind_partial(*args, **kwargs).arguments
            key = None if self._memo is None else (modality, _fingerprint(list(call.values())))
            if self._memo is not None and key in self._memo:
                output, self.pending[modality] = self._memo[key]
                return output
            self._local.encoding = True
            try:
                output, encoded = self._encode(modality, encode, call, args, kwargs)
            finally:
                self._local.encoding = False
            self.pending[modality] = encoded
            if self._memo is not None:
                self._memo[key] = (output, encoded)
            return output

        return watched

    def _encode(
        self, modality: Modality, encode: Callable[..., Any], call: Mapping[str, Any], args: Any, kwargs: Any
    ) -> tuple[Any, Encoded]:
        with self._clock.measure("encoder", self._family.base.device), self._taps.collect() as captured:
            output = encode(*args, **kwargs)
        rows = torch.cat([feature.detach().reshape(-1, feature.shape[-1]) for feature in output.pooler_output])
        layouts = self._family.layouts(modality, rows, call)
        lengths = [len(layout.separator) for layout in layouts]
        statistics: list[dict[Key, Tensor]] = [{} for _ in layouts]
        for name_and_layer, chunks in captured.items():
            aligned = self._family.align(chunks, modality, call).split(lengths)
            for item, layout, values in zip(statistics, layouts, aligned, strict=True):
                values = values[~layout.separator.to(values.device)]
                is_wide = name_and_layer == FEATURES or name_and_layer[0] in _WIDE
                item[name_and_layer] = values if is_wide else values[:, 0]
        return output, Encoded(layouts, statistics)


_WIDE = frozenset({"cls_rows", "keys", "key_metric"})


def _fingerprint(value: Any) -> Any:
    """A key equal for equal arguments, tensors compared by content."""
    if isinstance(value, Tensor):
        content = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return (tuple(value.shape), value.dtype, hashlib.blake2b(content).digest())
    if isinstance(value, (list, tuple)):
        return tuple(_fingerprint(part) for part in value)
    return repr(value)
