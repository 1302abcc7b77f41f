"""ScienceQA: multiple choice out of school books; the questions with a picture, as vision-language models report it."""

from __future__ import annotations

from collections.abc import Iterator

from mmcompress.errors import InputError
from mmcompress.evals.suites import scoring
from mmcompress.evals.suites.base import LETTERS, Question, Suite, picture_in
from mmcompress.evals.suites.files import Row, json_rows
from mmcompress.evals.suites.tables import CHOOSE, lettered


class ScienceQA(Suite):
    """ScienceQA, the test questions that have a picture."""

    name = "scienceqa"
    summary = "ScienceQA test, questions with a picture: scienceqa.github.io, problems.json and the folder test"
    files = ("problems.json", "pid_splits.json", "test")
    scorer = scoring.CHOICE
    prompts = CHOOSE

    def rows(self) -> Iterator[Row]:
        tested = {str(row.cells) for row in json_rows(self.folder / "pid_splits.json", "test")}
        for row in json_rows(self.folder / "problems.json"):
            # A row that is no object does not know its name; its question is the place to say so.
            if not isinstance(row.cells, dict) or row.cells["key"] in tested:
                yield row

    def question(self, row: Row) -> Question | None:
        if not row.has("image"):
            return None
        choices, answer = row.texts("choices"), row.number("answer")
        if not 0 <= answer < len(choices):
            raise InputError(f"'answer' is {answer}, but there are {len(choices)} choices.")
        context = f"Context: {row.text('hint')}\n" if row.has("hint") else ""
        return Question(
            id=row.text("key"),
            images=(picture_in(self.folder / "test", f"{row.text('key')}/{row.text('image')}"),),
            prompt=self.word(context + row.text("question"), choices=lettered(choices)),
            answers=(LETTERS[answer],),
            choices=choices,
            category=row.text("subject") if row.has("subject") else "",
        )
