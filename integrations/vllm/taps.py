"""Statistics of vLLM's vision encoders, read from the queries and keys that pass through."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mmcompress.errors import UnsupportedError
from mmcompress.integrations.hf.taps import Taps


class EngineTaps(Taps):
    """Taps on the attention that all of vLLM's vision encoders share; nothing is asked of its backend."""

    def _tap(self, attention: nn.Module, layer: int, names: list[str]) -> None:
        from vllm.v1.attention.backends.registry import AttentionBackendEnum

        shape: Any = attention
        if shape.attn_backend == AttentionBackendEnum.FLASHINFER:
            raise UnsupportedError(
                "vision statistics cannot be read with FlashInfer; choose another --mm-encoder-attn-backend."
            )

        def before(
            module: nn.Module,
            args: tuple[Tensor, ...],
            kwargs: dict[str, Any],
        ) -> None:
            query, key = (
                _heads(kwargs[name] if name in kwargs else args[place], shape.head_size)
                for place, name in enumerate(("query", "key"))
            )
            self._collect(layer, names, query, key, shape.scale, kwargs.get("cu_seqlens"))

        self._hooks.append(attention.register_forward_pre_hook(before, with_kwargs=True))

    def _collect_features(self, hidden: Tensor) -> None:
        packed = hidden.dim() == 3 and hidden.shape[1] == 1  # Qwen's encoders hold [tokens, 1, width]
        super()._collect_features(hidden.transpose(0, 1) if packed else hidden)


def _heads(states: Tensor, head_size: int) -> Tensor:
    """`[batch, tokens, heads * dim]` or `[batch, tokens, heads, dim]` -> `[batch, heads, tokens, dim]` of all ranks."""
    from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_gather

    states = states.unflatten(-1, (-1, head_size)) if states.dim() == 3 else states
    if get_tensor_model_parallel_world_size() > 1:
        states = tensor_model_parallel_all_gather(states.contiguous(), dim=2)
    return states.transpose(1, 2)
