"""The embedded evaluation that runs offline: small trained models and MicroVQA, pictures with questions for them."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from mmcompress.errors import SpecError, unknown_name

GENERATOR_VERSION = 2
"""Counts the generators whose scenes, pictures or questions differ; splits of different ones do not compare."""

MODELS: dict[str, Path] = {
    config.parent.name: config.parent for config in sorted((Path(__file__).parent / "models").glob("*/config.json"))
}
"""The trained models that are here, loadable with `from_pretrained`; an installed package has `DEFAULT_MODEL` alone."""

DEFAULT_MODEL = "micro-llava"

MICROVQA_PATH: Path = Path(__file__).parent / "microvqa"
"""The embedded split, as `mmcompress.evals.micro.build` writes it."""


@dataclass(frozen=True)
class Question:
    """One row of a question file.

    Args:
        question_id: its number in the file.
        image: path relative to the directory of the file.
        question: as the picture is asked.
        answer: the only right one.
        type: `exist`, `attribute`, `count`, `read`, `choice`, `spatial` or `compose`.
        form: the template of the question, finer than `type`.
    """

    question_id: int
    image: str
    question: str
    answer: str
    type: str
    form: str = ""


def model_path(name: str = DEFAULT_MODEL) -> Path:
    """The folder of an embedded model.

    Raises:
        SpecError: there is none of that name.
    """
    if name not in MODELS:
        raise unknown_name("embedded model", name, MODELS)
    return MODELS[name]


def load_microvqa(
    limit: int | None = None, path: Path = MICROVQA_PATH, without: Collection[str] = ()
) -> list[Question]:
    """Read the questions of a split in order, but those of the forms `without`; only the first `limit` if given.

    Raises:
        SpecError: `limit` is not positive, or another generator wrote the split.
    """
    if limit is not None and limit < 1:
        raise SpecError(f"limit must be at least 1, got {limit}.")
    _check_version(path)
    with (path / "questions.jsonl").open(encoding="utf-8") as rows:
        questions = (Question(**json.loads(row)) for row in rows)
        return [question for question in questions if question.form not in without][:limit]


def _check_version(path: Path) -> None:
    meta = path / "meta.json"
    version = json.loads(meta.read_text(encoding="utf-8"))["generator_version"] if meta.exists() else "unknown"
    if version != GENERATOR_VERSION:
        raise SpecError(
            f"{path} was written by generator version {version}, this is version {GENERATOR_VERSION}. "
            "Rebuild it in a new directory: python -m mmcompress.evals.micro.build --out DIR "
            "with the width, height, images and seed it was built with."
        )
