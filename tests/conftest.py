"""Settings of all tests."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch
from hypothesis import settings

torch.set_num_threads(1)  # everything here is so small that threads only cost
settings.register_profile("mmcompress", deadline=None, derandomize=True)  # no test is about time or luck
settings.load_profile("mmcompress")

# `tests` is on the path, where the folder `vllm` passes for a package of that name; only the real one has a file.
_vllm = find_spec("vllm")
collect_ignore = [] if _vllm and _vllm.origin else ["vllm"]

# Where there is no GPU kernels run in Triton's interpreter, chosen when transformers first imports triton.
if collect_ignore and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
