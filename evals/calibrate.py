"""Calibration of KVQuant on prompts with pictures: what keys and values are, and where an error would matter."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mmcompress.errors import SpecError
from mmcompress.evals.runner import encode
from mmcompress.evals.suites.base import Question
from mmcompress.integrations.hf.families import FAMILIES
from mmcompress.integrations.hf.taps import tap
from mmcompress.policies._calibration import BITS, LayerCalibration
from mmcompress.policies._codebooks import calibrated
from mmcompress.policies._rotary import unrotate

Track = Callable[[Iterable[Any], str], Iterable[Any]]


@dataclass
class Seen:
    """Keys before rotation or values of a layer, `[tokens, channels]` by prompt, and the gradients of the loss."""

    states: list[Tensor] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)

    def add(self, states: Tensor, gradient: Tensor, sinks: int) -> None:
        """Add a prompt's `[kv_heads, tokens, dim]`, all but its first tokens."""
        for part, into in ((states, self.states), (gradient, self.gradients)):
            into.append(part.detach()[:, sinks:].transpose(0, 1).flatten(1).cpu())

    def together(self) -> tuple[Tensor, Tensor]:
        """All tokens, and how much an error in each matters: the squared gradient, a diagonal of the Fisher matrix."""
        return torch.cat(self.states).float(), torch.cat(self.gradients).float() ** 2


def calibrate(
    model: Any,
    processor: Any,
    questions: Sequence[Question],
    out: Path,
    bits: int = 4,
    outliers: float = 0.01,
    sinks: int = 1,
    seed: int = 0,
    track: Track = lambda items, label: items,
) -> None:
    """Write what `kvquant(calibration=...)` reads to the file `out`.

    Args:
        model: a supported model that is not wrapped.
        processor: the model's.
        questions: what is read; of these the text, and the first right answer if there is one, is what is predicted.
        out: a safetensors file.
        bits: of a key or value: 2, 3 or 4.
        outliers: see `KVQuant`.
        sinks: so many of the first tokens are left out, as `KVQuant` does not pack them.
        seed: of the k-means.
        track: shows progress.

    Raises:
        SpecError: an option is out of range.
        InputError: a question cannot be read.
    """
    if bits not in BITS.values():
        raise SpecError(f"bits={bits} must be one of {', '.join(map(str, BITS.values()))}.")
    if not 0 < outliers < 1:
        raise SpecError(f"outliers={outliers} must be a fraction in (0, 1).")
    family = FAMILIES[model.config.model_type](model.base_model)
    layers: Any = family.base.get_decoder().layers
    keys, values = ([Seen() for _ in layers] for _ in range(2))
    with _observed(model, layers) as through:
        for question in track(questions, "reading"):
            loss = _loss(model, processor, question, list(family.token_ids.values()))
            gradients = torch.autograd.grad(loss, [*through.keys, *through.values])
            for seen, states, gradient in zip(keys, through.keys, gradients, strict=False):
                key, slope = (unrotate(part[0].float(), through.rotation) for part in (states, gradient))
                seen.add(key, slope, sinks)
            for seen, states, gradient in zip(values, through.values, gradients[len(layers) :], strict=True):
                seen.add(states[0], gradient[0], sinks)
            through.keys, through.values = [], []
    fitted = []
    for of_keys, of_values in track(list(zip(keys, values, strict=True)), "fitting"):
        (key, key_weight), (value, value_weight) = of_keys.together(), of_values.together()
        fitted.append(calibrated(key, key_weight, value, value_weight, bits, outliers, seed))
    names = [entry.name for entry in fields(LayerCalibration)]
    save_file({name: torch.stack([getattr(layer, name) for layer in fitted]).contiguous() for name in names}, out)


@dataclass
class _Through:
    """What passes through the attention of all layers, `[1, kv_heads, tokens, dim]`, and how keys were rotated."""

    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    rotation: tuple[Tensor, Tensor] = field(init=False)

    def rotate(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """Note the rotation."""
        cosine, sine = kwargs["position_embeddings"]
        self.rotation = cosine[0].float(), sine[0].float()

    def attend(self, query: Tensor, key: Tensor, value: Tensor, kwargs: dict[str, Any]) -> None:
        """Note keys and values, so that gradients arrive there."""
        for states, noted in ((key, self.keys), (value, self.values)):
            noted.append(states if states.requires_grad else states.requires_grad_())


@contextmanager
def _observed(model: Any, layers: Sequence[Any]) -> Iterator[_Through]:
    """While open, what passes through `layers` is noted, and nothing before them is differentiated."""
    through = _Through()
    learnt = [parameter for parameter in model.parameters() if parameter.requires_grad]
    tapped = [(layer.self_attn, tap(layer.self_attn, attend=through.attend)) for layer in layers]
    hook = layers[0].register_forward_pre_hook(through.rotate, with_kwargs=True)
    try:
        for parameter in learnt:
            parameter.requires_grad_(False)
        yield through
    finally:
        hook.remove()
        for attention, original in tapped:
            attention.config = original
        for parameter in learnt:
            parameter.requires_grad_()


def _loss(model: Any, processor: Any, question: Question, placeholders: Sequence[int]) -> Tensor:
    """How badly the text of a question and its answer are predicted."""
    said = f" {question.answers[0]}" if question.answers else ""
    inputs = encode(model, processor, [question], {picture: picture.open() for picture in question.images}, said)
    ids = inputs["input_ids"]
    labels = ids.masked_fill(torch.isin(ids, torch.tensor(placeholders, device=ids.device)), -100)
    loss: Tensor = model(**inputs, labels=labels, use_cache=False).loss
    return loss
