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
_without_vllm = not (_vllm and _vllm.origin)

# Each engine with an environment of its own is tested there alone.
collect_ignore = [*(["vllm"] if _without_vllm else []), *(["lmms"] if find_spec("lmms_eval") is None else [])]

# Where there is no GPU kernels run in Triton's interpreter, chosen when transformers first imports triton.
if _without_vllm and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
