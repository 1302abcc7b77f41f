"""Which implementation runs, what is refused, and ops as torch.compile sees them."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_calls import BY_HEAD_SIZE, one_of_each
from torch import Tensor

from mmcompress import ops
from mmcompress.errors import SpecError, UnsupportedError
from mmcompress.kernels import dispatch

CALLS = one_of_each()
QUERY, KEY = torch.randn(1, 2, 3, 8), torch.randn(1, 1, 5, 8)


def refused(name: str, *arguments: Any) -> str:
    with pytest.raises(UnsupportedError) as caught:
        getattr(ops, name)(*arguments)
    message = str(caught.value)
    assert message.startswith(f"{name}: Triton does not take ")
    assert "plain torch does, with MMCOMPRESS_KERNELS=auto or reference" in message
    return message


def test_every_op_has_a_call() -> None:
    assert sorted(CALLS) == sorted(ops.__all__)


def test_the_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    module = importlib.import_module("mmcompress.kernels.attention_rows.triton")
    monkeypatch.setattr(module, "attention_rows", lambda *_, **__: torch.tensor(7.0))
    expected = ops.attention_rows(QUERY, KEY, 1.0)
    assert expected.shape == (1, 2, 3, 5)
    monkeypatch.setenv(dispatch.SWITCH, "reference")
    assert torch.equal(ops.attention_rows(QUERY, KEY, 1.0), expected)
    monkeypatch.setenv(dispatch.SWITCH, "triton")
    assert ops.attention_rows(QUERY, KEY, 1.0) == 7
    assert ops.attention_rows(QUERY, KEY[:, :, :0], 1.0).shape == (1, 2, 3, 0)  # nothing to compute
    monkeypatch.setenv(dispatch.SWITCH, "tritom")
    with pytest.raises(SpecError, match=r"MMCOMPRESS_KERNELS='tritom': choose one of auto, reference, triton, naive"):
        ops.attention_rows(QUERY, KEY, 1.0)


def test_what_does_not_fit_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv(dispatch.SWITCH, "triton")
    assert "dtype torch.float64" in refused("attention_rows", QUERY.double(), KEY.double(), 1.0)
    assert "different dtypes (torch.bfloat16, torch.float32)" in refused("attention_rows", QUERY, KEY.bfloat16(), 1.0)
    assert "dtypes other than floats" in refused("attention_lse", QUERY.int(), KEY.int(), 1.0)
    wide = torch.zeros(1, 1, 2, 300)
    assert "head size 300 above 256" in refused("attention_lse", wide, wide, 1.0)
    assert "codes of 3 bits" in refused("pack_bits", torch.zeros(8, dtype=torch.uint8), 3)
    assert "groups of 3 codes" in refused("kv_quant", torch.zeros(2, 24), 4, 3)
    assert dispatch.unfit([QUERY, KEY.to("meta")]) == "tensors on different devices (cpu, meta)"
    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "REACH", 20)
        assert "strides (48, 24, 8, 1)" in refused("attention_rows", QUERY, KEY, 1.0)
    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "_interpreted", lambda: False)
        assert "device cpu" in refused("attention_rows", QUERY, KEY, 1.0)
    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "find_spec", lambda _: None)
        assert "it is not installed" in refused("attention_rows", QUERY, KEY, 1.0)


def of_another_type(value: Any) -> Any:
    """Floating-point numbers of 64 bits."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    return type(value)(map(of_another_type, value)) if isinstance(value, list | tuple) else value


@pytest.mark.parametrize("name", CALLS)
def test_every_op_names_what_its_kernel_does_not_take(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    arguments = CALLS[name]
    odd = of_another_type(arguments) if "_bits" not in name else (arguments[0].short(), *arguments[1:])
    monkeypatch.setenv(dispatch.SWITCH, "triton")
    assert re.search(r"dtypes? .*(float64|int16)", refused(name, *odd))
    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "REACH", 1)
        assert re.search(r"strides \(.*\) of shape \(.*\), which reach beyond 1", refused(name, *arguments))
    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "_interpreted", lambda: False)
        assert "device cpu" in refused(name, *arguments)
    monkeypatch.setenv(dispatch.SWITCH, "auto")
    monkeypatch.setattr(dispatch, "ACCELERATED", "cpu")
    dispatch._warn_once.cache_clear()
    with pytest.warns(UserWarning, match=rf"{name}: Triton does not take dtypes? .*plain torch does"):
        fallen_back = getattr(ops, name)(*odd)
    monkeypatch.setenv(dispatch.SWITCH, "reference")
    torch.testing.assert_close(fallen_back, getattr(ops, name)(*odd))


@pytest.mark.parametrize("case", ["lse", "weighted", "colsum", "pages", "codes"])
def test_heads_too_wide_for_a_block_are_named(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv(dispatch.SWITCH, "triton")
    name, arguments = BY_HEAD_SIZE[case](272, torch.float32)
    assert "head size 272 above 256" in refused(name, *arguments)
    monkeypatch.setenv(dispatch.SWITCH, "auto")
    assert getattr(ops, name)(*arguments).isfinite().any()


def test_auto_says_where_it_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "ACCELERATED", "cpu")
    monkeypatch.setattr(dispatch, "_interpreted", lambda: True)
    dispatch._warn_once.cache_clear()
    with pytest.warns(UserWarning, match=r"attention_rows: Triton does not take .*plain torch does"):
        rows = ops.attention_rows(QUERY.double(), KEY.double(), 1.0)
    torch.testing.assert_close(rows.sum(dim=-1), torch.ones(1, 2, 3))


def test_gradients_are_those_of_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.SWITCH, "triton")
    tensor, index = torch.randn(2, 5, 3, requires_grad=True), torch.tensor([[0, 4], [-1, 2]])
    ops.compact(tensor, index).sum().backward()
    assert tensor.grad is not None and tensor.grad[..., 0].tolist() == [[1, 0, 0, 0, 1], [0, 0, 1, 0, 0]]


@pytest.mark.parametrize("name", CALLS)
def test_custom_ops_are_registered_rightly(name: str) -> None:
    torch.library.opcheck(getattr(torch.ops.mmcompress, name).default, CALLS[name])


def every_op(calls: dict[str, Any]) -> list[Any]:
    return [getattr(ops, name)(*arguments) for name, arguments in calls.items()]


def test_torch_compile_passes_through() -> None:
    torch.compiler.reset()
    compiled: Callable[..., Any] = torch.compile(every_op, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(CALLS), every_op(CALLS))


def test_lengths_may_change_without_compiling_again() -> None:
    def rows_kept(query: Tensor, key: Tensor, index: Tensor) -> Tensor:
        return ops.compact(ops.attention_rows(query, key, 1.0, heads="mean").transpose(1, 2), index)

    torch.compiler.reset()
    compiled = torch.compile(rows_kept, fullgraph=True, backend="aot_eager", dynamic=True)
    for keys in (5, 9, 12):
        given = torch.randn(1, 2, 3, 8), torch.randn(1, 1, keys, 8), torch.tensor([[0, keys - 1]])
        with torch.compiler.set_stance("fail_on_recompile" if keys > 5 else "default"):
            torch.testing.assert_close(compiled(*given), rows_kept(*given))
