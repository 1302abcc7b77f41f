"""Yes or no: POPE, which asks whether an object is there, and MME, which asks everything twice."""

from __future__ import annotations

from collections.abc import Iterator

from mmcompress.errors import InputError
from mmcompress.evals.suites import scoring
from mmcompress.evals.suites.base import Question, Suite, picture_in
from mmcompress.evals.suites.files import Row, jsonl_rows, tsv_rows
from mmcompress.evals.suites.tables import Pictures
from mmcompress.evals.suites.vqa import SHORT

_SPLITS = ("random", "popular", "adversarial")
_MME_ENDING = "Please answer yes or no."


def _yes_or_no(row: Row, name: str) -> str:
    answer = row.text(name).strip().lower()
    if answer not in ("yes", "no"):
        raise InputError(f"{name!r} is {answer!r}, neither yes nor no.")
    return answer


class POPE(Suite):
    """POPE on COCO: its random, popular and adversarial splits together, and by category."""

    name = "pope"
    summary = "POPE on COCO: github.com/AoiDragon/POPE, output/coco, and COCO val2014 images"
    files = (*(f"coco_pope_{split}.json" for split in _SPLITS), "val2014")
    scorer = scoring.POPE
    prompts = SHORT

    def rows(self) -> Iterator[Row]:
        for split in _SPLITS:
            for row in jsonl_rows(self.folder / f"coco_pope_{split}.json"):
                yield Row(row.where, {**row.cells, "split": split}) if isinstance(row.cells, dict) else row

    def question(self, row: Row) -> Question:
        return Question(
            id=f"{row.text('split')}-{row.text('question_id')}",
            images=(picture_in(self.folder / "val2014", row.text("image")),),
            prompt=self.word(row.text("text")),
            answers=(_yes_or_no(row, "label"),),
            category=row.text("split"),
        )


class MME(Suite):
    """MME: fourteen categories, two questions about every image."""

    name = "mme"
    summary = "MME as VLMEvalKit's table: MME.tsv"
    files = ("MME.tsv",)
    scorer = scoring.MME
    prompts = SHORT | {"official": "{question} " + _MME_ENDING}

    def rows(self) -> Iterator[Row]:
        columns = ("index", "question", "answer", "category", "image")
        return Pictures.linked(tsv_rows(self.folder / self.files[0], columns))

    def question(self, row: Row) -> Question:
        image = row.text("image_path") if row.has("image_path") else None
        return Question(
            id=row.text("index"),
            images=Pictures.of(row, image),
            prompt=self.word(row.text("question").replace(_MME_ENDING, "").strip()),
            answers=(_yes_or_no(row, "answer"),),
            category=row.text("category"),
        )
