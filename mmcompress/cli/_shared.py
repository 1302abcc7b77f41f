"""What several commands need: budgets, models, and how errors look."""

from __future__ import annotations

import re
from typing import Any

from rich.console import Console
from rich.markup import escape

from mmcompress.errors import SpecError
from mmcompress.evals.micro import DEFAULT_MODEL

MODEL_HELP = f"A Hugging Face folder or hub name; '{DEFAULT_MODEL}' is the model inside the package."


def complain(what: str, message: str) -> None:
    line = f"[bold red]{what}:[/] [red]{escape(' '.join(message.split()))}[/]"
    Console(stderr=True, soft_wrap=True).print(line, highlight=False)


def parse_keep(text: str | None) -> int | float | None:
    """The budget as written: digits alone are a count, everything else must be a fraction."""
    if text is None:
        return None
    try:
        return int(text) if re.fullmatch(r"[+-]?\d+", text.strip()) else float(text)
    except ValueError:
        raise SpecError(f"--keep {text!r} is no number: write a fraction such as 0.25 or a count such as 36.") from None


def quieten() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def load_model(name: str, device: str | None = None) -> tuple[Any, Any]:
    """A supported model and its processor, on `device` or else on the GPU if there is one.

    Raises:
        UnsupportedError: it cannot be loaded, or its family is not supported.
    """
    quieten()
    from mmcompress.evals import loading

    return loading.load_model(name, device)
