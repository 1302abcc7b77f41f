"""Quantisation in groups and packing of bits, against ground truth and by hand."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from mmcompress import ops
from mmcompress.kernels.kv_quant import naive

BITS = [1, 2, 3, 4, 8]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# shape `[..., tokens, channels]`, group, dimension of groups
CASES = [
    ((1, 8), 8, -1),
    ((3, 1, 8), 1, -2),
    ((2, 3, 21, 16), 7, -2),
    ((2, 3, 5, 24), 3, -1),
    ((1, 2, 33, 40), 33, -2),
    ((1, 2, 4, 40), 20, -1),
    ((2, 0, 8), 1, -2),
]


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """With deterministic algorithms on, torch fills what `torch.empty` returns with NaN or the largest integer."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def random(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Channels with offsets and spreads of their own."""
    generator = torch.Generator().manual_seed(sum(shape))
    spread, offset = torch.randn(2, shape[-1], generator=generator)
    return (torch.randn(shape, generator=generator) * spread.exp() + 5 * offset).to(dtype)


@pytest.mark.parametrize(("shape", "group", "dim"), CASES, ids=str)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_ground_truth(shape: tuple[int, ...], group: int, dim: int, bits: int, dtype: torch.dtype) -> None:
    states = random(shape, dtype)
    packed = ops.kv_quant(states, bits, group, dim)
    expected = naive.kv_quant(states, bits, group, dim)
    assert [part.dtype for part in packed] == [torch.uint8, dtype, dtype]
    for part, truth in zip(packed, expected, strict=True):
        torch.testing.assert_close(part, truth, rtol=0, atol=0)
    restored = ops.kv_dequant(*packed, bits, dim)
    assert restored.dtype == dtype
    torch.testing.assert_close(restored, naive.kv_dequant(*packed, bits, dim), rtol=0, atol=0)


@pytest.mark.parametrize(("shape", "group", "dim"), CASES, ids=str)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_errors_are_within_half_a_step_and_bytes_as_by_formula(
    shape: tuple[int, ...], group: int, dim: int, bits: int, dtype: torch.dtype
) -> None:
    states = random(shape, dtype)
    codes, low, high = ops.kv_quant(states, bits, group, dim)
    assert 8 * codes.nbytes == bits * states.numel()
    assert low.numel() == high.numel() == states.numel() // group
    restored = ops.kv_dequant(codes, low, high, bits, dim)
    half = (high.float() - low.float()).repeat_interleave(group, dim) / (2**bits - 1) / 2
    rounding = torch.finfo(dtype).eps * restored.abs().float()
    assert ((restored.float() - states.float()).abs() <= half + rounding).all()


@pytest.mark.parametrize("bits", BITS)
def test_packing(bits: int) -> None:
    codes = torch.randint(2**bits, (3, 2, 24), generator=torch.Generator().manual_seed(bits)).to(torch.uint8)
    packed = ops.pack_bits(codes, bits)
    assert packed.shape == (3, 2, 3 * bits) and packed.dtype == torch.uint8
    assert torch.equal(packed, naive.pack_bits(codes, bits))
    assert torch.equal(naive.unpack_bits(packed, bits), codes)
    assert torch.equal(ops.unpack_bits(packed, bits), codes)


def test_the_order_of_bits() -> None:
    def packed(codes: list[int], bits: int) -> list[int]:
        return ops.pack_bits(torch.tensor(codes, dtype=torch.uint8), bits).tolist()

    assert packed([1, 0, 0, 0, 0, 0, 0, 1], 1) == [0b10000001]
    assert packed([3, 0, 1, 2], 2) == [0b10_01_00_11]
    assert packed([1, 2, 3, 4, 5, 6, 7, 0], 3) == [0b11_010_001, 0b0_101_100_0, 0b000_111_11]
    assert packed([5, 12], 4) == [0b1100_0101]
    assert packed([200, 7], 8) == [200, 7]


@pytest.mark.parametrize(("group", "dim"), [(2, -1), (3, -2)])
def test_by_hand(group: int, dim: int) -> None:
    states = torch.tensor([[0.0, 3.0, -2.0, 4.0], [1.0, 1.0, 7.0, 7.0], [2.0, 5.0, 1.0, 1.0]])
    codes, low, high = ops.kv_quant(states, 2, group, dim)
    if dim == -1:
        assert ops.unpack_bits(codes, 2).tolist() == [[0, 3, 0, 3], [0, 0, 0, 0], [0, 3, 0, 0]]
        assert (low.tolist(), high.tolist()) == ([[0, -2], [1, 7], [2, 1]], [[3, 4], [1, 7], [5, 1]])
    else:
        # Halves go to even codes: (3 - 1) / (4 / 3) = 1.5.
        assert ops.unpack_bits(codes, 2).tolist() == [[0, 2, 0, 2], [2, 0, 3, 3], [3, 3, 1, 0]]
        assert (low.tolist(), high.tolist()) == ([[0, 1, -2, 1]], [[2, 5, 7, 7]])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("factor", [1.0, 1e-7, 3e4])
def test_the_ends_of_a_range_stay_what_they_are(dtype: torch.dtype, factor: float) -> None:
    states = (torch.linspace(-1, 1, 40).view(5, 8) * factor).to(dtype)
    equal = torch.full((3, 8), -1.7, dtype=dtype)
    for bits in BITS:
        assert torch.equal(ops.kv_dequant(*ops.kv_quant(equal, bits, 8), bits), equal)
        restored = ops.kv_dequant(*ops.kv_quant(states, bits, 8), bits)
        torch.testing.assert_close(restored[:, [0, -1]], states[:, [0, -1]], rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_groups_do_not_know_each_other(dtype: torch.dtype) -> None:
    states = random((2, 6, 16), dtype)
    spoiled = states.clone()
    spoiled[0, :3, :8] = 1e4
    for dim, group, apart in ((-1, 8, (0, slice(0, 3), slice(8, 16))), (-2, 3, (0, slice(3, 6), slice(0, 8)))):
        restored = (ops.kv_dequant(*ops.kv_quant(each, 4, group, dim), 4, dim) for each in (states, spoiled))
        before, after = restored
        assert torch.equal(before[apart], after[apart]) and torch.equal(before[1], after[1])


def test_inputs_are_left_alone() -> None:
    states = random((4, 8))
    before = states.clone()
    packed = ops.kv_quant(states, 4, 2, -2)
    copies = [part.clone() for part in packed]
    ops.kv_dequant(*packed, 4, -2)
    assert torch.equal(before, states)
    assert all(torch.equal(*pair) for pair in zip(packed, copies, strict=True))
