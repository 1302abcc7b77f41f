"""KV policies: the answers of transformers under the same policy, from blocks that were freed or are not read."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import engine
import pytest
import reference
import torch
from configured import configured
from kept import make
from prompts import Prompt, Reply, ragged_prompts
from transformers import AutoConfig, AutoModelForImageTextToText
from vllm import LLM, SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.platforms import current_platform

import mmcompress
from mmcompress.evals.micro.processing import load_processor
from mmcompress.integrations.vllm.kv.spec import KVManager

pytestmark = pytest.mark.slow

TOLERANCE = 1e-4  # of a log-probability
BLOCK = 32  # tokens
RAGGED = [
    Prompt(prompt.question, prompt.pictures, 40 if number % 2 else 25) for number, prompt in enumerate(ragged_prompts())
]
PICTURE = RAGGED[0].pictures[0]
LONG = [Prompt("what is the color of the star ? " * 4, (PICTURE,), 300), Prompt("why ?", (), 260)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("llava", tmp_path_factory.mktemp("llava"))


def transformers_replies(folder: Path, prompts: Sequence[Prompt], method: str | None, kv: str | None) -> list[Reply]:
    """What transformers answers."""
    model, processor = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32), load_processor(folder)
    if method is None and kv is None:
        return reference.ask(model.eval(), processor, prompts, True)
    with mmcompress.wrap(model.eval(), method, kv=kv):
        return reference.ask(model, processor, prompts, True)


@contextmanager
def under(folder: Path, kv: str, method: str | None = None, **settings: Any) -> Iterator[LLM]:
    """An engine with a KV policy."""
    wanted = {"kv": kv} if method is None else {"kv": kv, "method": method}
    with engine.engine(folder, additional_config={"mmcompress": wanted}, **settings) as llm:
        yield llm


def assert_equal(replies: Sequence[Reply], expected: Sequence[Reply]) -> None:
    for reply, wanted in zip(replies, expected, strict=True):
        assert reply.tokens == wanted.tokens
        assert reply.logprobs == pytest.approx(wanted.logprobs, abs=TOLERANCE)


def pool_of(llm: LLM) -> Any:
    """The blocks of an engine within this process."""
    return llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool


@pytest.mark.parametrize("chunked", [False, True], ids=["at once", "in chunks"])
@pytest.mark.parametrize(
    ("name", "method", "kv"),
    [
        ("llava", None, "streamingllm(keep=24)"),
        ("llava", None, "streamingllm(keep=0.5, sinks=2, every=3)"),
        ("llava", None, "streamingllm(keep=9, sinks=0)"),
        ("llava", None, "quest(keep=16, page=8, dense_layers=1)"),
        ("llava", "divprune(keep=0.5)", "quest(keep=0.4, page=4, dense_layers=0)"),
        ("qwen2_5_vl", "hiprune(keep=0.5)", "streamingllm(keep=20)"),
        ("qwen2_5_vl", None, "quest(keep=32, dense_layers=1)"),
        ("micro-llava", "divprune(keep=0.5)", "streamingllm(keep=64)"),
        ("micro-llava", None, "quest(keep=48, dense_layers=1)"),
    ],
    ids=lambda part: str(part),
)
def test_answers_are_those_of_transformers(
    name: str, method: str | None, kv: str, chunked: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = make(name, tmp_path_factory.getbasetemp() / f"kv-{name}")
    expected = transformers_replies(folder, RAGGED, method, kv)
    without = transformers_replies(folder, RAGGED, method, None)
    assert sum(reply.logprobs != other.logprobs for reply, other in zip(expected, without, strict=True)) >= 5
    settings = dict(max_num_batched_tokens=BLOCK + 1, max_num_seqs=3) if chunked else {}
    with under(folder, kv, method, **settings) as llm:
        assert_equal(engine.ask(llm, load_processor(folder), RAGGED, True), expected)


class TestPool:
    """A cache of few blocks under streamingllm."""

    KV = "streamingllm(keep=64)"
    SETTINGS: ClassVar[dict[str, Any]] = dict(max_num_batched_tokens=BLOCK, max_num_seqs=4, max_model_len=1000)

    @pytest.fixture(scope="class")
    def expected(self, folder: Path) -> list[Reply]:
        return transformers_replies(folder, LONG, None, self.KV)

    def test_requests_outgrow_the_pool(
        self, folder: Path, expected: list[Reply], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        free: list[int] = []
        remove = KVManager.remove_skipped_blocks

        def noting(self: KVManager, *args: Any, **kwargs: Any) -> None:
            remove(self, *args, **kwargs)
            free.append(self.block_pool.get_num_free_blocks())

        monkeypatch.setattr(KVManager, "remove_skipped_blocks", noting)
        with under(folder, self.KV, num_gpu_blocks_override=8, **self.SETTINGS) as llm:
            (reply,) = engine.ask(llm, load_processor(folder), LONG[:1], True)
            pool = pool_of(llm)
            assert len(reply.prompt) + len(reply.tokens) > pool.num_gpu_blocks * BLOCK
            assert free[-1] >= pool.num_gpu_blocks - 1 - 4  # one of sinks, and three that the window touches
            assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
        assert_equal([reply], expected[:1])

    def test_without_it_they_are_refused(self, folder: Path) -> None:
        with (
            pytest.raises(ValueError, match="KV cache"),
            engine.engine(folder, num_gpu_blocks_override=8, **self.SETTINGS),
        ):
            pass

    @pytest.mark.parametrize(
        ("kv", "blocks", "longest"),
        [(KV, 8, 1000), ("streamingllm(keep=70, every=40)", 8, 1000), ("quest(keep=64, dense_layers=0)", 13, 384)],
    )
    def test_requests_may_be_preempted(
        self, folder: Path, kv: str, blocks: int, longest: int, preempted: list[Any]
    ) -> None:
        settings = {**self.SETTINGS, "max_model_len": longest, "num_gpu_blocks_override": blocks}
        with under(folder, kv, **settings) as llm:
            replies = engine.ask(llm, load_processor(folder), LONG, True)
        assert preempted
        assert_equal(replies, transformers_replies(folder, LONG, None, kv))

    def test_prompts_that_never_fit_are_refused(self, folder: Path) -> None:
        with under(folder, self.KV, num_gpu_blocks_override=8, **self.SETTINGS) as llm:
            processor = load_processor(folder)
            with pytest.raises(VLLMValidationError, match="the KV cache can take 127"):
                engine.ask(llm, processor, [Prompt("what is " * 150, (), 2)], True)
            assert len(engine.ask(llm, processor, [Prompt("what is " * 55, (), 2)], True)[0].tokens) == 2

    def test_windows_that_never_fit_are_refused(self, folder: Path) -> None:
        with (
            pytest.raises(ValueError, match="KV cache"),
            under(folder, "streamingllm(keep=512)", num_gpu_blocks_override=8, **self.SETTINGS),
        ):
            pass


@pytest.mark.parametrize("kv", ["streamingllm(keep=32)", "quest(keep=16, page=8, dense_layers=0)"])
def test_prompts_alone_are_shared(folder: Path, kv: str) -> None:
    processor = load_processor(folder)
    prompt = Prompt("what is the color of the star ? " * 6, (PICTURE,), 80)
    text = processor.apply_chat_template(prompt.chat(), add_generation_prompt=True)
    request = {"prompt": text, "multi_modal_data": {"image": [PICTURE]}}
    greedy = SamplingParams(max_tokens=80, temperature=0, ignore_eos=True, logprobs=0)
    expected = transformers_replies(folder, [prompt], None, kv)

    def ask(llm: LLM, asked: Any) -> tuple[Any, int]:
        (output,) = llm.generate([asked], greedy, use_tqdm=False)
        return output, int(output.num_cached_tokens)

    with under(folder, kv) as llm:
        output, _ = ask(llm, request)
        again, cached = ask(llm, request)
        assert_equal(list(map(engine._reply, (output, again))), expected * 2)
        shared = (len(output.prompt_token_ids) - 1) // BLOCK * BLOCK
        assert cached == shared > BLOCK
        goes_on = {"prompt_token_ids": processor.tokenizer.encode(text) + list(output.outputs[0].token_ids)}
        _, cached = ask(llm, goes_on | {"multi_modal_data": request["multi_modal_data"]})
        assert cached <= len(output.prompt_token_ids)


@pytest.mark.parametrize("kv", ["streamingllm(keep=24)", "quest(keep=16, page=8, dense_layers=1)"])
def test_ranks_may_share_a_model(kv: str, tmp_path: Path) -> None:
    folder = make("qwen2_vl", tmp_path / "qwen2_vl")
    config = AutoConfig.from_pretrained(folder)
    config.text_config.num_key_value_heads = 2
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    expected = transformers_replies(folder, RAGGED, None, kv)
    with under(folder, kv, tensor_parallel_size=2, distributed_executor_backend="mp") as llm:
        assert_equal(engine.ask(llm, load_processor(folder), RAGGED, True), expected)


@pytest.mark.parametrize(
    ("wanted", "reason"),
    [
        ({"kv": "snapkv(keep=64)"}, "KV policy snapkv lets layers or heads hold tokens of their own"),
        ({"method": "hired", "keep": 0.2, "kv": "h2o(keep=64)"}, "take streamingllm"),
        ({"kv": "tidaldecode(keep=64)"}, "take quest"),
        ({"kv": "kivi"}, "take its --kv-cache-dtype"),
        ({"kv": "streamingllm"}, "streamingllm needs keep="),
        ({"kv": "streamingllm(keep=2)"}, "4 entries always stay, more than keep=2"),
        ({"kv": "streamingllm(keep=64, scope=visual)"}, "give scope=all"),
        ({"kv": "streamingllm(keep=64, compat=official)"}, "give compat=none"),
        ({"kv": "quest(keep=64, compat=official)"}, "give compat=none"),
        ({"kv": "quest(keep=64, page=12)"}, "give 8, 16 or 32"),
        ({"kv": "quest(keep=64, dense_layers=99)"}, "leaves none of the LLM's"),
        ({"kv": ["streamingllm(keep=64)", "quest(keep=64)"]}, "carries out one KV policy"),
        ({"kv": "streamingllm(keep=64)", "keep_range": [0.1, 0.5]}, "keep_range goes with a method"),
        ({"kv": "streamingllm(keep=64)", "method": "fastv", "keep": 0.5}, "removes tokens inside the LLM"),
        ({"kv": "stremingllm(keep=64)"}, "Did you mean 'streamingllm'?"),
    ],
    ids=str,
)
def test_wrong_policies_are_refused(wanted: Any, reason: str) -> None:
    with pytest.raises(Exception) as refused:
        configured(wanted)
    assert reason in str(refused.value)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"kv_cache_dtype": "fp8"}, "leave out kv, or --kv-cache-dtype fp8"),
        ({"attention_backend": "CPU_ATTN"}, "--attention-backend"),
        ({"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}}, "--kv-transfer-config"),
        ({"kv_offloading_size": 1.0}, "--kv-offloading-size"),
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}, "--speculative-config"),
    ],
    ids=str,
)
def test_engines_that_stand_against_it_are_refused(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(Exception) as refused:
        configured({"kv": "streamingllm(keep=64)"}, **settings)
    assert reason in str(refused.value)


def test_ranks_without_a_whole_head_are_refused() -> None:
    with pytest.raises(Exception, match="lower --tensor-parallel-size"):
        configured({"kv": "quest(keep=64)"}, tensor_parallel_size=4)


def test_other_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    with pytest.raises(Exception, match="built for vLLM on CPUs"):
        configured({"kv": "streamingllm(keep=64)"})


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is said at start-up."""
    said: list[str] = []
    for level in ("info", "warning"):
        monkeypatch.setattr(
            logging.getLogger("vllm.mmcompress"), level, lambda line, *parts, level=level: said.append(line % parts)
        )
    return said


def test_one_line_says_what_is_done(lines: list[str]) -> None:
    configured({"method": "hired", "keep": 0.2, "kv": "streamingllm(keep=64)"})
    assert lines == [
        "mmcompress: hired(keep=0.2), 51 of 256 tokens of the largest image enter the LLM; "
        "KV policy streamingllm(keep=64)."
    ]


@pytest.mark.parametrize("dtype", ["int8_per_token_head", "turboquant_4bit_nc"])
def test_caches_of_vllm_that_were_never_measured_are_named(dtype: str, lines: list[str]) -> None:
    configured({"method": "hired", "keep": 0.2}, kv_cache_dtype=dtype)
    assert lines[1:] == [
        f"mmcompress: --kv-cache-dtype {dtype} is vLLM's own; beside visual compression it was never measured."
    ]


def test_measured_caches_are_not(lines: list[str]) -> None:
    configured({"method": "hired", "keep": 0.2}, kv_cache_dtype="fp8")
    assert len(lines) == 1


OTHER_PROCESSES = """
import json, sys
from vllm import LLM, SamplingParams
llm = LLM(sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=1000, max_num_batched_tokens=32,
          max_num_seqs=4, num_gpu_blocks_override=8, block_size=32, limit_mm_per_prompt={"image": 0, "video": 0},
          gpu_memory_utilization=0.1, additional_config={"mmcompress": {"kv": "streamingllm(keep=64)"}})
(output,) = llm.generate([{"prompt_token_ids": json.loads(sys.argv[2])}],
                         SamplingParams(max_tokens=260, temperature=0, ignore_eos=True), use_tqdm=False)
print("tokens", json.dumps(list(output.outputs[0].token_ids)))
"""


def test_workers_in_other_processes_do_the_same(folder: Path) -> None:
    expected = transformers_replies(folder, LONG, None, TestPool.KV)[1]  # the one without a picture
    run = subprocess.run(
        [sys.executable, "-c", OTHER_PROCESSES, str(folder), json.dumps(expected.prompt)],
        env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    said = [line.removeprefix("tokens ") for line in run.stdout.splitlines() if line.startswith("tokens ")]
    assert said == [json.dumps(list(expected.tokens))], run.stderr[-2000:]
