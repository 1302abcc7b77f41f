"""What `mmcompress eval --backend lmms` does that needs no lmms-eval: refusing without it, and a task's settings."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import fail

from mmcompress.evals.lmms.asking import answer

ASK = ("eval", "micro-llava", "--suite", "gqa", "--backend", "lmms", "--method", "todre", "--keep", "0.25")


def test_without_lmms_eval_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    said = " ".join(fail(*ASK, "--out", tmp_path).split())
    assert '--backend lmms needs lmms-eval: pip install "mmcompress[lmms]"' in said
    assert not list(tmp_path.iterdir())


def test_engine_goes_elsewhere(tmp_path: Path) -> None:
    assert "--engine goes with --backend vllm" in fail(*ASK, "--engine", "{}", "--out", tmp_path)


class Echo:
    """A model that says the same whatever it is asked, and keeps what it was asked with; its own processor."""

    def generate(self, input_ids: torch.Tensor, **settings: Any) -> torch.Tensor:
        self.settings = settings
        return torch.cat([input_ids, torch.ones_like(input_ids)], dim=1)

    def batch_decode(self, tokens: torch.Tensor, skip_special_tokens: bool) -> list[str]:
        return [" a dog\n\nand a cat. " for _ in tokens]


@pytest.mark.parametrize(
    ("settings", "passed", "text"),
    [
        ({}, {"max_new_tokens": 1024, "do_sample": False}, "a dog\n\nand a cat."),
        (
            {
                "max_new_tokens": 16,
                "temperature": 0,
                "top_p": 1.0,
                "num_beams": 1,
                "do_sample": True,
                "until": ["\n\n"],
            },
            {"max_new_tokens": 16, "num_beams": 1, "do_sample": False},
            "a dog",
        ),
        (
            {"temperature": 0.7, "top_p": 0.9, "do_sample": True, "until": ["cat", "and"], "max_length": 9},
            {"max_new_tokens": 1024, "temperature": 0.7, "top_p": 0.9, "do_sample": True},
            "a dog",
        ),
        ({"until": "cat", "image_aspect_ratio": "pad"}, {"max_new_tokens": 1024, "do_sample": False}, "a dog\n\nand a"),
    ],
)
def test_settings_of_generation_hold(settings: dict[str, Any], passed: dict[str, Any], text: str) -> None:
    model, before = Echo(), dict(settings)
    texts, output = answer(model, model, {"input_ids": torch.zeros(2, 3, dtype=torch.long)}, settings)
    assert texts == [text, text] and model.settings == passed
    assert output.tolist() == [[1, 1, 1], [1, 1, 1]]
    assert settings == before
