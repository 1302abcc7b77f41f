"""What only `generate` knows of a prompt: where it ends, and whether it arrives in pieces."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Mapping
from typing import Any

from mmcompress.errors import UnsupportedError

FEATURE_INPUTS = ("pixel_values", "pixel_values_videos")
_DRAFTS = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit")
_LENGTHS = ("attention_mask", "input_ids", "inputs", "inputs_embeds")  # the first that is given tells it


class _Local(threading.local):
    """What one thread is generating."""

    def __init__(self) -> None:
        self.prompt: int | None = None


def cache_asked(model: Any) -> str:
    """The kind of cache that the model's generation_config asks for; "dynamic" if it asks for none."""
    return getattr(getattr(model, "generation_config", None), "cache_implementation", None) or "dynamic"


class Generation:
    """Watches a model's `generate`.

    Without a cache and in assisted decoding, forward passes read what was said after the prompt together with it, but
    what is removed from the prompt must not depend on that.

    Args:
        model: whose.
        refuses_drafts: who cannot have drafted tokens read together with the prompt; "" if that does no harm.
    """

    def __init__(self, model: Any, refuses_drafts: str = "") -> None:
        self._model = model
        self._refuses_drafts = refuses_drafts
        self._local = _Local()
        self._before = vars(model).get("generate")
        if hasattr(model, "generate"):
            model.generate = self._watch(model.generate)

    def remove(self) -> None:
        """Give the model its own method back."""
        vars(self._model).pop("generate", None)
        if self._before is not None:
            self._model.generate = self._before

    def said(self, tokens: int) -> int:
        """How many of a sequence of `tokens` came after the prompt that this thread's `generate` was given."""
        return 0 if self._local.prompt is None else max(tokens - self._local.prompt, 0)

    def _watch(self, generate: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(generate)

        @functools.wraps(generate)
        def watched(*args: Any, **kwargs: Any) -> Any:
            call = signature.bind(*args, **kwargs).arguments
            call |= call.pop("kwargs", {})
            length = next((call[name].shape[1] for name in _LENGTHS if call.get(name) is not None), None)
            self._refuse_pieces(call, length)
            self._refuse_drafts(call)
            outer, self._local.prompt = self._local.prompt, length
            try:
                return generate(*args, **kwargs)
            finally:
                self._local.prompt = outer

        return watched

    def _refuse_drafts(self, call: Mapping[str, Any]) -> None:
        config = call.get("generation_config") or self._model.generation_config
        asked = [name for name in _DRAFTS if (call.get(name) or getattr(config, name, None)) is not None]
        if asked and self._refuses_drafts:
            raise UnsupportedError(
                f"{self._refuses_drafts} changes what is held behind the prompt, but assisted decoding reads drafted "
                f"tokens together with it; leave {asked[0]} out."
            )

    def _refuse_pieces(self, call: Mapping[str, Any], length: int | None) -> None:
        config = call.get("generation_config") or self._model.generation_config
        size = call.get("prefill_chunk_size", config.prefill_chunk_size)
        visual = any(call.get(name) is not None for name in (*FEATURE_INPUTS, "mm_encoder_outputs"))
        if visual and size is not None and length is not None and size < length:
            raise UnsupportedError(
                f"prefill_chunk_size={size} would read a prompt of {length} tokens in pieces, but it must arrive in "
                "one piece: what is kept of an image may depend on all of it. Leave prefill_chunk_size out."
            )


__all__ = ["FEATURE_INPUTS", "Generation", "cache_asked"]
