"""Matryoshka scales in vLLM: the engine's dial and a request's give the answers of the wrapped model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import engine
import pytest
import reference
import torch
from kept import compressed, make
from prompts import Reply, ragged_prompts
from transformers import AutoModelForImageTextToText

import mmcompress
from mmcompress.errors import UnsupportedError
from mmcompress.evals.micro import MODELS
from mmcompress.evals.micro.processing import load_processor
from mmcompress.integrations.vllm.settings import KEEP, Settings
from mmcompress.integrations.vllm.start import check_model

pytestmark = pytest.mark.slow

TOLERANCE = 1e-4  # of a log-probability
PROMPTS = ragged_prompts()
TRAINED = sorted(name for name in MODELS if name in ("micro-llava", "micro-llava-m3"))
SCALES = {"llava": (4, 1)} | {name: (64, 4) for name in TRAINED}


class Served:
    """A model in both engines; in vLLM with its larger scale on the engine's dial."""

    def __init__(self, name: str, folder: Path) -> None:
        self.folder = make(name, folder / name)
        self.scales = SCALES[name]
        self.processor = load_processor(self.folder)
        self.model: Any = AutoModelForImageTextToText.from_pretrained(self.folder, dtype=torch.float32).eval()

    def expected(self, scale: int) -> list[Reply]:
        with mmcompress.wrap(self.model, "m3", keep=scale):
            return reference.ask(self.model, self.processor, PROMPTS, True)


@pytest.fixture(scope="module", params=SCALES)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Served, Any]]:
    model = Served(request.param, tmp_path_factory.mktemp("models"))
    with compressed(model.folder, f"m3(keep={model.scales[0]})", keep_range=[1, 256]) as llm:
        yield model, llm


def assert_equal(replies: list[Reply], expected: list[Reply], prompts: list[Reply], less: int) -> None:
    for reply, wanted, whole, prompt in zip(replies, expected, prompts, PROMPTS, strict=True):
        assert reply.tokens == wanted.tokens
        assert reply.logprobs == pytest.approx(wanted.logprobs, abs=TOLERANCE)
        assert len(reply.prompt) == len(whole.prompt) - less * len(prompt.pictures)


def test_both_dials_give_the_answers_of_the_wrapped_model(served: tuple[Served, Any]) -> None:
    model, llm = served
    whole = reference.ask(model.model, model.processor, PROMPTS, True)
    patches = (model.model.config.vision_config.image_size // model.model.config.vision_config.patch_size) ** 2
    engines, requested = model.scales
    assert_equal(engine.ask(llm, model.processor, PROMPTS, True), model.expected(engines), whole, patches - engines)
    replies = engine.ask(llm, model.processor, PROMPTS, True, **{KEEP: requested})
    assert_equal(replies, model.expected(requested), whole, patches - requested)
    assert_equal(engine.ask(llm, model.processor, PROMPTS, True, **{KEEP: patches}), whole, whole, 0)


@pytest.mark.parametrize("budget", [3, 5, 0.7, 300])
def test_no_budget_is_snapped(served: tuple[Served, Any], budget: float) -> None:
    model, llm = served
    with pytest.raises(ValueError, match=r"no budget|must be"):
        engine.ask(llm, model.processor, PROMPTS, True, **{KEEP: budget})
    assert len(engine.ask(llm, model.processor, PROMPTS[:1], True)[0].tokens) == PROMPTS[0].new_tokens


@pytest.mark.parametrize(
    ("name", "wanted", "reason"),
    [
        ("llava", {"method": "m3", "keep": 5}, "no budget 5: it takes 1, 4, 16"),
        ("llava", {"method": "m3", "keep": 4, "keep_range": [4, 9]}, "no budget 9"),
        ("llava_next", {"method": "m3", "keep": 4}, "before they are stitched"),
        ("qwen2_5_vl", {"method": "m3", "keep": 4}, "pools the tokens of whole tiles"),
    ],
)
def test_what_cannot_be_served_is_refused(name: str, wanted: dict[str, Any], reason: str, tmp_path: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(make(name, tmp_path))
    with pytest.raises((UnsupportedError, mmcompress.SpecError), match=reason):
        check_model(model, Settings.parse(wanted))
