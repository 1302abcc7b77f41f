"""What an evaluation asks of the engine that answers, and what all engines need to ask questions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from rich.console import Console

from mmcompress.errors import InputError
from mmcompress.evals.answers import Answers, Key
from mmcompress.evals.processes import ALONE, Processes
from mmcompress.evals.record import Asked
from mmcompress.evals.runner import Run, encode
from mmcompress.evals.suites.base import Problem, Question
from mmcompress.integrations.hf.capability import Capability
from mmcompress.spec import CompressionConfig


@dataclass(frozen=True)
class Terms:
    """How questions are asked.

    Args:
        model: its name.
        seed: draws questions, resamples images, and seeds what is random in answering.
        limit: ask no more than this many questions of a suite, but all about the images drawn.
        batch_size: questions asked at once.
        processes: who asks.
    """

    model: str
    seed: int = 0
    limit: int | None = None
    batch_size: int = 64
    processes: Processes = ALONE


class Backend(Protocol):
    """An engine that answers. `model` is always the model of transformers, whoever answers."""

    @property
    def conditions(self) -> dict[str, Any]:
        """What answers depend on, beside the model and the questions."""

    def place(self, processes: Processes) -> str | None:
        """Where `model` is to be; None for the GPU if there is one.

        Raises:
            SpecError: these processes cannot share the work.
        """

    def facts(self, model: Any) -> dict[str, Any]:
        """What is told of where answers come from."""

    def capability(self, model: Any, name: str) -> Capability:
        """What comes of a method on `model`, with the fewest options that it needs."""

    def check(self, model: Any, config: CompressionConfig) -> None:
        """Raise an `MMCompressError` if `config` cannot be carried out on `model`."""

    def ask_all(
        self,
        model: Any,
        processor: Any,
        suites: Sequence[Asked],
        runs: Sequence[Run],
        terms: Terms,
        answers: Answers,
        console: Console,
    ) -> None:
        """Answer what no run has answered yet.

        Raises:
            UnsupportedError: a run is not possible.
        """


def lacking(
    run: Run, parts: Sequence[tuple[Asked, Sequence[Question]]], answers: Answers
) -> list[tuple[Asked, list[Question]]]:
    """The questions of every part of a suite that `run` has not answered, where there are any."""
    found = [
        (asked, [question for question in questions if Key.of(asked.label, question.id, run) not in answers])
        for asked, questions in parts
    ]
    return [(asked, questions) for asked, questions in found if questions]


def prepare(
    model: Any, processor: Any, batch: Sequence[Question], encode: Callable[..., Any] = encode
) -> tuple[list[Question], Any, list[Problem]]:
    """The questions of a batch that can be asked, the model's inputs for them, and why others cannot."""
    pictures, ready, problems = {}, [], []
    for question in batch:
        try:
            for picture in question.images:
                if picture not in pictures:
                    pictures[picture] = picture.open()
            ready.append(question)
        except InputError as error:
            problems.append(Problem(f"question {question.id}", str(error)))
    try:
        return ready, encode(model, processor, ready, pictures) if ready else None, problems
    except InputError as error:
        if len(batch) == 1:
            return [], None, [Problem(f"question {batch[0].id}", str(error))]
        alone = [prepare(model, processor, [question], encode) for question in ready]
        fine = [question for questions, _, _ in alone for question in questions]
        if len(fine) == len(batch):
            raise  # what can be asked alone must not fail together
    ready, inputs, _ = prepare(model, processor, fine, encode)
    return ready, inputs, problems + [problem for _, _, found in alone for problem in found]
