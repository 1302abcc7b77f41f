"""Tasks of lmms-eval by name: found, refused with a reason, or loaded as suites."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmms_eval.api.task import ConfigurableMessagesTask
from lmms_eval.tasks import TaskManager
from lmms_eval.utils import load_yaml_config
from loguru import logger

from mmcompress.errors import InputError, SpecError, UnsupportedError
from mmcompress.evals.lmms import documents, scoring
from mmcompress.evals.lmms.asking import MAX_NEW_TOKENS
from mmcompress.evals.lmms.judges import main_metric
from mmcompress.evals.suites.base import Problem, Question, Scorer

MODEL = "mmcompress"
"""By which tasks choose prompts and settings for a model."""

_OUTPUTS = {
    "loglikelihood": "compares likelihoods",
    "multiple_choice": "compares likelihoods",
    "generate_until_multi_round": "asks in several rounds",
    "generate_until_agentic": "asks in several rounds",
    "generate_visual_cot": "asks for images",
}


@dataclass(frozen=True)
class Task:
    """A loaded task."""

    name: str
    loaded: Any
    scorer: Scorer

    @property
    def settings(self) -> dict[str, Any]:
        """Of generation."""
        return dict(self.loaded.config.generation_kwargs)

    @property
    def max_new_tokens(self) -> int:
        """The longest answer."""
        return int(self.settings.get("max_new_tokens", MAX_NEW_TOKENS))

    def read(self) -> tuple[list[Question], list[Problem]]:
        """All questions, and the documents that are none.

        Raises:
            UnsupportedError: they have videos or sound.
            InputError: not one can be asked.
        """
        return documents.read(self.name, self.loaded)


def load(names: list[str], folder: Path) -> dict[str, Task]:
    """The tasks of these names, those of the user's own in `folder`.

    Raises:
        SpecError: there is no such task.
        UnsupportedError: it cannot be asked or scored here.
        InputError: its dataset cannot be read.
    """
    logger.disable("")  # lmms-eval and its tasks tell at length what they do
    try:
        manager = TaskManager(include_path=str(folder), model_name=MODEL)
    except Exception as error:
        raise InputError(f"--data {folder} has a yaml file that is no task: {scoring.cause(error)}") from error
    configs = {name: _config(name, manager) for name in names}
    metrics = {name: _metric(name, config) for name, config in configs.items()}
    return {name: _load(name, configs[name], metric) for name, metric in metrics.items()}


def _config(name: str, manager: TaskManager) -> dict[str, Any]:
    """What a task's file says.

    Raises:
        SpecError: there is none of that name.
        UnsupportedError: it is a group, or lacks something.
    """
    if name not in manager.task_index:
        nearest = difflib.get_close_matches(name, manager.all_subtasks, n=5, cutoff=0.5)
        hint = f"the nearest are {', '.join(nearest)}" if nearest else "none has a name like it"
        raise SpecError(
            f"lmms-eval has no task {name!r}; {hint}. `lmms_eval --tasks list` lists all; --data names a folder with "
            "tasks of your own."
        )
    entry = manager.task_index[name]
    try:
        config = {} if entry["yaml_path"] == -1 else load_yaml_config(entry["yaml_path"], mode="full")
    except Exception as error:  # its functions are imported
        raise UnsupportedError(f"task {name} cannot be loaded: {scoring.cause(error)}") from error
    if entry["type"] in ("group", "tag"):
        parts = config["task"] if config else entry["task"]
        names = ", ".join(part if isinstance(part, str) else part["task"] for part in parts)
        raise UnsupportedError(f"{name} is a group of tasks: give those that you mean of {names}.")
    if "class" in config:
        raise UnsupportedError(f"task {name} is a program of its own, not a yaml file with prompts and metrics.")
    return config


def _metric(name: str, config: Mapping[str, Any]) -> str:
    """The metric of a task that can be asked; nothing has been downloaded yet.

    Raises:
        UnsupportedError: it cannot.
    """
    output = config.get("output_type", "generate_until")
    if output != "generate_until":
        raise UnsupportedError(f"task {name} {_OUTPUTS.get(output, output)}; mmcompress generates one answer.")
    if config.get("repeats", 1) != 1:
        raise UnsupportedError(f"task {name} asks each question {config['repeats']} times; mmcompress asks it once.")
    if {"video", "From_YouTube"} & set(config.get("dataset_kwargs") or {}):
        raise UnsupportedError(f"task {name} has videos; mmcompress asks about images.")
    return main_metric(name, config)


def _load(name: str, config: dict[str, Any], metric: str) -> Task:
    try:
        loaded = ConfigurableMessagesTask(config=config, model_name=MODEL)
    except Exception as error:
        raise InputError(
            f"task {name}: its dataset {config.get('dataset_path')} cannot be read ({scoring.cause(error)}). It is "
            "looked for in the cache of Hugging Face ($HF_HOME, by default ~/.cache/huggingface) and else downloaded: "
            "let this machine reach huggingface.co, with HF_HUB_OFFLINE and HF_DATASETS_OFFLINE unset, or fill the "
            "cache on one that does and copy it here."
        ) from error
    return Task(name, loaded, scoring.scorer(name, loaded, metric))
