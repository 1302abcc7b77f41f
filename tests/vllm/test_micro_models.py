"""Without compression, vLLM and transformers give the same answers for random and all embedded models."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import engine
import pytest
import reference
import torch
from prompts import Reply, ragged_prompts
from tiny_models import TINY_MODELS, save_tiny_model
from transformers import AutoModelForImageTextToText, PreTrainedModel, ProcessorMixin
from vllm import LLM

from mmcompress.evals.micro import MODELS
from mmcompress.evals.micro.processing import load_processor

pytestmark = pytest.mark.slow

PROMPTS = ragged_prompts()
TOLERANCE = 1e-4  # of a log-probability


@pytest.fixture(scope="module", params=[*TINY_MODELS, *MODELS])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param in MODELS:
        return MODELS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    save_tiny_model(request.param, folder)
    return folder


@pytest.fixture(scope="module")
def processor(folder: Path) -> ProcessorMixin:
    return load_processor(folder)


@pytest.fixture(scope="module")
def model(folder: Path) -> PreTrainedModel:
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with engine.engine(folder) as llm:
        yield llm


def assert_equal(replies: list[Reply], expected: list[Reply]) -> None:
    for reply, wanted in zip(replies, expected, strict=True):
        assert reply.prompt == wanted.prompt
        assert reply.tokens == wanted.tokens
        assert reply.logprobs == pytest.approx(wanted.logprobs, abs=TOLERANCE)


@pytest.mark.parametrize("ignore_eos", [True, False], ids=["fixed length", "until the end token"])
def test_answers_are_equal(llm: LLM, model: PreTrainedModel, processor: ProcessorMixin, ignore_eos: bool) -> None:
    expected = reference.ask(model, processor, PROMPTS, ignore_eos)
    assert len({reply.tokens[:4] for reply in expected}) > len(PROMPTS) / 2, "answers so alike would prove nothing"
    assert_equal(engine.ask(llm, processor, PROMPTS, ignore_eos), expected)


def test_chats_are_answered_as_prompts(llm: LLM, processor: ProcessorMixin) -> None:
    assert_equal(engine.chat(llm, PROMPTS, False), engine.ask(llm, processor, PROMPTS, False))
