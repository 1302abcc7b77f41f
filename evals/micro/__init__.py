"""The embedded evaluation that runs offline: a small LLaVA and MicroVQA, pictures with questions it can answer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from mmcompress.errors import SpecError

MODEL_PATH: Path = Path(__file__).parent / "micro_llava_168"
"""A trained LLaVA of 3.2M parameters, loadable with `from_pretrained`."""

MICROVQA_PATH: Path = Path(__file__).parent / "microvqa"
"""A directory with `questions.jsonl`; its rows name their images relative to it."""


@dataclass(frozen=True)
class Question:
    """One row of a question file; `image` is relative to the directory of that file."""

    question_id: int
    image: str
    question: str
    answer: str
    type: str


def load_microvqa(limit: int | None = None) -> list[Question]:
    """Read the MicroVQA questions in order, only the first `limit` of them if given.

    Raises:
        SpecError: `limit` is not positive.
    """
    if limit is not None and limit < 1:
        raise SpecError(f"limit must be at least 1, got {limit}.")
    with (MICROVQA_PATH / "questions.jsonl").open(encoding="utf-8") as rows:
        return [Question(**json.loads(row)) for row in rows][:limit]


def prompt(question: str) -> str:
    """Wrap `question` as the embedded model was trained; the processor adds no `<s>` of its own."""
    return f"<s> USER: <image> {question} ASSISTANT:"
