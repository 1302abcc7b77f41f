"""Every Triton kernel against ground truth, in the interpreter where there is no GPU."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_calls import BY_DTYPE, BY_HEAD_SIZE, HEAD_SIZES, OTHERS, Call, greedy
from torch import Tensor

from mmcompress import ops
from mmcompress.kernels.dispatch import SWITCH

triton = pytest.importorskip("triton")

FOLDER = Path(__file__).parents[2] / "kernels"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HEADS = list(itertools.product(HEAD_SIZES, DTYPES))
NAIVE = {
    name: getattr(module, name)
    for path in FOLDER.glob("*/naive.py")
    for module in [importlib.import_module(f"mmcompress.kernels.{path.parent.name}.naive")]
    for name in ops.__all__
    if hasattr(module, name)
}

pytestmark = [
    pytest.mark.skipif(DEVICE == "cpu" and not triton.knobs.runtime.interpret, reason="triton came before its switch"),
    pytest.mark.filterwarnings("ignore:(divide by zero|invalid value) encountered:RuntimeWarning"),  # logarithms of 0
]


@pytest.fixture(autouse=True)
def demanded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Triton or an error; what kernels leave out of their outputs is NaN or the largest integer."""
    monkeypatch.setenv(SWITCH, "triton")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def on_device(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to(DEVICE)
    return type(value)(map(on_device, value)) if isinstance(value, list | tuple) else value


def check(call: Call) -> None:
    name, arguments = call
    actual, expected = getattr(ops, name)(*on_device(arguments)), NAIVE[name](*arguments)
    if isinstance(actual, Tensor):
        actual, expected = (actual,), (expected,)
    for mine, truth in zip(actual, expected, strict=True):
        rough = truth.dtype in (torch.bfloat16, torch.float16)
        rtol, atol = (1e-2, 1e-2) if rough else (2e-5, 1e-5)
        torch.testing.assert_close(mine.cpu(), truth, rtol=rtol, atol=atol)


@pytest.mark.parametrize(("dim", "dtype"), HEADS, ids=str)
@pytest.mark.parametrize("case", BY_HEAD_SIZE)
def test_head_sizes(case: str, dim: int, dtype: torch.dtype) -> None:
    check(BY_HEAD_SIZE[case](dim, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", BY_DTYPE)
def test_dtypes(case: str, dtype: torch.dtype) -> None:
    check(BY_DTYPE[case](dtype))


@pytest.mark.parametrize("case", OTHERS)
def test_integers(case: str) -> None:
    check(OTHERS[case]())


@pytest.mark.parametrize("pivots", [True, False])
@pytest.mark.parametrize("objective", ["max-sum", "k-center"])
def test_greedy_select_that_holds_no_cosines(objective: str, pivots: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from mmcompress.kernels.greedy_select import triton as kernel

    monkeypatch.setattr(kernel, "HELD", 0)
    check(greedy(torch.float32, objective, pivots))


@pytest.mark.parametrize("name", ["greedy_select", "dpp_select"])
def test_ties_go_to_the_lower_index(name: str) -> None:
    tokens = torch.eye(4)[[0, 1, 0, 2, 1, 3, 0, 2]] * torch.tensor([1, 1, -1, 1, 1, 1, -1, -1])[:, None]
    if name == "greedy_select":
        check((name, ([tokens], [8], [torch.tensor(2)], "k-center")))
    else:
        (order,) = ops.dpp_select(*on_device(([tokens], [torch.ones(8)], [8])))
        assert order.tolist() == [0, 1, 3, 5, 2, 4, 6, 7]


def test_quantisation_is_exact() -> None:
    for case in ("quant per channel", "quant of all tokens", "quant per token", "quant of all channels"):
        name, arguments = BY_DTYPE[case](torch.float32)
        for mine, truth in zip(getattr(ops, name)(*on_device(arguments)), NAIVE[name](*arguments), strict=True):
            assert torch.equal(mine.cpu(), truth)


def test_a_row_that_sees_nothing_is_zero() -> None:
    query, key = on_device((torch.ones(1, 1, 2, 4), torch.ones(1, 1, 3, 4)))
    seen = ops.attention_rows(query, key, 1.0, on_device(torch.tensor([-1, 1])))
    torch.testing.assert_close(seen[0, 0].cpu(), torch.tensor([[0.0, 0, 0], [0.5, 0.5, 0]]))


def test_kept_rows_packed_feed_attention() -> None:
    """A packed batch through `compact`, and what SDPA makes of each sequence of it."""
    keep = torch.tensor([[True, False, True, True], [False, True, False, False]])
    states = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
    flat = keep.flatten().nonzero().T
    (packed,) = ops.compact(*on_device((states.flatten(0, 1)[None], flat)))
    assert torch.equal(packed.cpu(), states[keep])
    sequences = packed.split(keep.sum(dim=1).tolist())
    for sequence, states_of, kept in zip(sequences, states, keep, strict=True):
        attended = torch.nn.functional.scaled_dot_product_attention(*[sequence[None, None]] * 3, is_causal=True)
        expected = torch.nn.functional.scaled_dot_product_attention(*[states_of[kept][None, None]] * 3, is_causal=True)
        torch.testing.assert_close(attended.cpu(), expected)
