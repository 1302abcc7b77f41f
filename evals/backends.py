"""What an evaluation asks of an engine that answers in place of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Console

from mmcompress.evals.answers import Answers
from mmcompress.evals.record import Asked
from mmcompress.evals.runner import Run
from mmcompress.integrations.hf.capability import Capability
from mmcompress.spec import CompressionConfig

if TYPE_CHECKING:
    from mmcompress.evals.comparison import Terms


class Backend(Protocol):
    """An engine that answers in place of transformers."""

    @property
    def conditions(self) -> dict[str, Any]:
        """What answers depend on, beside the model and the questions."""

    @property
    def device(self) -> str:
        """Where it runs."""

    def capability(self, model: Any, name: str) -> Capability:
        """What comes of a method on `model`."""

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
        """Answer what no run has answered yet."""
