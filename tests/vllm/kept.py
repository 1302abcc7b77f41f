"""What a compressed engine keeps, and the models that are compressed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import engine
from more_models import MORE_MODELS, save_more_model
from tiny_models import save_tiny_model
from vllm import LLM

from mmcompress.budget import Budget
from mmcompress.evals.micro import MODELS
from mmcompress.integrations.vllm.model import Compressed
from mmcompress.types import Selection, VisualItem


def make(name: str, folder: Path) -> Path:
    """The folder of an embedded model, or of a tiny one that is written to `folder` unless it is there."""
    if name in MODELS:
        return MODELS[name]
    if not (folder / "config.json").exists():
        (save_more_model if name in MORE_MODELS else save_tiny_model)(name, folder)
    return folder


@contextmanager
def compressed(folder: Path, method: str, **settings: Any) -> Iterator[LLM]:
    """An engine that compresses; `settings` are the engine's, but `keep_range` is the plugin's."""
    wanted = {"method": method, **{key: settings.pop(key) for key in ("keep_range",) if key in settings}}
    with engine.engine(folder, additional_config={"mmcompress": wanted}, **settings) as llm:
        yield llm


def model_of(llm: LLM) -> Any:
    """The model that an engine within this process runs."""
    return llm.apply_model(lambda model: model)[0]


@contextmanager
def selections() -> Iterator[list[tuple[int, Selection]]]:
    """While open, every selection is noted with the number of tokens it is made from."""
    noted: list[tuple[int, Selection]] = []
    select = Compressed._select

    def noting(self: Compressed, items: list[VisualItem], keep: Budget) -> list[Selection]:
        chosen = select(self, items, keep)
        noted.extend((len(item), selection) for item, selection in zip(items, chosen, strict=True))
        return chosen

    Compressed._select = noting  # type: ignore[method-assign]
    try:
        yield noted
    finally:
        Compressed._select = select  # type: ignore[method-assign]


def as_set(noted: Sequence[tuple[int, Selection]]) -> set[tuple[int, tuple[int, ...]]]:
    """Token counts and kept tokens, comparable whatever order and however often images were encoded."""
    return {(tokens, tuple(selection.anchor.tolist())) for tokens, selection in noted}
