"""VLMEvalKit's tables: tabs between cells, pictures in base64, and multiple choice in columns A, B, ..."""

from __future__ import annotations

import ast
import base64
import binascii
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import ClassVar

from mmcompress.errors import InputError
from mmcompress.evals.suites import scoring
from mmcompress.evals.suites.base import LETTERS, Picture, Question, Suite
from mmcompress.evals.suites.files import Row, tsv_rows

CHOOSE = {
    "default": "{question}\n{choices}\nAnswer with the option's letter from the given choices directly.",
    "official": "{question}\n{choices}\nPlease select the correct answer from the options above.",
}
OPEN = "{question}\nAnswer the question using a single word or phrase."
LONGEST_REFERENCE = 64
"""A picture's cell that is no longer than this names the row whose picture it shares."""


class Pictures:
    """The cell "image" of a table."""

    @staticmethod
    def linked(rows: Iterable[Row]) -> Iterator[Row]:
        """`rows` with the pictures they share put in; where there is none of that name, the row has none."""
        known: dict[str, str] = {}
        for row in rows:
            if row.has("image") and row.has("index"):
                cell = row.text("image")
                if len(cell) > LONGEST_REFERENCE:
                    known[row.text("index")] = cell
                else:
                    row = Row(row.where, {**row.cells, "image": known.get(cell.strip())})
            yield row

    @staticmethod
    def of(row: Row, name: str | None = None) -> tuple[Picture, ...]:
        """One picture or, written as a list, several; `name` if there is a better one than their content's hash.

        Raises:
            InputError: a cell is no base64.
        """
        cell = row.text("image")
        encoded = re.findall(r"['\"]([^'\"]+)['\"]", cell) if cell.startswith("[") else [cell]
        try:
            decoded = [base64.b64decode(part, validate=True) for part in encoded]
        except (binascii.Error, ValueError) as error:
            raise InputError(f"'image' is no base64: {error}") from error
        return tuple(Picture(name, data=data) if name else Picture.held(data) for data in decoded)


class Table(Suite):
    """Multiple choice from a table."""

    scorer = scoring.CHOICE
    prompts = CHOOSE
    columns: ClassVar[tuple[str, ...]] = ("index", "question", "answer", "image", "A", "B")

    def rows(self) -> Iterator[Row]:
        return Pictures.linked(tsv_rows(self.found(self.files[0])[0], self.columns))

    def question(self, row: Row) -> Question | None:
        choices = []
        for letter in LETTERS:
            if not row.has(letter):
                break
            choices.append(row.text(letter))
        answer = row.text("answer").strip()
        if choices and answer not in LETTERS[: len(choices)]:
            raise InputError(f"'answer' is {answer!r}, which is not the letter of one of {len(choices)} choices.")
        return Question(
            id=row.text("index"),
            images=Pictures.of(row),
            prompt=self._prompt(row, choices),
            answers=(answer,),
            choices=tuple(choices),
            category=row.text("category") if row.has("category") else "",
        )

    def _prompt(self, row: Row, choices: list[str]) -> str:
        question = row.text("question")
        if row.has("hint"):
            question = f"{row.text('hint')}\n{question}"
        if not choices:
            return OPEN.format(question=question)
        return self.word(question, choices=lettered(choices))


def lettered(choices: Iterable[str]) -> str:
    """Choices in lines of their own, behind their letters."""
    return "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, choices, strict=False))


class MMBench(Table):
    """MMBench, English development split, every question asked once."""

    name = "mmbench"
    summary = "MMBench English dev as VLMEvalKit's table; each question is asked once, without circular shifts"
    files = ("MMBench_DEV_EN.tsv | MMBench_DEV_EN_V11.tsv",)

    def question(self, row: Row) -> Question | None:
        # Rows of the circular evaluation are the same questions with their choices shifted.
        if row.has("index") and row.text("index").isdecimal() and int(row.text("index")) >= 1_000_000:
            return None
        return super().question(row)


class SEED(Table):
    """SEED-Bench, its questions about images."""

    name = "seed"
    summary = "SEED-Bench (images) as VLMEvalKit's table"
    files = ("SEEDBench_IMG.tsv",)


class AI2D(Table):
    """AI2D, test."""

    name = "ai2d"
    summary = "AI2D test as VLMEvalKit's table, choices marked in the diagrams"
    files = ("AI2D_TEST.tsv",)


class MMMU(Table):
    """MMMU, validation; questions may have several pictures, and some have no choices."""

    name = "mmmu"
    summary = "MMMU validation as VLMEvalKit's table; pictures come first, in their order"
    files = ("MMMU_DEV_VAL.tsv",)

    def question(self, row: Row) -> Question | None:
        if row.has("split") and row.text("split") != "validation":
            return None
        asked = super().question(row)
        return asked if asked is None or asked.choices else replace(asked, answers=_listed(*asked.answers))


def _listed(answer: str) -> tuple[str, ...]:
    """The answers that are written as a list, or the one that is not."""
    try:
        listed = ast.literal_eval(answer) if answer.startswith("[") else [answer]
    except (SyntaxError, ValueError):  # words in brackets
        listed = [answer]
    return tuple(map(str, listed))
