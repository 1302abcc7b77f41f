"""Answers of transformers, compressed by `wrap`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import transformers
from rich.console import Console

from mmcompress.evals.answers import Answers, Key
from mmcompress.evals.backends import Terms, prepare
from mmcompress.evals.environment import model_facts
from mmcompress.evals.processes import Processes
from mmcompress.evals.progress import counting
from mmcompress.evals.record import Asked
from mmcompress.evals.runner import Run, ask, batches, warm_up
from mmcompress.evals.suites.base import Question
from mmcompress.integrations.hf import wrap
from mmcompress.integrations.hf.capability import Capability, workable
from mmcompress.spec import CompressionConfig


@dataclass(frozen=True)
class HF:
    """The model itself; several processes share the batches."""

    name = "hf"

    @property
    def conditions(self) -> dict[str, Any]:
        """What answers depend on, beside the model and the questions."""
        return {"backend": self.name}

    def place(self, processes: Processes) -> str | None:
        """The device of this process."""
        return processes.device

    def facts(self, model: Any) -> dict[str, Any]:
        """What is told of where answers come from."""
        return model_facts(model) | self.conditions

    def capability(self, model: Any, name: str) -> Capability:
        """What comes of a method on `model`, with the fewest options that it needs."""
        return workable(model, name)

    def check(self, model: Any, config: CompressionConfig) -> None:
        """Whether `config` can be applied to `model`.

        Raises:
            MMCompressError: it cannot.
        """
        wrap(model, config).unwrap()

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
        """Answer what no run has answered yet of the batches that are this process's."""
        number, count = terms.processes.number, terms.processes.count
        dealt = [(asked, batch) for asked in suites for batch in batches(asked.questions, terms.batch_size)]
        work = [
            (asked, questions, lacking)
            for asked, batch in dealt[number::count]
            for questions, lacking in _missing(asked.label, batch, runs, answers)
        ]
        warm = False
        with counting(console, transient=True, hidden=number > 0) as progress:
            total = sum(len(questions) * len(lacking) for _, questions, lacking in work)
            task = progress.add_task("answering", total=total)
            for asked, questions, lacking in work:
                ready, inputs, _ = prepare(model, processor, questions)
                progress.advance(task, (len(questions) - len(ready)) * len(lacking))
                if not ready:
                    continue
                transformers.set_seed(terms.seed)
                if not warm:
                    warm_up(model, inputs, asked.max_new_tokens)
                    warm = True
                with closing(ask(model, processor, inputs, lacking, asked.max_new_tokens)) as said:
                    for of_run, texts, spent in said:
                        keys = [Key.of(asked.label, question.id, lacking[of_run]) for question in ready]
                        answers.add(zip(keys, texts, spent, strict=True))
                        progress.advance(task, len(ready))


TRANSFORMERS = HF()


def _missing(
    label: str, batch: Sequence[Question], runs: Sequence[Run], answers: Answers
) -> list[tuple[list[Question], list[Run]]]:
    """Questions of a batch without an answer, with the runs that lack just these."""
    lacking: dict[tuple[Question, ...], list[Run]] = {}
    for run in runs:
        unanswered = tuple(question for question in batch if Key.of(label, question.id, run) not in answers)
        if unanswered:
            lacking.setdefault(unanswered, []).append(run)
    return [(list(questions), those) for questions, those in lacking.items()]
