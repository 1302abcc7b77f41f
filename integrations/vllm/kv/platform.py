"""How the attention of KV policies is found by vLLM's CPU platform, which by itself knows its own alone."""

from __future__ import annotations

import functools
from typing import Any

BACKEND = "mmcompress.integrations.vllm.kv.backend.KVBackend"


def offer_backend() -> None:
    """Have the platform take it in engines with a KV policy; of no effect in others, and on other platforms."""
    try:
        from vllm.platforms.cpu import CpuPlatform
    except ImportError:  # another vLLM, which is none of our business unless a policy is asked for
        return
    stock = CpuPlatform.get_attn_backend_cls
    if hasattr(stock, "mmcompress"):
        return

    @functools.wraps(stock.__func__)
    def get_attn_backend_cls(cls: Any, selected_backend: Any, *args: Any, **kwargs: Any) -> str:
        if getattr(selected_backend, "name", None) == "CUSTOM" and _is_asked_for():
            return BACKEND
        return stock.__func__(cls, selected_backend, *args, **kwargs)

    get_attn_backend_cls.mmcompress = True  # type: ignore[attr-defined]
    CpuPlatform.get_attn_backend_cls = classmethod(get_attn_backend_cls)


def _is_asked_for() -> bool:
    from vllm.config import get_current_vllm_config

    from mmcompress.integrations.vllm.kv.engine import plan_of

    return plan_of(get_current_vllm_config()) is not None
