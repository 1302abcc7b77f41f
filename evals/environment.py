"""Where and with what numbers were made."""

from __future__ import annotations

import platform
import shlex
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import mmcompress


def environment() -> dict[str, Any]:
    """Where and with what the numbers were made."""
    return {
        "mmcompress": mmcompress.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "command": shlex.join(["mmcompress", *sys.argv[1:]]),
    }


def bench_environment(module: str, device: str) -> dict[str, Any]:
    """The same for benchmark `module` on "cpu" or "cuda"."""
    return environment() | {
        "device": device_name(torch.device(device)),
        "command": f"python -m mmcompress.evals.bench.{module} {shlex.join(sys.argv[1:])}",
    }


def model_facts(model: Any) -> dict[str, str]:
    """Where a model is, and what it computes in."""
    return {"device": device_name(model.device), "dtype": str(model.dtype)}


def device_name(device: torch.device) -> str:
    """What the maker calls a GPU; a CPU has a fact of its own."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def cpu_name() -> str:
    """The processor's name, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()
