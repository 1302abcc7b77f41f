"""Answers of transformers to tasks of lmms-eval, which reads the questions, words the prompts and scores."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers
from rich.console import Console

from mmcompress.errors import UnsupportedError
from mmcompress.evals.answers import Answers, Key
from mmcompress.evals.backend_hf import HF
from mmcompress.evals.backends import Terms, lacking, prepare
from mmcompress.evals.progress import counting
from mmcompress.evals.record import Asked
from mmcompress.evals.runner import Run, Spent, batches, configure, warm_up
from mmcompress.integrations.hf import wrap

if TYPE_CHECKING:
    from mmcompress.evals.lmms.tasks import Task


@dataclass(frozen=True)
class LMMS(HF):
    """The model itself, run after run; several processes share the batches."""

    tasks: Mapping[str, Task]
    name = "lmms"

    @classmethod
    def load(cls, names: Sequence[str], folder: Path) -> LMMS:
        """The tasks of these names, those of the user's own in `folder`.

        Raises:
            UnsupportedError: lmms-eval is not installed, or a task cannot be asked or scored here.
            SpecError: there is no such task.
            InputError: a task's dataset cannot be read.
        """
        if importlib.util.find_spec("lmms_eval") is None:
            raise UnsupportedError('--backend lmms needs lmms-eval: pip install "mmcompress[lmms]".')
        from mmcompress.evals.lmms.tasks import load

        return cls(load(list(names), folder))

    @property
    def conditions(self) -> dict[str, Any]:
        """What answers depend on, beside the model and the questions."""
        settings = {f"generation of {name}": task.settings for name, task in self.tasks.items()}
        return {"backend": self.name, "lmms_eval": version("lmms_eval"), **settings}

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
        from mmcompress.evals.lmms.asking import answer
        from mmcompress.evals.lmms.documents import encode

        number, count = terms.processes.number, terms.processes.count
        dealt = [(asked, batch) for asked in suites for batch in batches(asked.questions, terms.batch_size)]
        work = [(run, lacking(run, dealt[number::count], answers)) for run in runs]
        warm = False
        with counting(console, transient=True, hidden=number > 0) as progress:
            total = sum(len(questions) for _, parts in work for _, questions in parts)
            task = progress.add_task("answering", total=total)
            for run, parts in work:
                if not parts:
                    continue
                with wrap(model, configure(*run)) as handle:
                    for asked, questions in parts:
                        ready, inputs, _ = prepare(model, processor, questions, encode)
                        progress.advance(task, len(questions))
                        if not ready:
                            continue
                        if not warm:
                            warm_up(model, inputs, asked.max_new_tokens)
                            warm = True
                        transformers.set_seed(terms.seed)
                        texts, _ = answer(model, processor, inputs, self.tasks[asked.label].settings)
                        assert handle.stats is not None  # every question has an image
                        keys = [Key.of(asked.label, question.id, run) for question in ready]
                        answers.add(zip(keys, texts, Spent.rows(handle.stats), strict=True))
