"""`mmcompress eval --backend vllm` answers and scores as transformers does, in the same record, and goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from result_numbers import numbers
from test_cli import fail, succeed

from mmcompress.evals import record

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
