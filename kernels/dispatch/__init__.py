"""Where an op runs: in plain torch, or as a Triton kernel where there is a device for it and the call fits."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from functools import cache, wraps
from importlib import import_module
from importlib.util import find_spec
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

from mmcompress.errors import SpecError, UnsupportedError

P = ParamSpec("P")
R = TypeVar("R")

SWITCH = "MMCOMPRESS_KERNELS"
MODES = ("auto", "reference", "triton", "naive")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
DTYPES = (*FLOATS, torch.int64, torch.int32, torch.uint8, torch.bool)
ACCELERATED = "cuda"
REACH = 2**31
"""Kernels count elements in 32 bits."""


def dispatched(
    package: str,
    reference: Callable[P, R],
    fake: Callable[P, R],
    refuse: Callable[P, str] | None = None,
    schema: str | None = None,
) -> Callable[P, R]:
    """The op `mmcompress::<name of reference>`: opaque to torch.compile, without a choice made before it runs.

    `MMCOMPRESS_KERNELS` chooses: `auto` takes Triton for CUDA tensors and warns where a call does not fit it,
    `reference` takes plain torch, `triton` takes Triton or fails, `naive` the ground truth, on the CPU. Kernels have no
    backward: where a gradient is asked for, and where there is nothing to compute, plain torch answers.

    Args:
        package: where `triton.py` and `naive.py` are, each with a function of the same name and arguments.
        reference: the op in plain torch.
        fake: the same on tensors without data, for their shapes.
        refuse: what of a call Triton does not take; "" if it takes all.
        schema: of the op, where it cannot be inferred.

    Raises:
        UnsupportedError: Triton was demanded and does not take the call.
        SpecError: `MMCOMPRESS_KERNELS` is none of these.
    """
    name = reference.__name__

    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        given, chosen = list(_tensors([*args, *kwargs.values()])), mode()
        if chosen == "naive":
            return cast(R, _contiguous(getattr(import_module(f"{package}.naive"), name)(*args, **kwargs)))
        if not _on_triton(name, chosen, given, lambda: refuse(*args, **kwargs) if refuse else ""):
            return cast(R, _contiguous(reference(*args, **kwargs)))
        with torch.cuda.device_of(given[0]):
            return cast(R, getattr(import_module(f"{package}.triton"), name)(*args, **kwargs))

    schema = schema or torch.library.infer_schema(reference, mutates_args=())
    op = torch.library.custom_op(f"mmcompress::{name}", run, mutates_args=(), schema=schema)
    op.register_fake(fake)

    @wraps(reference)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        given = list(_tensors([*args, *kwargs.values()]))
        if not given or (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given)):
            return reference(*args, **kwargs)
        return cast(R, op(*args, **kwargs))

    return call


def mode() -> str:
    """What the environment chooses.

    Raises:
        SpecError: there is no such choice.
    """
    chosen = os.environ.get(SWITCH, "auto")
    if chosen not in MODES:
        raise SpecError(f"{SWITCH}={chosen!r}: choose one of {', '.join(MODES)}.")
    return chosen


def _on_triton(name: str, chosen: str, tensors: list[Tensor], refuse: Callable[[], str]) -> bool:
    if chosen == "reference" or (chosen == "auto" and tensors[0].device.type != ACCELERATED):
        return False
    reason = unfit(tensors) or refuse()
    if not reason:
        return all(tensor.numel() for tensor in tensors)
    message = f"{name}: Triton does not take {reason}; plain torch does, with {SWITCH}=auto or reference."
    if chosen == "triton":
        raise UnsupportedError(message)
    _warn_once(message)
    return False


def unfit(tensors: list[Tensor]) -> str:
    """Why no kernel takes these; "" if one may."""
    if find_spec("triton") is None:
        return "anything, as it is not installed"
    if len(devices := {tensor.device for tensor in tensors}) > 1:
        return f"tensors on different devices ({', '.join(sorted(map(str, devices)))})"
    device = tensors[0].device.type
    if device != "cuda" and not (device == "cpu" and _interpreted()):
        return f"device {device}"
    for tensor in tensors:
        if tensor.dtype not in DTYPES:
            return f"dtype {tensor.dtype}"
        if sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) >= REACH:
            return f"strides {tensor.stride()} of shape {tuple(tensor.shape)}, which reach beyond {REACH} elements"
    return ""


def of_one_dtype(*tensors: Tensor) -> str:
    """What is wrong where floating-point `tensors` that are multiplied differ in type."""
    dtypes = sorted({str(tensor.dtype) for tensor in tensors})
    if any(tensor.dtype not in FLOATS for tensor in tensors):
        return f"dtypes other than floats of up to 32 bits ({', '.join(dtypes)})"
    return f"different dtypes ({', '.join(dtypes)})" if len(dtypes) > 1 else ""


def _interpreted() -> bool:
    import triton

    return bool(triton.knobs.runtime.interpret)


def _tensors(arguments: Any) -> Iterator[Tensor]:
    for argument in arguments:
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, list | tuple):
            yield from _tensors(argument)


def _contiguous(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output.contiguous()
    return type(output)(map(_contiguous, output))


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=2)
