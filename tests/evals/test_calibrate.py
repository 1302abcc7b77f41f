"""Calibration of KVQuant: the same keys, values and gradients as the projections themselves have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import mmcompress
from mmcompress.errors import SpecError
from mmcompress.evals.calibrate import calibrate
from mmcompress.evals.loading import load_micro
from mmcompress.evals.micro import MODELS
from mmcompress.evals.runner import encode
from mmcompress.evals.suites import configure
from mmcompress.evals.suites.base import Question
from mmcompress.policies._codebooks import calibrated


def questions(count: int) -> list[Question]:
    return configure("microvqa", Path()).read()[0][:: 500 // count][:count]


def projected(model: Any, processor: Any, asked: list[Question]) -> list[tuple[Tensor, ...]]:
    """By layer keys, squared gradients, values, squared gradients, without the first token of each prompt."""
    layers, rows = model.base_model.get_decoder().layers, []
    for question in asked:
        outputs: list[Tensor] = []

        def note(module: Any, args: Any, output: Tensor, into: list[Tensor] = outputs) -> None:
            output.retain_grad()
            into.append(output)

        parts = [part for layer in layers for part in (layer.self_attn.k_proj, layer.self_attn.v_proj)]
        hooks = [part.register_forward_hook(note) for part in parts]
        pictures = {picture: picture.open() for picture in question.images}
        inputs = encode(model, processor, [question], pictures, f" {question.answers[0]}")
        labels = inputs["input_ids"].clone()
        labels[labels == model.config.image_token_id] = -100
        model(**inputs, labels=labels, use_cache=False).loss.backward()
        for hook in hooks:
            hook.remove()
        model.zero_grad()
        rows.append([part for output in outputs for part in (output[0, 1:], output.grad[0, 1:] ** 2)])
    together = [torch.cat(parts).detach() for parts in zip(*rows, strict=True)]
    return [tuple(together[first : first + 4]) for first in range(0, len(together), 4)]


@pytest.mark.parametrize("name", MODELS)
def test_what_is_fitted_is_what_projections_give(name: str, tmp_path: Path) -> None:
    model, processor = load_micro(name)
    configs = [layer.self_attn.config for layer in model.base_model.get_decoder().layers]
    asked, path, told = questions(2), tmp_path / "calibration.safetensors", []

    def track(items: Any, label: str) -> Any:
        told.append(label)
        return items

    calibrate(model, processor, asked, path, bits=3, track=track)
    assert told == ["reading", "fitting"]
    assert all(parameter.requires_grad for parameter in model.parameters())
    layers = model.base_model.get_decoder().layers
    assert all(layer.self_attn.config is config for layer, config in zip(layers, configs, strict=True))
    tables = load_file(path)
    for number, given in enumerate(projected(model, processor, asked)):
        expected = calibrated(*given, bits=3, outliers=0.01)
        for entry, table in vars(expected).items():
            torch.testing.assert_close(tables[entry][number], table, atol=2e-3, rtol=2e-3, msg=entry)
    with mmcompress.wrap(model, kv={"name": "kvquant", "calibration": str(path)}) as handle:
        question = asked[0]
        inputs = encode(model, processor, asked[:1], {picture: picture.open() for picture in question.images})
        model.generate(**inputs, max_new_tokens=3)
        assert handle.stats.kv_held < 0.3 * handle.stats.kv_bytes_full


@pytest.mark.parametrize(("option", "value"), [("bits", 5), ("outliers", 0.0)])
def test_options_out_of_range(option: str, value: float, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=f"{option}={value}"):
        calibrate(None, None, [], tmp_path / "never", **{option: value})
