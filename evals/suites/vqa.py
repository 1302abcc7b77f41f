"""Questions about photographs with answers of a few words: VQAv2, TextVQA, VizWiz and GQA."""

from __future__ import annotations

from collections.abc import Iterator

from mmcompress.errors import InputError
from mmcompress.evals.suites import scoring
from mmcompress.evals.suites.base import Question, Suite, picture_in
from mmcompress.evals.suites.files import Row, json_rows

PLAIN = {"default": "{question}"}
SHORT = {
    "default": "{question}\nAnswer the question using a single word or phrase.",
    "qwen": "{question} Answer:",
    "plain": "{question}",
}
"""How LLaVA-1.5 and Qwen-VL are asked for short answers."""


class VQAv2(Suite):
    """VQA v2.0, validation."""

    name = "vqav2"
    summary = "VQA v2.0 validation: visualqa.org, questions, annotations and COCO val2014 images"
    files = ("v2_OpenEnded_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json", "val2014")
    scorer = scoring.VQA
    prompts = SHORT

    def rows(self) -> Iterator[Row]:
        questions, annotations = self.files[:2]
        answers = {row.text("question_id"): row for row in json_rows(self.folder / annotations, "annotations")}
        for row in json_rows(self.folder / questions, "questions"):
            annotated = answers.get(row.text("question_id")) if row.has("question_id") else None
            yield Row(row.where, {**row.cells, **annotated.cells}) if annotated else row

    def question(self, row: Row) -> Question:
        image = f"COCO_val2014_{row.number('image_id'):012d}.jpg"
        return Question(
            id=row.text("question_id"),
            images=(picture_in(self.folder / "val2014", image),),
            prompt=self.word(row.text("question")),
            answers=row.texts("answers", within="answer"),
            category=row.text("answer_type") if row.has("answer_type") else "",
        )


class TextVQA(Suite):
    """TextVQA, validation."""

    name = "textvqa"
    summary = "TextVQA 0.5.1 validation: textvqa.org, questions and the OpenImages of train and validation"
    files = ("TextVQA_0.5.1_val.json", "train_images")
    scorer = scoring.EVALAI
    prompts = SHORT

    def rows(self) -> Iterator[Row]:
        return json_rows(self.folder / self.files[0], "data")

    def question(self, row: Row) -> Question:
        return Question(
            id=row.text("question_id"),
            images=(picture_in(self.folder / "train_images", f"{row.text('image_id')}.jpg"),),
            prompt=self.word(row.text("question").capitalize()),
            answers=row.texts("answers"),
        )


class VizWiz(Suite):
    """VizWiz-VQA, validation."""

    name = "vizwiz"
    summary = "VizWiz-VQA validation: vizwiz.org, annotations and images"
    files = ("val.json", "val")
    scorer = scoring.EVALAI
    prompts = SHORT | {
        "default": "{question}\nWhen the provided information is insufficient, respond with 'Unanswerable'.\n"
        "Answer the question using a single word or phrase."
    }

    def rows(self) -> Iterator[Row]:
        return json_rows(self.folder / self.files[0])

    def question(self, row: Row) -> Question:
        return Question(
            id=row.text("image"),
            images=(picture_in(self.folder / "val", row.text("image")),),
            prompt=self.word(row.text("question").capitalize()),
            answers=row.texts("answers", within="answer"),
            category=row.text("answer_type") if row.has("answer_type") else "",
        )


class GQA(Suite):
    """GQA, balanced test-dev."""

    name = "gqa"
    summary = "GQA balanced test-dev: cs.stanford.edu/people/dorarad/gqa, questions 1.2 and images"
    files = ("testdev_balanced_questions.json", "images")
    scorer = scoring.EXACT
    prompts = SHORT

    def rows(self) -> Iterator[Row]:
        return json_rows(self.folder / self.files[0])

    def question(self, row: Row) -> Question:
        return Question(
            id=row.text("key"),
            images=(picture_in(self.folder / "images", f"{row.text('imageId')}.jpg"),),
            prompt=self.word(row.text("question")),
            answers=(row.text("answer"),),
            category=_structural(row),
        )


def _structural(row: Row) -> str:
    types = row.cells.get("types")
    if types is not None and not isinstance(types, dict):
        raise InputError("'types' is not an object.")
    return str((types or {}).get("structural", ""))
