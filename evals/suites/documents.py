"""Documents, charts and text in pictures: DocVQA, InfoVQA, ChartQA and OCRBench, as JSON or as parquet."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from mmcompress.errors import InputError
from mmcompress.evals.suites import scoring
from mmcompress.evals.suites.base import Picture, Question, Suite, picture_in
from mmcompress.evals.suites.files import Row, json_rows, parquet_rows
from mmcompress.evals.suites.vqa import PLAIN, SHORT


class Documents(Suite):
    """A suite whose first file is either official JSON beside a folder of pictures, or parquet that holds them.

    Subclasses name the columns, which differ between the two.
    """

    key: ClassVar[str | None] = None
    identifier: ClassVar[tuple[str, ...]]
    asked: ClassVar[tuple[str, ...]] = ("question",)
    right: ClassVar[tuple[str, ...]] = ("answers",)
    pictured: ClassVar[tuple[str, ...]]
    kind: ClassVar[tuple[str, ...]] = ()
    images: ClassVar[str] = ""
    prompts = SHORT

    def rows(self) -> Iterator[Row]:
        for path in self.found(self.files[0]):
            yield from parquet_rows(path) if path.suffix == ".parquet" else json_rows(path, self.key)

    def question(self, row: Row) -> Question:
        kind = _first(row, self.kind)
        return Question(
            id=row.text(_named(row, self.identifier)),
            images=(self._picture(row),),
            prompt=self.word(row.text(_named(row, self.asked)).strip()),
            answers=row.texts(_named(row, self.right)),
            category=row.text(kind) if kind else "",
        )

    def _picture(self, row: Row) -> Picture:
        name = _named(row, (*self.pictured, "image"))
        held = row.cell(name)
        if not isinstance(held, dict):
            return picture_in(self.folder / self.images, row.text(name))
        if not isinstance(held.get("bytes"), bytes):
            raise InputError(f"{name!r} holds no picture.")
        # Parquet may give pictures of different rows the same path.
        return Picture.held(held["bytes"])


def _first(row: Row, names: tuple[str, ...]) -> str | None:
    return next((name for name in names if row.has(name)), None)


def _named(row: Row, names: tuple[str, ...]) -> str:
    """The first of `names` that the row has, or the first of all."""
    return _first(row, names) or names[0]


class DocVQA(Documents):
    """DocVQA, validation."""

    name = "docvqa"
    summary = "DocVQA 1.0 validation, task 1: docvqa.org (rrc.cvc.uab.es), annotations with their folder documents"
    files = ("val_v1.0_withQT.json | val_v1.0.json | *validation*.parquet",)
    scorer = scoring.ANLS
    max_new_tokens = 32
    key = "data"
    identifier = ("questionId",)
    pictured = ("image",)


class InfoVQA(Documents):
    """InfographicVQA, validation."""

    name = "infovqa"
    summary = "InfographicVQA 1.0 validation: docvqa.org, annotations with the folder infographicsvqa_images"
    files = ("infographicsVQA_val_v1.0_withQT.json | infographicsVQA_val_v1.0.json | *validation*.parquet",)
    scorer = scoring.ANLS
    max_new_tokens = 32
    key = "data"
    identifier = ("questionId",)
    pictured = ("image_local_name",)
    images = "infographicsvqa_images"


class ChartQA(Documents):
    """ChartQA, test, human and augmented questions."""

    name = "chartqa"
    summary = "ChartQA test: github.com/vis-nlp/ChartQA, test_human.json and test_augmented.json beside the folder png"
    files = ("test_*.json | *test*.parquet",)
    scorer = scoring.RELAXED
    identifier = ("id",)
    asked = ("query", "question")
    right = ("label", "answer")
    pictured = ("imgname",)
    kind = ("type",)
    images = "png"
    prompts = SHORT | {"default": "{question}\nAnswer the question with a single word."}

    def rows(self) -> Iterator[Row]:
        for row in super().rows():
            part = row.where.split(",")[0].split(".")[0]
            cells = {"id": row.where, "type": part, **row.cells} if isinstance(row.cells, dict) else row.cells
            yield Row(row.where, cells)


class OCRBench(Documents):
    """OCRBench: text recognition, questions about it, formulas."""

    name = "ocrbench"
    summary = "OCRBench v1: github.com/Yuliang-Liu/MultimodalOCR, OCRBench.json and OCRBench_Images, or parquet"
    files = ("OCRBench.json | *test*.parquet",)
    scorer = scoring.CONTAINS
    max_new_tokens = 128
    identifier = ("id",)
    right = ("answers", "answer")
    pictured = ("image_path",)
    kind = ("type", "question_type")
    images = "OCRBench_Images"
    prompts = PLAIN

    def rows(self) -> Iterator[Row]:
        for row in super().rows():
            yield Row(row.where, {"id": row.where, **row.cells}) if isinstance(row.cells, dict) else row
