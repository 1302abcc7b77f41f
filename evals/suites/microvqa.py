"""The embedded suite, MicroVQA: questions about drawn scenes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass

from mmcompress.errors import unknown_name
from mmcompress.evals import micro
from mmcompress.evals.micro.vocabulary import COLOR_NAMES, DIGITS, LETTERS, OPTION_LETTERS, SHAPE_NAMES
from mmcompress.evals.suites.base import Grade, Picture, Question, Suite, picture_in
from mmcompress.evals.suites.files import Row
from mmcompress.evals.suites.scoring import mean_scorer
from mmcompress.evals.suites.vqa import PLAIN

_CLOSED_ANSWERS = {
    "exist": {"yes", "no"},
    "spatial": {"yes", "no"},
    "choice": {letter.lower() for letter in OPTION_LETTERS},
    "attribute": {*COLOR_NAMES, *SHAPE_NAMES},
    "compose": {"yes", "no", *COLOR_NAMES, *SHAPE_NAMES},
}
_CHARACTERS = {*DIGITS, *LETTERS.lower()}


def grade_as(text: str, kind: str, answer: str) -> Grade:
    """Compare with the right answer to a question of type `kind`, exactly but for case and outer blanks.

    Raises:
        SpecError: there is no such type.
    """
    given = text.strip().lower()
    if kind == "count":
        valid = given.replace(" ", "").isdecimal()
    elif kind == "read":
        valid = given != "" and set(given.split()) <= _CHARACTERS
    elif kind in _CLOSED_ANSWERS:
        valid = given in _CLOSED_ANSWERS[kind]
    else:
        raise unknown_name("question type", kind, {"count", "read", *_CLOSED_ANSWERS})
    return Grade(float(given == answer.strip().lower()), valid, given)


def as_question(asked: micro.Question, picture: Picture) -> Question:
    """A row of the embedded split as any suite asks it."""
    return Question(str(asked.question_id), (picture,), asked.question, (asked.answer,), category=asked.type)


def _grade(text: str, question: Question) -> Grade:
    return grade_as(text, question.category, question.answers[0])


@dataclass(frozen=True)
class MicroVQA(Suite):
    """MicroVQA, without the forms of questions that a model never learnt."""

    name = "microvqa"
    summary = "MicroVQA: inside the package"
    files = ("questions.jsonl", "meta.json", "images")
    scorer = mean_scorer("exact match", _grade, invalid="not one of the answers its type of question allows")
    prompts = PLAIN
    max_new_tokens = 8
    unlearnt: frozenset[str] = frozenset()

    def rows(self) -> Iterator[Row]:
        for asked in micro.load_microvqa(path=self.folder, without=self.unlearnt):
            yield Row(f"questions.jsonl, question {asked.question_id}", asdict(asked))

    def question(self, row: Row) -> Question:
        return as_question(micro.Question(**row.cells), picture_in(self.folder, row.text("image")))
