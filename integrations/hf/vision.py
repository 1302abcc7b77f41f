"""The vision side of the engine: what was encoded, in which layout, with which statistics."""

from __future__ import annotations

import copy
import functools
import hashlib
import inspect
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from mmcompress.integrations.hf.clock import Span
from mmcompress.integrations.hf.encoder_stage import EncoderStage
from mmcompress.integrations.hf.families import ENCODERS, Family, Layout
from mmcompress.integrations.hf.projector_stage import ProjectorStage
from mmcompress.integrations.hf.taps import Captured, Key, Taps
from mmcompress.types import Modality, Needs, Selection

_LABEL = "mmcompress_encoded"


@dataclass(frozen=True)
class Encoded:
    """What the vision encoder made of some items.

    Args:
        layouts: one per item.
        statistics: per item, `(name, layer) -> [candidates]` or `[candidates, channels]`.
        spans: the encoder's time; empty if nothing was encoded anew.
        fresh: how many of the items were encoded anew.
        reduced: per item which patches the encoder left and what they absorbed; None if it left all.
        inputs: what the encoder was given, by the names that the model takes it by; empty if nobody else reads it.
    """

    layouts: list[Layout]
    statistics: list[dict[Key, Tensor]]
    spans: tuple[Span, ...]
    fresh: int
    reduced: list[Selection | None]
    inputs: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def join(cls, parts: list[Encoded]) -> Encoded:
        """Several encodings as one."""
        return cls(
            [layout for part in parts for layout in part.layouts],
            [values for part in parts for values in part.statistics],
            tuple(span for part in parts for span in part.spans),
            sum(part.fresh for part in parts),
            [selection for part in parts for selection in part.reduced],
        )


class _Local(threading.local):
    """What one thread is encoding."""

    def __init__(self) -> None:
        self.encoding = False
        self.last: dict[Modality, tuple[list[Tensor], Encoded]] = {}
        self.pending: dict[Modality, Encoded] = {}


class Vision:
    """Watches the model's feature methods and labels what they return with what was learnt on the way.

    `generate` of transformers >= 5.19 encodes before the prefill and hides the pixel inputs from the forward pass,
    so the feature methods are the only place that sees layouts in every version.
    """

    def __init__(
        self,
        family: Family,
        needs: Needs,
        projector: nn.Module | None,
        stage: EncoderStage | ProjectorStage | None = None,
        keeps_inputs: bool = False,
    ) -> None:
        self._family = family
        self._stage = stage
        self._keeps_inputs = keeps_inputs
        self._local = _Local()
        self._id = uuid.uuid4().hex
        self._replaced: list[str] = []
        self._memo: dict[Any, tuple[Any, Encoded]] = {}
        self._reusing = False
        self._taps = Taps(family.attentions, family.feature_source, needs, projector)
        for modality in family.token_ids:
            name = ENCODERS[modality]
            setattr(family.base, name, self._watch(modality, getattr(family.base, name)))
            self._replaced.append(name)

    def remove(self) -> None:
        """Give the model its own methods back."""
        for name in self._replaced:
            delattr(self._family.base, name)
        self._taps.remove()
        if self._stage is not None:
            self._stage.remove()

    @property
    def pending(self) -> Mapping[Modality, Encoded]:
        """What this thread's forward pass is to use."""
        return self._local.pending

    def begin(self, outputs: Mapping[str, Any]) -> None:
        """Start a forward pass that is given the encoder `outputs`; what it encodes itself joins them."""
        self._local.pending = {}
        for modality in self._family.token_ids:
            if modality in outputs:
                watched_by, encoded = getattr(outputs[modality], _LABEL, (self._id, None))
                if encoded is None:
                    encoded = self._last_if(modality, outputs[modality])
                if encoded is not None and watched_by == self._id:
                    self._local.pending[modality] = encoded

    def _last_if(self, modality: Modality, output: Any) -> Encoded | None:
        """What was encoded last, if `output` is of it; accelerate rebuilds outputs without their label."""
        features, encoded = self._local.last.get(modality, ([], None))
        pairs = zip(output.pooler_output, features, strict=False)
        return encoded if all(one.shape == other.shape and one.to(other).equal(other) for one, other in pairs) else None

    def end(self) -> None:
        """Forget what the forward pass used."""
        self._local.pending = {}

    @contextmanager
    def reuse(self) -> Iterator[None]:
        """While open, what was encoded before is not encoded again."""
        self._reusing = True
        try:
            yield
        finally:
            self._reusing = False
            self._memo.clear()

    def _watch(self, modality: Modality, encode: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(encode)

        # generate() chooses the arguments it passes by this function's signature, hence `wraps`.
        @functools.wraps(encode)
        def watched(*args: Any, **kwargs: Any) -> Any:
            if self._local.encoding or kwargs.get("return_dict") is False:
                return encode(*args, **kwargs)  # a video method calls the image method; a tuple is not for the model
            call = signature.bind_partial(*args, **kwargs).arguments
            call |= call.pop("kwargs", {})
            # Results that carry gradients serve one backward pass only.
            encode_items = self._encode_once if self._reusing and not torch.is_grad_enabled() else self._encode
            self._local.encoding = True
            try:
                output, encoded = encode_items(modality, encode, call)
            finally:
                self._local.encoding = False
            if self._keeps_inputs:
                encoded = replace(encoded, inputs=_inputs(modality, call))
            setattr(output, _LABEL, (self._id, encoded))
            self._local.last[modality] = [feature.detach() for feature in output.pooler_output], encoded
            self._local.pending[modality] = encoded
            return output

        return watched

    def _encode_once(self, modality: Modality, encode: Callable[..., Any], call: dict[str, Any]) -> tuple[Any, Encoded]:
        """Like `_encode`, but what was encoded before is taken from memory."""
        outputs, parts = [], []
        for part in self._family.parts(call):
            key = (modality, None if self._stage is None else self._stage.keep, _fingerprint(part))
            if key not in self._memo:
                output, encoded = self._encode(modality, encode, part)
                self._memo[key] = (output, replace(encoded, spans=(), fresh=0))
            else:
                output, encoded = self._memo[key]
            outputs.append(output)
            parts.append(encoded)
        if len(parts) == 1:
            return copy.copy(outputs[0]), parts[0]  # generate() changes what it is given
        features = [feature for output in outputs for feature in output.pooler_output]
        joined = BaseModelOutputWithPooling(pooler_output=cast(Any, features))  # a list, as the families return it
        return joined, Encoded.join(parts)

    def _encode(self, modality: Modality, encode: Callable[..., Any], call: dict[str, Any]) -> tuple[Any, Encoded]:
        span = Span(self._family.base.device)
        with self._taps.collect() as captured:
            run = functools.partial(encode, **call)
            output, left = (run(), []) if self._stage is None else self._stage.encode(run)
        span.stop()
        rows = torch.cat([feature.detach().reshape(-1, feature.shape[-1]) for feature in output.pooler_output])
        layouts = self._family.layouts(modality, rows, call)
        statistics = by_item(self._family, layouts, captured, modality, call)
        reduced: list[Selection | None] = [*left] or [None] * len(layouts)
        return output, Encoded(layouts, statistics, (span,), len(layouts), reduced)


def _inputs(modality: Modality, call: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of an encoder `call` by the names that the model takes them by."""
    inputs = {name: value for name, value in call.items() if isinstance(value, Tensor)}
    if modality == "video" and "pixel_values" in inputs:  # transformers 5.17 calls a video's pixels so
        inputs["pixel_values_videos"] = inputs.pop("pixel_values")
    return inputs


def by_item(
    family: Family, layouts: list[Layout], captured: Captured, modality: Modality, call: Mapping[str, Any]
) -> list[dict[Key, Tensor]]:
    """What was `captured` of patches in an encoder `call`, for the candidate tokens of each item."""
    lengths = [len(layout.separator) for layout in layouts]
    statistics: list[dict[Key, Tensor]] = [{} for _ in layouts]
    for key, chunks in captured.items():
        is_scalar = chunks[0].dim() == 2
        patches = [chunk[..., None] for chunk in chunks] if is_scalar else chunks
        aligned = family.align(patches, modality, call).split(lengths)
        for item, layout, values in zip(statistics, layouts, aligned, strict=True):
            values = values[~layout.separator.to(values.device)]
            item[key] = values[:, 0] if is_scalar else values
    return statistics


def _fingerprint(value: Any) -> Any:
    """A key equal for equal arguments, tensors compared by content."""
    if isinstance(value, Tensor):
        content = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return (tuple(value.shape), value.dtype, hashlib.blake2b(content).digest())
    if isinstance(value, (list, tuple)):
        return tuple(_fingerprint(part) for part in value)
    if isinstance(value, Mapping):
        return tuple((name, _fingerprint(part)) for name, part in value.items())
    return repr(value)
