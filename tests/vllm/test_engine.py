"""Caches, chunks, preemption and bad input: what happens to compressed images between requests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
from transformers import AutoModelForImageTextToText
from vllm import LLM, SamplingParams
from vllm.exceptions import VLLMValidationError

import mmcompress
from mmcompress.evals.micro.processing import load_processor
from mmcompress.integrations.vllm import model as model_module
from mmcompress.integrations.vllm.model import POSITIONS_FACTOR, CompressedMRoPE
from mmcompress.integrations.vllm.processor import COUNTS

pytestmark = pytest.mark.slow

TOLERANCE = 1e-4  # of a log-probability
BLOCK = 32  # tokens
METHOD = "hiprune(keep=0.5)"
PICTURES = [prompt.pictures[0] for prompt in ragged_prompts() if prompt.pictures]
LONG = "what is the color of the circle left of the star and the square ? " * 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with M-RoPE, in which positions can go wrong."""
    return make("qwen2_5_vl", tmp_path_factory.mktemp("qwen2_5_vl"))


@pytest.fixture(scope="module")
def processor(folder: Path) -> Any:
    return load_processor(folder)


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    """Prompts that share beginnings of many lengths: text, a part of the picture, all of it, two pictures."""
    tall, wide = PICTURES[-1], PICTURES[-2]
    return [
        Prompt(LONG, (PICTURES[0],), 6),
        Prompt(LONG, (PICTURES[0],), 6),  # all but the last block
        Prompt(LONG.replace("star", "circle"), (PICTURES[0],), 6),  # up to behind the picture
        Prompt(LONG, (tall, wide), 6),
        Prompt(LONG, (tall, PICTURES[1]), 6),  # up to the middle of pictures
        Prompt(LONG, (), 6),
    ]


@pytest.fixture(scope="module")
def expected(folder: Path, processor: Any, prompts: list[Prompt]) -> list[Reply]:
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    with mmcompress.wrap(model, METHOD):
        return reference.ask(model, processor, prompts, True)


def assert_equal(replies: Sequence[Reply], expected: Sequence[Reply]) -> None:
    for reply, wanted in zip(replies, expected, strict=True):
        assert reply.tokens == wanted.tokens
        assert reply.logprobs == pytest.approx(wanted.logprobs, abs=TOLERANCE)


def cached_tokens(llm: LLM, processor: Any, prompt: Prompt) -> int:
    """How many tokens of a prompt are found in the prefix cache."""
    text = processor.apply_chat_template(prompt.chat(), add_generation_prompt=True)
    request = {"prompt": text, "multi_modal_data": {"image": list(prompt.pictures)}}
    (output,) = llm.generate([request], SamplingParams(max_tokens=1), use_tqdm=False)
    return int(output.num_cached_tokens)


def test_prefixes_may_end_anywhere(folder: Path, processor: Any, prompts: list[Prompt], expected: list[Reply]) -> None:
    with compressed(folder, METHOD) as llm:
        replies = [engine.ask(llm, processor, [prompt], True)[0] for prompt in prompts]
        again = engine.ask(llm, processor, prompts, True)
        assert cached_tokens(llm, processor, prompts[0]) >= BLOCK
    assert_equal(replies, expected)
    assert_equal(again, expected)


def test_images_may_arrive_in_pieces(
    folder: Path, processor: Any, prompts: list[Prompt], expected: list[Reply]
) -> None:
    settings = dict(max_num_batched_tokens=BLOCK + 1, max_num_seqs=3, mm_processor_cache_gb=0)
    with compressed(folder, METHOD, **settings) as llm:
        assert_equal(engine.ask(llm, processor, prompts, True), expected)


def test_requests_may_be_preempted(folder: Path, processor: Any, prompts: list[Prompt], preempted: list[Any]) -> None:
    longer = [Prompt(prompt.question, prompt.pictures, 70) for prompt in prompts]
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    with mmcompress.wrap(model, METHOD):
        expected = reference.ask(model, processor, longer, True)
    with compressed(folder, METHOD, num_gpu_blocks_override=16, max_model_len=320) as llm:
        replies = engine.ask(llm, processor, longer, True)
    assert preempted
    assert_equal(replies, expected)


def test_vllms_own_fp8_cache_goes_along(
    folder: Path, processor: Any, prompts: list[Prompt], expected: list[Reply]
) -> None:
    with compressed(folder, METHOD, kv_cache_dtype="fp8") as llm:
        replies = engine.ask(llm, processor, prompts, True)
    assert [len(reply.prompt) for reply in replies[:2]] == [len(expected[0].prompt) - 32] * 2
    for reply, wanted in zip(replies, expected, strict=True):
        assert reply.logprobs[0] == pytest.approx(wanted.logprobs[0], abs=0.5)
        assert reply.logprobs != wanted.logprobs


def test_another_question_is_another_image_where_the_question_decides(folder: Path, processor: Any) -> None:
    ask_color, ask_shape = (Prompt(question, (PICTURES[0],), 4) for question in ("what color ? " * 9, "shape ? " * 9))
    with compressed(folder, "cdpruner(keep=0.5, relevance=text)") as llm, selections() as noted:
        engine.ask(llm, processor, [ask_color], True)
        first = as_set(noted)
        assert cached_tokens(llm, processor, ask_color) >= BLOCK
        assert as_set(noted) == first, "the same question was encoded again"
        assert cached_tokens(llm, processor, ask_shape) == 0
        assert len(as_set(noted)) == len(first) + 1


class TestSmallEngine:
    """One engine of LLaVA, to which everything happens; after each test it answers as before."""

    QUESTION = Prompt("what color is the star ?", (PICTURES[0],), 5)

    @pytest.fixture(scope="class")
    def llm(self, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
        folder = make("llava", tmp_path_factory.mktemp("llava"))
        with compressed(folder, "divprune(keep=0.5)", keep_range=[0.1, 1.0], max_num_batched_tokens=40) as llm:
            llm.test_processor = load_processor(folder)
            llm.test_reply = engine.ask(llm, llm.test_processor, [self.QUESTION], True)
            yield llm

    @pytest.fixture(autouse=True)
    def goes_on(self, llm: LLM) -> Iterator[None]:
        yield
        llm.reset_prefix_cache()
        assert_equal(engine.ask(llm, llm.test_processor, [self.QUESTION], True), llm.test_reply)

    def ask(self, llm: LLM, pictures: Sequence[Any], **options: Any) -> Any:
        prompt = Prompt("what ?", tuple(pictures), 2)
        text = llm.test_processor.apply_chat_template(prompt.chat(), add_generation_prompt=True)
        request = {
            "prompt": text,
            "multi_modal_data": {"image": list(pictures)},
            "mm_processor_kwargs": {f"mmcompress_{name}": value for name, value in options.items()},
        }
        return llm.generate([request], SamplingParams(max_tokens=2), use_tqdm=False)[0]

    @pytest.mark.parametrize("size", [(1, 1), (1, 400), (400, 1), (3000, 20), (2, 1500)], ids=str)
    def test_odd_pictures(self, llm: LLM, size: tuple[int, int]) -> None:
        assert len(self.ask(llm, [Image.new("RGB", size)]).outputs[0].token_ids) == 2

    @pytest.mark.parametrize("keep", [0.1, 0.25, 1.0])
    def test_requests_choose_their_budget(self, llm: LLM, keep: float) -> None:
        with selections() as noted:
            self.ask(llm, [PICTURES[0]], keep=keep)
        assert [len(selection) for _, selection in noted] == [int(16 * keep)]

    def test_budgets_may_differ_within_a_batch(self, llm: LLM) -> None:
        counts = torch.tensor([[3, 3, 16], [16, 16, 16], [3, 3, 16]])
        pixels = torch.rand(3, 3, 56, 56)
        rows = model_of(llm).embed_multimodal(pixel_values=pixels, **{COUNTS: counts})
        assert [len(part) for part in rows] == [3, 16, 3]
        alone = model_of(llm).embed_multimodal(pixel_values=pixels[2:], **{COUNTS: counts[2:]})
        torch.testing.assert_close(rows[2], alone[0])

    @pytest.mark.parametrize("keep", [0.05, 1, "0.5", float("nan")])
    def test_budgets_out_of_range_are_refused(self, llm: LLM, keep: Any) -> None:
        with pytest.raises(ValueError, match="mmcompress_keep"):
            self.ask(llm, [PICTURES[0]], keep=keep)

    def test_too_many_pictures_are_refused(self, llm: LLM) -> None:
        with pytest.raises(VLLMValidationError, match="At most 2 image"):
            self.ask(llm, PICTURES[:3])

    def test_encoders_see_no_more_at_once_than_without_compression(self, llm: LLM) -> None:
        model, seen = model_of(llm), []
        hook = model.vision_tower.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
        model.embed_multimodal(
            pixel_values=torch.zeros(7, 3, 56, 56), **{COUNTS: torch.tensor([[1, 1, 16]]).expand(7, 3)}
        )
        hook.remove()
        assert seen == [2, 2, 2, 1]  # of 16 tokens each, 40 at once

    def test_broken_features_spoil_no_other_answer(self, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
        warnings: list[str] = []
        monkeypatch.setattr(model_module._LOG, "warning", lambda line, *parts: warnings.append(line % parts))
        projector = model_of(llm).multi_modal_projector
        hook = projector.register_forward_hook(lambda module, args, output: output * torch.nan)
        with selections() as noted:
            self.ask(llm, [Image.fromarray(np.full((9, 9, 3), 77, np.uint8))])
        hook.remove()
        assert len(warnings) == 1 and "contain NaN or infinity" in warnings[0]
        assert [selection.anchor.tolist() for _, selection in noted] == [[1, 3, 5, 7, 9, 11, 13, 15]]

    def test_pictures_and_text_mix(self, llm: LLM) -> None:
        mixed = [Prompt("what ?", (), 3), self.QUESTION, Prompt("why ?", (PICTURES[1], PICTURES[0]), 4)]
        together = engine.ask(llm, llm.test_processor, mixed, True)
        apart = [engine.ask(llm, llm.test_processor, [prompt], True)[0] for prompt in mixed]
        assert_equal(together, apart)


class TestPositionsOfPrompts:
    """`get_mrope_input_positions`, on a model without weights or engine."""

    def positions(self, length: int, images: list[tuple[int, int, int, int]]) -> tuple[torch.Tensor, int]:
        """Of a prompt of `length` tokens with images of (offset, kept tokens, rows, columns)."""
        from transformers import Qwen2_5_VLConfig
        from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration
        from vllm.multimodal.inputs import (
            MultiModalBatchedField,
            MultiModalFeatureSpec,
            MultiModalFieldElem,
            MultiModalKwargsItem,
            PlaceholderRange,
        )

        class Model(CompressedMRoPE, Qwen2_5_VLForConditionalGeneration):
            def __init__(self) -> None:
                torch.nn.Module.__init__(self)
                self.config = Qwen2_5_VLConfig()
                self._length, self._positions = 64, POSITIONS_FACTOR * 64

        def field(value: Any) -> Any:
            return MultiModalFieldElem(data=torch.tensor(value), field=MultiModalBatchedField())

        features = [
            MultiModalFeatureSpec(
                data=MultiModalKwargsItem(
                    {
                        "image_grid_thw": field([1, 2 * rows, 2 * columns]),
                        COUNTS: field([kept, kept, rows * columns]),
                    }
                ),
                modality="image",
                identifier="",
                mm_position=PlaceholderRange(offset=offset, length=kept),
            )
            for offset, kept, rows, columns in images
        ]
        return Model().get_mrope_input_positions(list(range(length)), features)

    def test_text_goes_on_where_it_would_have(self) -> None:
        positions, delta = self.positions(10, [(2, 3, 4, 6)])
        assert positions.tolist() == [[0, 1, 2, 2, 2, 8, 9, 10, 11, 12]] * 3
        assert delta == 13 - 10

    def test_two_images_of_which_one_ends_the_prompt(self) -> None:
        positions, delta = self.positions(8, [(5, 3, 5, 2), (1, 2, 2, 2)])
        assert positions.tolist() == [[0, 1, 1, 3, 4, 5, 5, 5]] * 3
        assert delta == 10 - 8

    def test_nothing_leaves_the_tables(self) -> None:
        images = [(2 * number, 1, 50, 1) for number in range(10)]
        positions, delta = self.positions(20, images)
        assert int(positions.max()) + 50 <= 4 * 64
        assert delta + 64 <= 4 * 64
