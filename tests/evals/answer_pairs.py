"""Answers and right answers drawn at random: what scorers and lmms-eval are compared on. Plain Python, no packages."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from random import Random
from typing import Any

COUNT = 500
SEED = 20261125

Pair = dict[str, Any]
"""`text` is said, `answers` are right; `choices` and `category` where the metric has them."""

_NOUNS = ("dog", "red car", "street sign", "o'clock", "New York", "ice-cream", "T-shirt", "mother's day", "49ers", "tv")
_DETAILS = (
    "the {}",
    "a {}",
    "two {}s",
    "{} (left)",
    "{}/cup",
    "{}'s",
    "{}, and 3",
    "dont know {}",
    "none",
    "10,000 {}",
)
_MARKS = (".", "!", "?", ",", ";", " -", '"', "...")
_TYPES = ("Regular Text Recognition", "Scene Text-centric VQA", "Handwritten Mathematical Expression Recognition")
_FULL_WIDTH = "\uff2e\uff45\uff57\u3000\uff39\uff4f\uff52\uff4b"  # New York
_CATEGORIES = ("color", "OCR", "numerical_calculation", "code_reasoning")


def pairs(metric: str) -> list[Pair]:
    """The `COUNT` pairs of a metric, always the same."""
    random = Random(f"{SEED} {metric}")
    return [METRICS[metric](random, number) for number in range(COUNT)]


def digest() -> str:
    """Changes whenever a pair does."""
    return hashlib.sha256(json.dumps([pairs(metric) for metric in METRICS]).encode()).hexdigest()


def _phrase(random: Random) -> str:
    noun = random.choice(_NOUNS)
    return random.choice(_DETAILS).format(noun) if random.random() < 0.5 else noun


def _said_otherwise(random: Random, text: str) -> str:
    """The same in other words, or nearly: case, articles, marks, contractions, number words, a slip of the pen."""
    changes: tuple[Callable[[str], str], ...] = (
        str.upper,
        str.title,
        lambda words: f"The {words}",
        lambda words: words + random.choice(_MARKS),
        lambda words: words.replace("'", ""),
        lambda words: words.replace("two", "2").replace("none", "0"),
        lambda words: words.replace("-", " "),
        lambda words: words.replace(" ", "\n", 1),
        lambda words: words[1:] if len(words) > 2 else words,
        lambda words: words,
    )
    for _ in range(random.randrange(3)):
        text = random.choice(changes)(text)
    return text.strip()


def _annotated(random: Random, number: int) -> Pair:
    known = [_phrase(random) for _ in range(random.randint(1, 4))]
    answers = [_said_otherwise(random, random.choice(known)) for _ in range(10)]
    said = random.choice(answers) if random.random() < 0.8 else _phrase(random)
    return {"text": _said_otherwise(random, said), "answers": answers}


def _phrased(random: Random, number: int) -> Pair:
    answer = _phrase(random)
    return {"text": _said_otherwise(random, answer), "answers": [answer]}


def _one_line(random: Random, number: int) -> Pair:
    """Without runs of blanks, which anls-star takes out before it measures a length, and lmms-eval after."""
    answers = [_phrase(random) for _ in range(random.randint(1, 3))]
    said = _said_otherwise(random, random.choice(answers)) if random.random() < 0.8 else _phrase(random)
    return {"text": " ".join(said.split()), "answers": answers}


def _numeric(random: Random, number: int) -> Pair:
    value = random.choice((random.randint(0, 300), round(random.uniform(-2, 90), random.randint(1, 3))))
    near = value * random.choice((1, 1.02, 0.96, 1.05, 0.95, 1.051, 1.2))
    ending = random.choice(("", "", "%"))
    texts = (
        f"{near:g}{ending}",
        f"{near:g}",
        str(value),
        f"about {value}",
        f"{value:,}",
        "Yes",
        "no",
        f"{value}{ending}",
    )
    answers = (f"{value}{ending}", "Yes", "No", f"{value}")
    return {"text": random.choice(texts), "answers": [random.choice(answers)]}


def _written(random: Random, number: int) -> Pair:
    category = random.choice(_TYPES)
    formula = category == _TYPES[-1]
    answer = random.choice(("x ^ { 2 }", r"\frac { a } { B }", "y = 3 z")) if formula else _phrase(random)
    said = _said_otherwise(random, answer)
    text = random.choice((said, f"It says {said} here", answer.replace(" ", ""), answer, _FULL_WIDTH))
    return {"text": text, "answers": [answer, _phrase(random)], "category": category}


def _spoken(random: Random) -> str:
    said = (
        "Yes",
        "no",
        "Yes.",
        "No, it is not.",
        "yes, there is a dog",
        "Y",
        "n",
        "",
        "maybe",
        "There is none",
        "not sure",
        "YES",
    )
    return random.choice(said)


def _yes_or_no(random: Random, number: int) -> Pair:
    """The word alone: of all else, lmms-eval makes no answer, and POPE's own script one of the two."""
    return {"text": random.choice(("Yes", "yes", "YES", "No", "no")), "answers": [random.choice(("yes", "no"))]}


def _twice_asked(random: Random, number: int) -> Pair:
    """Two questions about every picture."""
    category = _CATEGORIES[number // 2 % len(_CATEGORIES)]
    return {"text": _spoken(random), "answers": [("yes", "no")[number % 2]], "category": category}


def _short_choice(random: Random, number: int) -> Pair:
    """In the forms that are asked for: the letter, also with its text."""
    choices = random.sample(_NOUNS, random.randint(2, 5))
    chosen = random.randrange(len(choices))
    letter = "ABCDE"[chosen]
    text = random.choice((letter, f"{letter}.", f"{letter}. {choices[chosen]}"))
    return {"text": text, "answers": ["ABCDE"[random.randrange(len(choices))]], "choices": choices}


def _choice_or_open(random: Random, number: int) -> Pair:
    return (_choice if random.random() < 0.5 else _open)(random, number)


def _open(random: Random, number: int) -> Pair:
    """Numbers and words, nearly right ones too, in sentences, equations and several lines."""
    value = random.choice((random.randint(-20, 3000), round(random.uniform(-2, 90), random.randint(1, 4))))
    near = random.choice((value, value, -value, value * 10, round(value, 2), round(value, 1)))
    noun = random.choice((*_NOUNS, "x", "24/7"))
    said = random.choice((str(near), f"{near:,}", f"{near:.2f}", f"{near:.2e}", noun, noun.upper()))
    forms = (
        "{}",
        "{}.",
        "about {} cm",
        "The answer is {}",
        "So it could be {}. It is large.",
        "x = 2 * 3 = {}",
        "y = {}\nthe rest",
        "First, it is 7.\nThus the final result is: {}.",
        "so it is \n{}",
        "Answer: {}, therefore ?",
        "the result is .",
        "",
    )
    answers = random.sample((str(value), f"{value:,}", noun, random.choice(_NOUNS), "7"), random.randint(1, 2))
    return {"text": random.choice(forms).format(said), "answers": answers}


def _choice(random: Random, number: int) -> Pair:
    """Without those where lmms-eval finds no letter, and takes one at random."""
    choices = random.sample(_NOUNS, random.randint(2, 5))
    chosen = random.randrange(len(choices))
    letter, words = "ABCDE"[chosen], choices[chosen]
    forms = (
        "{l}",
        "({l})",
        "{l}.",
        "{l}. {w}",
        "The answer is {l}.",
        "Answer: {l}",
        "({l}) {w}",
        "It must be {l}",
    )
    text = random.choice(forms).format(l=letter, w=words)
    return {"text": text, "answers": ["ABCDE"[random.randrange(len(choices))]], "choices": choices}


METRICS: dict[str, Callable[[Random, int], Pair]] = {
    "vqav2": _annotated,
    "textvqa": _annotated,
    "vizwiz": _annotated,
    "gqa": _phrased,
    "docvqa": _one_line,
    "chartqa": _numeric,
    "ocrbench": _written,
    "pope": _yes_or_no,
    "mme": _twice_asked,
    "scienceqa": _short_choice,
    "seed": _short_choice,
    "ai2d": _short_choice,
    "mmmu": _choice_or_open,
}
