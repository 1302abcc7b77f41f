"""This process among those that `accelerate launch` started together."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

from mmcompress.errors import UnsupportedError


@dataclass(frozen=True)
class Processes:
    """The number of this process, how many there are, its device, and a way to wait for the others."""

    number: int
    count: int
    device: str | None
    wait: Callable[[], None]


ALONE = Processes(0, 1, None, lambda: None)


def processes() -> Processes:
    """Join the others, if there are any; `device` is None for one alone.

    Raises:
        UnsupportedError: there are others, but accelerate is not installed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return ALONE
    try:
        from accelerate import PartialState
    except ImportError as error:
        raise UnsupportedError(f"several processes need accelerate: pip install accelerate ({error})") from error
    import torch

    # One process may have hours more to do than another.
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=7))
    return Processes(state.process_index, state.num_processes, str(state.device), state.wait_for_everyone)
