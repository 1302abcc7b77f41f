"""Settings of all tests."""

from __future__ import annotations

import torch
from hypothesis import settings

torch.set_num_threads(1)  # everything here is so small that threads only cost
settings.register_profile("mmcompress", deadline=None, derandomize=True)  # no test is about time or luck
settings.load_profile("mmcompress")
