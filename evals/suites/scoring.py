"""How answers are judged: one scorer per official metric, and what each counts as an invalid answer."""

from __future__ import annotations

import math
import re
import string
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mmcompress.errors import UnsupportedError
from mmcompress.evals.suites import normal
from mmcompress.evals.suites.base import LETTERS, Array, Grade, Question, Scorer

TOLERANCE = 0.05
"""Relative error that relaxed accuracy forgives."""

_FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: " "}
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_MARKS = string.punctuation + string.whitespace
_LEADS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
"""What MMMU takes to lead to an answer."""
_NUMBERS = (r"-?\b\d{1,3}(?:,\d{3})+\b", r"-?\d+(?:\.\d+)?e[+-]?\d+", r"-?(?:\d*\.\d+|\d+\b)(?!e[+-]?\d|[,\d])")
"""Grouped by commas, with an exponent, and plain."""
_PATTERNS = (
    r"^\W*LETTER[).:,]",
    r"\(LETTER\)",
    r"answer(?: is|:)\W*LETTER\b",
    r"(?<![\w'])(?![AI] [a-z])LETTER(?![\w'])",  # but "A dog" and "I see"
)


def mean(values: Array, weights: Array) -> Array:
    """Weighted means of `values` [questions], `[samples]`; NaN where nothing has a weight."""
    total = weights.sum(axis=-1)
    return np.divide(weights @ values, total, out=np.full(total.shape, np.nan), where=total > 0)


def _mean_of(metric: str) -> Callable[[Sequence[Question], Sequence[Grade], Array], dict[str, Array]]:
    def metrics(questions: Sequence[Question], grades: Sequence[Grade], weights: Array) -> dict[str, Array]:
        return {metric: mean(np.array([grade.score for grade in grades]), weights)}

    return metrics


def mean_scorer(metric: str, grade: Callable[[str, Question], Grade], invalid: str = "empty") -> Scorer:
    """A scorer whose metric is the mean of what answers score."""
    return Scorer(metric, grade, _mean_of(metric), invalid=invalid)


def vqa_accuracy(normalise: Callable[[str], str]) -> Scorer:
    """Share of annotators an answer agrees with: three make it right, averaged over leaving each of them out."""

    def grade(text: str, question: Question) -> Grade:
        given = normalise(text)
        agreeing = sum(normalise(answer) == given for answer in question.answers)
        others = len(question.answers) - agreeing
        score = (agreeing * min(1, (agreeing - 1) / 3) + others * min(1, agreeing / 3)) / len(question.answers)
        return Grade(score if agreeing else 0.0, given != "", given)

    return mean_scorer("VQA accuracy", grade, invalid="empty once articles and punctuation are gone")


def _exact(text: str, question: Question) -> Grade:
    given = _bare(text)
    return Grade(float(any(_bare(answer) == given for answer in question.answers)), given.strip() != "", given)


def _exact_or_equal(text: str, question: Question) -> Grade:
    """Two numbers are compared as such, for "12.5" without its punctuation is "125"; all else exactly."""
    given, number = _bare(text), _plain_number(text)

    def right(answer: str) -> bool:
        target = _plain_number(answer)
        return _bare(answer) == given if number is None or target is None else target == number

    return Grade(float(any(map(right, question.answers))), given.strip() != "", given)


def _bare(words: str) -> str:
    return words.lower().translate(_PUNCTUATION)


def _plain_number(text: str) -> float | None:
    """A number that may be grouped by commas, end a sentence and have a sign of percent or dollars."""
    try:
        number = float(text.strip().rstrip(".").strip("$%").replace(",", ""))
    except ValueError:
        return None
    return number if math.isfinite(number) else None  # "nan" and "infinity" are words


def _anls_score() -> Callable[..., Any]:
    """What measures ANLS.

    Raises:
        UnsupportedError: anls-star is not installed.
    """
    try:
        from anls_star import anls_score
    except ImportError as error:
        raise UnsupportedError(f"ANLS needs anls-star: pip install 'mmcompress[evals]' ({error})") from error
    return anls_score


def _anls(text: str, question: Question) -> Grade:
    given = " ".join(text.split())
    score = _anls_score()(question.answers, given, return_gt=False, return_key_scores=False)
    return Grade(score, given != "", given)


def _relaxed(text: str, question: Question) -> Grade:
    def right(answer: str) -> bool:
        number, target = _number(text), _number(answer)
        if number is None or not target:
            return text.lower() == answer.lower()
        return abs(number - target) <= TOLERANCE * abs(target)

    return Grade(float(any(map(right, question.answers))), text.strip() != "", text)


def _number(text: str) -> float | None:
    """A number, or a percentage as a fraction."""
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def _contains(text: str, question: Question) -> Grade:
    """Whether a right answer is part of what was said; formulas are compared without blanks and with their case."""
    formula = question.category == "Handwritten Mathematical Expression Recognition"

    def written(words: str) -> str:
        if formula:
            return words.strip().replace("\n", "").replace(" ", "")
        return words.translate(_FULL_WIDTH).lower().strip().replace("\n", " ")

    given = written(text)
    return Grade(float(any(written(answer) in given for answer in question.answers)), given != "", given)


def choice(text: str, choices: Sequence[str]) -> str | None:
    """The letter an answer means: alone, first, in brackets, the only one apart, or that of the choice it quotes."""
    letters = LETTERS[: len(choices)]
    bare = text.strip(_MARKS)
    if len(bare) == 1 and bare.upper() in letters:
        return bare.upper()
    for pattern in _PATTERNS:
        found = set(re.findall(pattern.replace("LETTER", f"([{letters}])"), text))
        if len(found) == 1:
            return str(found.pop())
    quoted = [words.strip(_MARKS).lower() == bare.lower() for words in choices]
    return letters[quoted.index(True)] if sum(quoted) == 1 else None


def _multiple_choice(text: str, question: Question) -> Grade:
    if not question.choices:
        return _open(text, question)
    letter = choice(text, question.choices)
    return Grade(float(letter in question.answers), letter is not None, letter or "")


def _open(text: str, question: Question) -> Grade:
    """MMMU's rule: a right answer is one of the numbers said, or is part of what is said last in a line."""
    ends = _ends(text)
    said = {form for part in (*ends, *_numbers_in(ends)) for form in _comparable(part)}
    targets = {form for answer in question.answers for form in _comparable(answer)}
    phrases = [form for form in said if isinstance(form, str)]
    quoted = any(target in phrase for target in targets if isinstance(target, str) for phrase in phrases)
    return Grade(float(quoted or not said.isdisjoint(targets)), text.strip(_MARKS) != "", text.strip())


def _ends(text: str) -> list[str]:
    """The ends of lines behind what leads to an answer, an equals sign in the last line; all of it if nothing does."""
    whole = text.strip().strip(".").lower()
    *others, last = whole.split("\n")
    ends = [_end(line, _LEADS) for line in others] + [_end(last, (*_LEADS, "="))]
    return [end for end in ends if end not in ("", *":,.!?;'")] or [whole]


def _end(line: str, leads: Sequence[str]) -> str:
    """The shortest that stands behind one of `leads`, of which one with nothing behind it voids those before it."""
    shortest = ""
    for lead in leads:
        _, found, end = line.rpartition(lead)
        if found and (not shortest or len(end.strip()) < len(shortest)):
            shortest = end.strip()
    return shortest


def _numbers_in(parts: Sequence[str]) -> list[str]:
    return [number for part in parts for pattern in _NUMBERS for number in re.findall(pattern, part)]


def _comparable(text: str) -> list[float | str]:
    """A number to two decimals, or words; a letter with a blank on either side, lest it be found in every word."""
    bare = text.strip().lower()
    try:
        return [round(float(bare.replace(",", "")), 2)]
    except ValueError:
        return [f" {bare}", f"{bare} "] if len(bare) == 1 else [bare]


def yes_or_no(text: str) -> str:
    """What an answer says in its first letters, as MME reads it; empty if neither."""
    said = text.lower().strip().replace(".", "")
    if len(said) == 1:
        return {"y": "yes", "n": "no"}.get(said, "")
    return "yes" if "yes" in said[:4] else "no" if "no" in said[:4] else ""


def _begins_with(text: str, question: Question) -> Grade:
    said = yes_or_no(text)
    return Grade(float(said == question.answers[0].lower()), said != "", said)


def _denied_or_not(text: str, question: Question) -> Grade:
    """POPE's rule: a first sentence with "no" or "not" means no, and everything else means yes.

    lmms-eval reads answers of the one word alike, but takes all others for wrong and leaves them out of recall.
    """
    words = text.strip().split(".")[0].replace(",", "").split(" ")
    said = "no" if {"No", "not", "no"} & set(words) else "yes"
    return Grade(float(said == question.answers[0].lower()), text.lower().strip() in ("yes", "no"), said)


def _pope(questions: Sequence[Question], grades: Sequence[Grade], weights: Array) -> dict[str, Array]:
    """F1 of saying yes, and what it is made of."""
    right = np.array([grade.score for grade in grades])
    said_yes = np.array([grade.read == "yes" for grade in grades], dtype=float)
    is_yes = np.array([question.answers[0].lower() == "yes" for question in questions], dtype=float)
    kinds = (said_yes * is_yes, said_yes * (1 - is_yes), (1 - said_yes) * is_yes)
    hits, alarms, misses = (weights @ kind for kind in kinds)
    return {
        "F1": _ratio(2 * hits, 2 * hits + alarms + misses),
        "accuracy": mean(right, weights),
        "precision": _ratio(hits, hits + alarms),
        "recall": _ratio(hits, hits + misses),
        "said yes": mean(said_yes, weights),
    }


def _ratio(part: Array, whole: Array) -> Array:
    return np.divide(part, whole, out=np.zeros(whole.shape), where=whole > 0)


def _mme(questions: Sequence[Question], grades: Sequence[Grade], weights: Array) -> dict[str, Array]:
    """Per category accuracy plus accuracy+, the share of images with every question right, in points; their sums."""
    right = np.array([grade.score for grade in grades])
    of_image: dict[tuple[str, str], list[int]] = {}
    for number, question in enumerate(questions):
        of_image.setdefault((question.category, question.cluster), []).append(number)
    both = np.empty_like(right)
    for numbers in of_image.values():
        both[numbers] = right[numbers].min()
    totals = {name: np.zeros(len(weights)) for name in ("MME score", "perception", "cognition")}
    for category in sorted({question.category for question in questions}):
        here = np.array([question.category == category for question in questions], dtype=float) * weights
        # Resampling can leave a small category empty, which then scores nothing.
        points = np.nan_to_num(100 * (mean(right, here) + mean(both, here)))
        totals["MME score"] += points
        totals["cognition" if category in COGNITION else "perception"] += points
    return totals


COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")

VQA = vqa_accuracy(normal.vqa)
EVALAI = vqa_accuracy(normal.evalai)
EXACT = mean_scorer("exact match", _exact, invalid="empty once punctuation is gone")
EXACT_OR_EQUAL = mean_scorer("exact match", _exact_or_equal, invalid="empty once punctuation is gone")
ANLS = replace(mean_scorer("ANLS", _anls), require=_anls_score)
RELAXED = mean_scorer("relaxed accuracy", _relaxed)
CONTAINS = mean_scorer("accuracy", _contains)
CHOICE = mean_scorer("accuracy", _multiple_choice, invalid="no letter of a choice, nor the text of one")
POPE = Scorer("F1", _denied_or_not, _pope, invalid="neither yes nor no alone, though read as one of them")
MME = Scorer("MME score", _begins_with, _mme, unit=1.0, invalid="neither yes nor no among the first four letters")
