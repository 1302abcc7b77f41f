"""Inputs as SDPA and flash-attn hand them over, and what `compact` makes as both and FlexAttention take it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from hf.fake_flash import Kernels
from kernel_calls import HEAD_SIZES, randn
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from mmcompress import ops
from mmcompress.compact import ragged_index
from mmcompress.kernels.dispatch import SWITCH

pytestmark = [
    pytest.mark.filterwarnings("ignore:divide by zero encountered:RuntimeWarning"),  # logarithms of 0
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning"),
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HEADS, KV_HEADS, LENGTHS = 4, 2, (37, 1, 66)
ATTENTION_OPS: dict[str, Callable[..., Tensor]] = {
    "attention_rows": ops.attention_rows,
    "attention_lse": ops.attention_lse,
    "weighted_colsum": lambda query, key, scaling, last, first=None: ops.weighted_colsum(
        query, key, scaling, last, ops.attention_lse(query, key, scaling, last, first), _weight(query), first
    ),
    "attention_colsum": ops.attention_colsum,
}


def _weight(query: Tensor) -> Tensor:
    return torch.ones(query.shape[:3], device=query.device)


@pytest.fixture(params=["reference", "triton"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Both that can run on a device."""
    if request.param == "triton":
        triton = pytest.importorskip("triton")
        if DEVICE == "cpu" and not triton.knobs.runtime.interpret:
            pytest.skip("triton came before its switch")
    monkeypatch.setenv(SWITCH, request.param)
    yield request.param


def packed(dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries `[total, heads, dim]`, keys and values `[total, kv_heads, dim]`, and bounds of sequences `[count + 1]`.

    All are parts of one tensor, as a projection to all of them leaves it.
    """
    whole = randn(sum(LENGTHS), HEADS + 2 * KV_HEADS, dim, dtype=dtype).to(DEVICE)
    bounds = torch.tensor([0, *LENGTHS], device=DEVICE).cumsum(0).int()
    return (*whole.split([HEADS, KV_HEADS, KV_HEADS], dim=1), bounds)


@pytest.mark.parametrize(("dim", "dtype"), [(dim, DTYPES[n % 3]) for n, dim in enumerate(HEAD_SIZES)], ids=str)
@pytest.mark.parametrize("name", ATTENTION_OPS)
def test_packed_sequences_are_seen_one_by_one(name: str, dim: int, dtype: torch.dtype, implementation: str) -> None:
    query, key, _, bounds = packed(dim, dtype)
    places = torch.arange(len(query), device=DEVICE)
    first = bounds[:-1].repeat_interleave(bounds.diff())
    op, scaling = ATTENTION_OPS[name], dim**-0.5
    # [total, heads, dim] is seen as [1, heads, total, dim].
    whole = op(query.transpose(0, 1)[None], key.transpose(0, 1)[None], scaling, places, first)
    for begin, end in zip(bounds.tolist(), bounds.tolist()[1:], strict=False):
        alone = query[begin:end].transpose(0, 1)[None], key[begin:end].transpose(0, 1)[None]
        expected = op(*alone, scaling, torch.arange(end - begin, device=DEVICE))
        mine = whole[..., begin:end, begin:end] if name == "attention_rows" else whole[..., begin:end]
        torch.testing.assert_close(mine, expected, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize(("dim", "dtype"), [(dim, DTYPES[n % 3]) for n, dim in enumerate(HEAD_SIZES)], ids=str)
def test_what_compact_leaves_feeds_every_attention(dim: int, dtype: torch.dtype, implementation: str) -> None:
    """Padded rows for SDPA and FlexAttention, packed sequences for flash-attn: all attend alike."""
    generator = torch.Generator().manual_seed(0)
    keep = torch.rand(3, 61, generator=generator) < torch.tensor([[0.5], [0.02], [0.9]])
    keep[:, 7] = True
    counts = keep.sum(dim=1)
    index = ragged_index(keep, pad_left=True).to(DEVICE)
    whole = [randn(3, 61, heads, dim, seed=heads, dtype=dtype).to(DEVICE) for heads in (HEADS, KV_HEADS, KV_HEADS + 1)]
    whole[2] = whole[2][:, :, 1:]
    padded = [ops.compact(states, index).transpose(1, 2) for states in whole]
    flat_index = keep.flatten().nonzero().T.to(DEVICE)
    flat = [ops.compact(states.flatten(0, 1)[None], flat_index)[0] for states in whole]
    assert all(part.is_contiguous() and part.shape[0] == int(counts.sum()) for part in flat)

    valid = index >= 0
    itself = torch.eye(index.shape[1], dtype=torch.bool, device=DEVICE)  # padding must see something
    causal = torch.ones_like(itself).tril()
    mask = valid[:, None, None] & causal | itself
    by_sdpa = scaled_dot_product_attention(*padded, attn_mask=mask, enable_gqa=True)
    expected = by_sdpa.transpose(1, 2)[valid].float()

    def seen(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & valid[row, key]

    block_mask = create_block_mask(seen, 3, None, index.shape[1], index.shape[1], device=DEVICE)
    by_flex: Any = flex_attention(*padded, block_mask=block_mask, enable_gqa=True)
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype != torch.float32 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(by_flex.transpose(1, 2)[valid].float(), expected, **tolerance)

    bounds = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int().to(DEVICE)
    longest = int(counts.max())
    for flash_attn_varlen_func in flash_attentions(dtype):
        output = flash_attn_varlen_func(*flat, bounds, bounds, longest, longest, causal=True)
        torch.testing.assert_close(output.float(), expected, **tolerance)


def flash_attentions(dtype: torch.dtype) -> Iterator[Callable[..., Tensor]]:
    """A stand-in with the signature of flash-attn's function, and that function where it can run."""
    yield Kernels().flash_attn_varlen_func
    if find_spec("flash_attn") and DEVICE == "cuda" and dtype != torch.float32:
        from flash_attn import flash_attn_varlen_func

        yield flash_attn_varlen_func
