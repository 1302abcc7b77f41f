"""A CPU stand-in for the flash-attn kernels, plugged under transformers' own FlashAttention-2 dispatch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import transformers.modeling_flash_attention_utils as dispatch
from torch import Tensor, nn
from transformers import PretrainedConfig


@dataclass(frozen=True)
class FlashCall:
    """One kernel call: whether it was causal and the segment lengths of queries and keys."""

    kernel: str
    causal: bool
    query_lengths: tuple[int, ...]
    key_lengths: tuple[int, ...]


def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float | None, causal: bool) -> Tensor:
    """`[B, N, H, d]`, `[B, M, Hkv, d]` -> `[B, N, H, d]`, the causal triangle ending in the bottom-right corner."""
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        rows, columns = scores.shape[-2:]
        future = torch.ones(rows, columns, dtype=torch.bool).triu(1 + columns - rows)
        scores = scores.masked_fill(future, float("-inf"))
        # A query that sees no key answers zero, as the kernels do.
        return scores.softmax(-1).nan_to_num(0.0).matmul(value).transpose(1, 2)
    return scores.softmax(-1).matmul(value).transpose(1, 2)


def _require_plain(dropout_p: float, window_size: tuple[int, int], softcap: float) -> None:
    if dropout_p or tuple(window_size) != (-1, -1) or softcap:
        raise NotImplementedError("the stand-in has no dropout, sliding window or soft cap")


class Kernels:
    """The two kernels with flash-attn's signatures, which write down their calls."""

    def __init__(self) -> None:
        self.calls: list[FlashCall] = []

    def flash_attn_func(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        deterministic: bool = False,
    ) -> Tensor:
        _require_plain(dropout_p, window_size, softcap)
        self.calls.append(FlashCall("dense", causal, (q.shape[1],) * q.shape[0], (k.shape[1],) * k.shape[0]))
        return _attend(q, k, v, softmax_scale, causal)

    def flash_attn_varlen_func(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        deterministic: bool = False,
    ) -> Tensor:
        _require_plain(dropout_p, window_size, softcap)
        lengths = [cu.diff().tolist() for cu in (cu_seqlens_q, cu_seqlens_k)]
        self.calls.append(FlashCall("varlen", causal, tuple(lengths[0]), tuple(lengths[1])))
        segments = zip(q.split(lengths[0]), k.split(lengths[1]), v.split(lengths[1]), strict=True)
        return torch.cat([_attend(a[None], b[None], c[None], softmax_scale, causal)[0] for a, b, c in segments])

    def lazy_imports(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """What transformers' `_lazy_imports` answers: dense, varlen, paged, pad and unpad functions."""
        return (
            self.flash_attn_func,
            self.flash_attn_varlen_func,
            None,
            dispatch._pad_input,
            dispatch._unpad_input,
        )


def configs(model: nn.Module) -> list[PretrainedConfig]:
    """Every distinct config object that a module of `model` reads, sub-configs included."""
    found: dict[int, PretrainedConfig] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PretrainedConfig):
            parts = [getattr(config, name, None) for name in config.sub_configs]
            found |= {id(c): c for c in (config, *parts) if isinstance(c, PretrainedConfig)}
    return list(found.values())


@contextmanager
def attention_implementation(model: nn.Module, name: str) -> Iterator[None]:
    """Run the whole `model` on the attention implementation `name`, without transformers' availability checks."""
    before = [(config, config._attn_implementation_internal) for config in configs(model)]
    try:
        for config, _ in before:
            config._attn_implementation_internal = name
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation_internal = implementation


@contextmanager
def fake_flash_attention(model: nn.Module) -> Iterator[list[FlashCall]]:
    """Switch `model` to "flash_attention_2" on CPU; yields the kernel calls, and restores everything."""
    kernels = Kernels()
    # The dispatcher keeps what it loaded in module globals: each is put back, and loading starts afresh.
    names = ("_flash_fn", "_flash_varlen_fn", "_flash_with_kvcache_fn", "_pad_fn", "_unpad_fn")
    names += ("_process_flash_kwargs_fn", "_process_with_kvcache_kwargs_fn")
    loaded = {name: getattr(dispatch, name) for name in names if hasattr(dispatch, name)}
    patched = loaded | {"_loaded_implementation": None, "_lazy_imports": kernels.lazy_imports}
    with mock.patch.multiple(dispatch, **patched), attention_implementation(model, "flash_attention_2"):
        yield kernels.calls
