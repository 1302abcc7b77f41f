"""Settings of vLLM, which it and what it imports read as they are imported."""

from __future__ import annotations

import os
from typing import Any

import pytest

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else the threads of all tests would be bound
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}


@pytest.fixture
def preempted(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The requests that an engine within this process has put off."""
    from vllm.v1.core.sched.scheduler import Scheduler

    noted: list[Any] = []
    preempt = Scheduler._preempt_request

    def noting(self: Scheduler, *args: Any, **kwargs: Any) -> Any:
        noted.append(args)
        return preempt(self, *args, **kwargs)

    monkeypatch.setattr(Scheduler, "_preempt_request", noting)
    return noted
