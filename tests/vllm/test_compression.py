"""A compressed vLLM gives the answers of a wrapped transformers model, from the same kept tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import engine
import numpy as np
import pytest
import reference
import torch
from kept import as_set, compressed, make, model_of, selections
from PIL import Image
from prompts import Prompt, Reply, ragged_prompts
from registered import variants
from transformers import AutoModelForImageTextToText
from vllm import LLM
from vllm.config import VllmConfig
from vllm.multimodal import MULTIMODAL_REGISTRY

import mmcompress
from mmcompress.errors import UnsupportedError
from mmcompress.evals.micro import MODELS
from mmcompress.evals.micro.processing import load_processor
from mmcompress.integrations.vllm.settings import Settings
from mmcompress.integrations.vllm.start import check
from mmcompress.spec import Spec

pytestmark = pytest.mark.slow

TOLERANCE = 1e-4  # of a log-probability
PROMPTS = ragged_prompts()
TOWER = MODELS["micro-llava"] / "text-tower"

ANSWERS = [
    ("micro-llava", "vtc-cls(keep=0.2)"),
    ("micro-llava", f'cdpruner(keep=0.1, text_tower="{TOWER}")'),
    ("micro-qwen2.5-vl", "todre(keep=0.25, parts=first)"),
    ("llava", "uniform(keep=1)"),
    ("llava_next", "prumerge(keep=0.3)"),
    ("llava_onevision", "divprune(keep=0.2)"),
    ("qwen2_vl", "visionzip(keep=0.2, score=received, space=projected)"),
    ("qwen3_vl", "cdpruner(keep=5, relevance=text)"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def load(folder: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


def assert_equal(replies: list[Reply], expected: list[Reply]) -> None:
    for reply, wanted in zip(replies, expected, strict=True):
        assert reply.tokens == wanted.tokens
        assert reply.logprobs == pytest.approx(wanted.logprobs, abs=TOLERANCE)


@pytest.mark.parametrize(("name", "method"), ANSWERS)
def test_answers_are_those_of_the_wrapped_model(name: str, method: str, folders: Path) -> None:
    folder = make(name, folders / name)
    model, processor = load(folder), load_processor(folder)
    # In transformers several images of OneVision are not cut into crops; in vLLM all are.
    prompts = [prompt for prompt in PROMPTS if name != "llava_onevision" or len(prompt.pictures) < 2]
    with selections() as noted, compressed(folder, method) as llm:
        noted.clear()  # those of the start-up
        replies = engine.ask(llm, processor, prompts, True)
    whole = reference.ask(model, processor, prompts, True)
    with mmcompress.wrap(model, method) as handle:
        expected = reference.ask(model, processor, prompts, True)
        kept = {(len(trace.positions), tuple(trace.selection.anchor.tolist())) for trace in handle.trace}
        saved = [before - after for before, after in zip(handle.stats.row_tokens, handle.stats.row_kept, strict=True)]
    assert as_set(noted) == kept
    assert_equal(replies, expected)
    assert any(
        reply.logprobs != pytest.approx(other.logprobs, abs=0.01) for reply, other in zip(replies, whole, strict=True)
    )
    for reply, wanted, less in zip(replies, expected, saved, strict=True):
        assert len(reply.prompt) == len(wanted.prompt) - less


def noise(width: int, height: int) -> Image.Image:
    """A picture without equal patches, between which methods could choose either way."""
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8))


class TestEveryMethod:
    """All registered methods on the loaded models: what is kept, and what it absorbs."""

    @pytest.fixture(scope="class", params=["llava_next", "qwen2_5_vl"])
    def engines(self, request: pytest.FixtureRequest, folders: Path) -> Any:
        folder = make(request.param, folders / request.param)
        # prumerge needs one layer more than vLLM would load; every other method does with what is there then.
        method = "prumerge(keep=0.3)" if request.param == "llava_next" else "random(keep=0.3)"
        with compressed(folder, method) as llm:
            yield llm, load(folder), load_processor(folder)

    @pytest.mark.parametrize("spec", variants("pre_llm"), ids=str)
    def test_keeps_the_same_tokens(self, engines: tuple[LLM, Any, Any], spec: Spec) -> None:
        llm, model, processor = engines
        settings = Settings.parse({"method": [spec.to_dict() | {"keep": 0.3}]})
        engine_model = model_of(llm)
        hf_config = engine_model.config
        stock = hf_config.architectures[0].removeprefix("MMCompress")
        try:
            compression = check(stock, hf_config, settings)
        except UnsupportedError as error:
            pytest.skip(str(error))
        prompt = Prompt("what is this ?", (noise(112, 70), noise(150, 140)), 1)
        inputs = processor(
            text=[processor.apply_chat_template(prompt.chat(), add_generation_prompt=True)],
            images=list(prompt.pictures),
            return_tensors="pt",
        )
        with mmcompress.wrap(model, settings.config) as handle, torch.inference_mode():
            model(**inputs)
            expected = handle.trace
        engine_model._taps.remove()
        engine_model.compression = compression
        engine_model._tap()
        front = MULTIMODAL_REGISTRY.create_processor(llm.model_config)
        front.compression = compression
        images = front.info.parse_mm_data({"image": list(prompt.pictures)})
        processed = front(processor.apply_chat_template(prompt.chat(), add_generation_prompt=True), images)
        fields = processed["mm_kwargs"].get_data()
        with selections() as noted, torch.inference_mode():
            rows = engine_model.embed_multimodal(**fields)
        assert [len(part) for part in rows] == [place.length for place in processed["mm_placeholders"]["image"]]
        assert [tokens for tokens, _ in noted] == [len(trace.positions) for trace in expected]
        for (_, selection), trace in zip(noted, expected, strict=True):
            assert selection.anchor.tolist() == trace.selection.anchor.tolist()
            if selection.weight is not None:
                torch.testing.assert_close(selection.weight, trace.selection.weight, atol=1e-5, rtol=1e-4)


def test_without_configuration_nothing_is_replaced(folders: Path) -> None:
    with engine.engine(make("llava", folders / "llava"), additional_config={"other": 1}) as llm:
        assert type(model_of(llm)).__module__ == "vllm.model_executor.models.llava"
        assert not hasattr(llm.model_config.hf_config, "mmcompress")
    assert hasattr(VllmConfig.try_verify_and_update_config, "mmcompress")


def test_an_image_that_fits_its_budget_stays_whole(folders: Path) -> None:
    folder = make("llava", folders / "llava")
    processor = load_processor(folder)
    with compressed(folder, "divprune(keep=4000)") as llm:
        replies = engine.ask(llm, processor, PROMPTS, True)
    assert_equal(replies, reference.ask(load(folder), processor, PROMPTS, True))
    assert [len(reply.prompt) for reply in replies] == [
        len(reply.prompt) for reply in reference.ask(load(folder), processor, PROMPTS, True)
    ]


def test_ranks_that_share_a_model_keep_the_same(folders: Path) -> None:
    folder = make("qwen2_vl", folders / "qwen2_vl")
    model, processor = load(folder), load_processor(folder)
    method = "visionzip(keep=0.2, score=received, space=projected)"
    with mmcompress.wrap(model, method):
        expected = reference.ask(model, processor, PROMPTS, True)
    with compressed(folder, method, tensor_parallel_size=2, distributed_executor_backend="mp") as llm:
        assert_equal(engine.ask(llm, processor, PROMPTS, True), expected)
