"""`mmcompress eval --backend vllm` answers and scores as transformers does, in the same record, and goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from result_numbers import numbers
from test_cli import fail, succeed

from mmcompress.evals import record
from mmcompress.evals.runner import batches

pytestmark = pytest.mark.slow

ENGINE = {"enforce_eager": True, "max_model_len": 2048, "kv_cache_memory_bytes": 1 << 27, "block_size": 32}
ASK = ("eval", "micro-llava", "--method", "divprune", "--keep", "0.25", "--limit", 60)
IN_VLLM = ("--backend", "vllm", "--engine", json.dumps(ENGINE))


def test_both_engines_give_the_same_result(tmp_path: Path) -> None:
    succeed(*ASK, "--out", tmp_path / "hf")
    succeed(*ASK, *IN_VLLM, "--out", tmp_path / "vllm")
    assert numbers(tmp_path / "vllm") == numbers(tmp_path / "hf")
    assert [run["label"] for run in record.load(tmp_path / "vllm")["runs"]] == [
        "unpruned",
        "random at 25%",
        "uniform at 25%",
        "divprune at 25%",
    ]
    whole = numbers(tmp_path / "vllm")
    answers = tmp_path / "vllm" / "answers-0.jsonl"
    lines = answers.read_text().splitlines(keepends=True)
    answers.write_text("".join(lines[:-20]) + lines[-20][:30])
    succeed(*ASK, *IN_VLLM, "--out", tmp_path / "vllm")
    again = answers.read_text().splitlines(keepends=True)
    assert again[:-20] == lines[:-20] and len(again) == len(lines)
    assert numbers(tmp_path / "vllm") == whole
    assert "other conditions" in fail(*ASK, "--out", tmp_path / "vllm")


def test_every_answer_takes_all_its_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is reused of a question before, or of the pass that each engine does first and that is not timed."""
    from vllm import LLM
    from vllm.v1.core.encoder_cache_manager import EncoderCacheManager

    asked: list[list[Any]] = []
    found: list[bool] = []
    generate, look_up = LLM.generate, EncoderCacheManager.check_and_update_cache

    def noting(self: LLM, requests: Any, *arguments: Any, **options: Any) -> Any:
        asked.append(generate(self, requests, *arguments, **options))
        return asked[-1]

    def looking(self: EncoderCacheManager, *arguments: Any) -> bool:
        found.append(look_up(self, *arguments))
        return found[-1]

    monkeypatch.setattr(LLM, "generate", noting)
    monkeypatch.setattr(EncoderCacheManager, "check_and_update_cache", looking)
    few = ("--limit", 4, "--batch-size", 4, "--no-baselines", "--out", tmp_path)
    succeed("eval", "micro-llava", "--method", "divprune", "--keep", "0.25", *IN_VLLM, *few)
    result = record.load(tmp_path)
    questions = result["suites"]["microvqa"]["questions"]
    pictures = {image for question in questions for image in question["images"]}
    assert len(pictures) < len(questions)
    first = min(4, len(questions))
    assert [len(outputs) for outputs in asked] == 2 * [first, *(len(batch) for batch in batches(questions, 4))]
    assert found == [False] * 2 * (first + len(questions))
    assert not any(output.num_cached_tokens for outputs in asked for output in outputs)
    assert result["environment"]["engine"]["enable_prefix_caching"] is False


def test_work_cannot_be_reused_by_request(tmp_path: Path) -> None:
    for name in ("enable_prefix_caching", "mm_processor_cache_gb"):
        said = fail(*ASK, "--backend", "vllm", "--engine", json.dumps({name: 1}), "--out", tmp_path)
        assert f"leave out {name}; an evaluation has vLLM reuse nothing" in " ".join(said.split())


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--method", "fastv"), "--backend vllm: fastv removes tokens inside the LLM"),
        (("--method", "tome"), "--backend vllm: tome removes tokens between the layers"),
        (("--method", "divprune", "--kv", "snapkv(keep=0.5)"), "--backend vllm: KV policy snapkv"),
    ],
)
def test_what_vllm_cannot_do_is_refused_at_once(arguments: tuple[str, ...], reason: str, tmp_path: Path) -> None:
    said = fail("eval", "micro-llava", *arguments, "--keep", "0.25", "--limit", 8, *IN_VLLM, "--out", tmp_path)
    assert reason in " ".join(said.split())
    assert not list(tmp_path.iterdir())
