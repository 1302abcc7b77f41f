"""Questions of the user's own."""

from __future__ import annotations

from collections.abc import Iterator

from mmcompress.evals.suites import scoring
from mmcompress.evals.suites.base import Question, Suite, picture_in
from mmcompress.evals.suites.files import Row, jsonl_rows
from mmcompress.evals.suites.vqa import SHORT


class Jsonl(Suite):
    """Lines of `{"image": path or list of them, "question": text, "answers": text or list of them, "id": optional}`."""

    name = "jsonl"
    summary = "your own: a line each of image (or a list), question, answers (or one) and optionally id, category"
    files = ("questions.jsonl",)
    scorer = scoring.EXACT_OR_EQUAL
    prompts = SHORT

    def rows(self) -> Iterator[Row]:
        for number, row in enumerate(jsonl_rows(self.folder / self.files[0])):
            yield Row(row.where, {"id": number, **row.cells}) if isinstance(row.cells, dict) else row

    def question(self, row: Row) -> Question:
        return Question(
            id=row.text("id"),
            images=tuple(picture_in(self.folder, image) for image in row.texts("image")),
            prompt=self.word(row.text("question")),
            answers=row.texts("answers"),
            category=row.text("category") if row.has("category") else "",
        )
