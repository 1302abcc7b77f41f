"""What releases of transformers call by different names."""

from __future__ import annotations

import inspect

from transformers.masking_utils import create_causal_mask

CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"
"""The argument that holds the cache: `cache` from 5.24 on."""
