"""What KVQuant knows of a model beforehand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mmcompress.errors import SpecError

BITS = {4: 2, 8: 3, 16: 4}


@dataclass(frozen=True)
class LayerCalibration:
    """Thresholds and centroids of one layer.

    Args:
        key_lower: `[channels]`, below which a key is an outlier; channels are those of all KV heads, head after head.
        key_upper: above which it is one.
        key_centroids: `[4, 8 or 16]`, rising, what keys between the thresholds, stretched to [-1, 1], become.
        value_centroids: likewise of values.
    """

    key_lower: Tensor
    key_upper: Tensor
    key_centroids: Tensor
    value_centroids: Tensor


class Calibration:
    """The calibration of a model, in a safetensors file with `LayerCalibration`'s tensors stacked over layers.

    Args:
        path: of the file.

    Raises:
        SpecError: there is no such file, or it holds something else.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            self._tables = _checked({name: table.float() for name, table in load_file(path).items()})
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            names = "key_lower, key_upper, key_centroids and value_centroids"
            raise SpecError(f"kvquant: calibration={path!r} is no safetensors file with {names}: {error}.") from error

    def layer(self, number: int, device: torch.device) -> LayerCalibration:
        """Thresholds and centroids of layer `number`.

        Raises:
            SpecError: the model has more layers than were calibrated.
        """
        layers = len(self._tables["key_lower"])
        if number >= layers:
            raise SpecError(
                f"kvquant: calibration={self.path!r} is for {layers} layers; this is number {number} from 0."
            )
        return LayerCalibration(**{name: table[number].to(device) for name, table in self._tables.items()})


def _checked(tables: Mapping[str, Tensor]) -> dict[str, Tensor]:
    lower, upper = tables["key_lower"], tables["key_upper"]
    if lower.dim() != 2 or lower.shape != upper.shape or not bool((lower <= upper).all()):
        raise ValueError("every key_lower has a key_upper that is not below it, per layer and channel")
    centroids = {name: tables[name].sort(dim=-1).values for name in ("key_centroids", "value_centroids")}
    for name, table in centroids.items():
        if table.shape not in [(len(lower), count) for count in BITS] or not bool(table.isfinite().all()):
            raise ValueError(f"{name} are 4, 8 or 16 numbers per layer")
    return {"key_lower": lower, "key_upper": upper, **centroids}
