"""Every Triton kernel compiled to machine code for a GPU that need not be there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = """
import importlib
from pathlib import Path

import torch
import triton
from kernel_calls import BY_DTYPE, BY_HEAD_SIZE, OTHERS
from mmcompress import ops
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

SHARED_MEMORY = 227 * 1024

class Driver:
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device=None: 0)

def compile_only(self, *args, grid, warmup, **kwargs):
    kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
    assert kernel.metadata.shared <= SHARED_MEMORY, (self.__name__, kernel.metadata.shared)
    compiled.add(self.__module__ + "." + self.__name__)

launch, compiled = JITFunction.run, set()
triton.runtime.driver.set_active(Driver())
JITFunction.run = compile_only
found = {name: importlib.import_module(f"mmcompress.kernels.{path.parent.name}.triton")
         for path in Path(ops.__file__).parents[1].glob("kernels/*/naive.py")
         for name in ops.__all__ if hasattr(importlib.import_module(f"mmcompress.kernels.{path.parent.name}"), name)}
sizes = [(128, torch.bfloat16), (80, torch.float32)]
calls = [make(*size) for make in BY_HEAD_SIZE.values() for size in sizes]
calls += [make(torch.bfloat16) for make in BY_DTYPE.values()] + [make() for make in OTHERS.values()]
for name, arguments in calls:
    getattr(found[name], name)(*arguments)
print(len(compiled), sorted(set(ops.__all__) - {name for name, _ in calls}))
"""


@pytest.mark.slow
def test_kernels_compile_for_sm_90_within_its_shared_memory(tmp_path: Path) -> None:
    tests = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": f"{tests}:{tests.parent}", "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    count, missing = done.stdout.split(maxsplit=1)
    assert int(count) >= 16 and missing.strip() == "[]"
