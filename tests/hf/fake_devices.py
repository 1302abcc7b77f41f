"""A second device on a machine that has none: tensors remember where they were put, and devices do not mix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

HERE, THERE = torch.device("cpu"), torch.device("cuda:0")


def place_of(tensor: Tensor) -> torch.device:
    return getattr(tensor, "pretended", HERE)


class PretendedDevices(TorchFunctionMode):
    """While open, every operation is told, and says, the devices its tensors were put on.

    Raises:
        RuntimeError: an operation meets tensors of both devices, where torch would raise as well.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func == Tensor.device.__get__:
            return place_of(args[0])
        asked = [value for value in (*args[1:], *kwargs.values()) if isinstance(value, torch.device)]
        args, kwargs = tree_map(lambda value: HERE if isinstance(value, torch.device) else value, (args, kwargs))
        given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        name = getattr(func, "__name__", "")
        places = {place_of(tensor) for tensor in given if tensor.dim()}
        indexes = name == "__getitem__" and place_of(args[0]) == THERE  # which torch lets indices from here do
        if name == "to":
            other = [place_of(tensor) for tensor in given[1:]]
            place = (asked or other or [place_of(args[0])])[0]
        elif len(places) > 1 and not indexes:
            raise RuntimeError(f"{name} of tensors on two devices: {[tuple(tensor.shape) for tensor in given]}")
        else:
            place = asked[0] if asked else THERE if indexes else places.pop() if places else HERE
        output = func(*args, **kwargs)
        if name == "to" and output is args[0] and place != place_of(args[0]):
            output = output.clone()
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor):
                tensor.pretended = place
        return output


def moved(values: Any, place: torch.device) -> Any:
    return tree_map(lambda value: value.to(place) if isinstance(value, Tensor) else value, values)


def put_there(module: nn.Module) -> None:
    """Put a module's weights on the second device, and have it fetch what it is called with, as accelerate does."""
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.pretended = THERE
    module.register_forward_pre_hook(
        lambda module, args, kwargs: (moved(args, THERE), moved(kwargs, THERE)), with_kwargs=True
    )
