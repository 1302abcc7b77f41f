"""KVQuant: non-uniform steps that were calibrated, keys before rotation, outliers as they are."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from mmcompress import ops
from mmcompress.errors import SpecError
from mmcompress.kv_policy import Block, Packed, Quantiser
from mmcompress.policies._calibration import BITS, Calibration, LayerCalibration
from mmcompress.policies._codebooks import quantile
from mmcompress.policies._groups import check_bytes
from mmcompress.registry import register_policy


@register_policy(
    "kvquant",
    summary="Keys before rotation and values in 2, 3 or 4 bits of calibrated steps; outliers and first tokens in full.",
    family="quantisation",
    stage="kv",
    paper="KVQuant: Towards 10 Million Context Length LLM Inference with KV Cache Quantization, arXiv:2401.18079",
    requires=("calibration",),
    takes_keep=False,
)
@dataclass(frozen=True)
class KVQuant(Quantiser):
    """All but outliers become the nearest of a layer's centroids, stretched per channel or token (Section 3).

    Keys are stretched between thresholds of their channel, values between the ends of their token's range. Q-Norm is
    left out.

    Args:
        calibration: path of the model's, see `Calibration`.
        outliers: of a token's values the fraction that are outliers, half of them low and half high.
        sinks: so many of the first tokens are never packed.
    """

    calibration: str | None = None
    outliers: float = 0.01
    sinks: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.outliers < 1 or self.sinks < 0:
            raise SpecError("kvquant: outliers must be a fraction in (0, 1), sinks at least 0.")

    @property
    def rotated(self) -> bool:
        """Keys are packed before rotation, where outliers keep to their channels."""
        return False

    def pack_keys(self, block: Block) -> Packed:
        """Between thresholds per channel."""
        rows, known = _rows(block.states), self._layer(block.layer, block.states)
        lower, upper = known.key_lower, known.key_upper
        if lower.shape != rows.shape[-1:]:
            raise SpecError(f"kvquant: {self.calibration} is for {len(lower)} channels; there are {rows.shape[-1]}.")
        return _pack(block, (rows < lower) | (rows > upper), lower, upper, known.key_centroids)

    def pack_values(self, block: Block) -> Packed:
        """Between the ends, per token, of what is left without outliers."""
        rows, known = _rows(block.states), self._layer(block.layer, block.states)
        ordered = rows.sort(dim=-1).values
        lower, median, upper = (quantile(ordered, share) for share in (self.outliers / 2, 0.5, 1 - self.outliers / 2))
        exact = (rows <= lower) | (rows >= upper)
        low, high = rows.where(~exact, median).aminmax(dim=-1, keepdim=True)
        packed = _pack(block, exact, low, high, known.value_centroids)
        ends = low.to(packed.dtype), high.to(packed.dtype)
        return replace(packed, parts=(*packed.parts, *ends), along=(*packed.along, -2, -2))

    def unpack_keys(self, packed: Packed) -> Tensor:
        """Centroids between the thresholds of their channels."""
        known = self._layer(packed.layer, packed.parts[0])
        return _unpack(packed, known.key_lower, known.key_upper, known.key_centroids)

    def unpack_values(self, packed: Packed) -> Tensor:
        """Centroids between the ends of their tokens."""
        low, high = (end.float() for end in packed.parts[4:])
        return _unpack(packed, low, high, self._layer(packed.layer, low).value_centroids)

    def _layer(self, number: int, like: Tensor) -> LayerCalibration:
        return self._calibration.layer(number, like.device)

    @cached_property
    def _calibration(self) -> Calibration:
        return Calibration(str(self.calibration))


def _pack(block: Block, exact: Tensor, low: Tensor, high: Tensor, centroids: Tensor) -> Packed:
    """Codes of all channels; values, channels and, per token, counts of those that are `exact`."""
    rows, bits = _rows(block.states), BITS[len(centroids)]
    check_bytes("kvquant", rows.shape[-1], bits)
    middle, half = (high + low) / 2, (high - low) / 2
    between = (centroids[1:] + centroids[:-1]) / 2
    nearest = torch.bucketize((rows - middle) / half.masked_fill(half == 0, 1), between)
    parts = (
        ops.pack_bits(nearest.to(torch.uint8), bits),
        rows[exact].to(block.states.dtype),
        exact.nonzero()[:, -1].to(torch.uint16),
        exact.sum(dim=-1).to(torch.uint16),
    )
    return Packed(parts, block.states.shape, block.states.dtype, block.layer, along=(-2, -1, -1, -1))


def _unpack(packed: Packed, low: Tensor, high: Tensor, centroids: Tensor) -> Tensor:
    codes, outliers, channels, counts = packed.parts[:4]
    middle, half = (high + low) / 2, (high - low) / 2
    rows = centroids[ops.unpack_bits(codes, BITS[len(centroids)]).int()] * half + middle
    flat = rows.flatten(0, -2)
    token = torch.arange(len(flat), device=flat.device).repeat_interleave(counts.flatten().long())
    flat[token, channels.flatten().long()] = outliers.flatten().float()
    heads, _, dim = packed.shape[-3:]
    return rows.unflatten(-1, (heads, dim)).transpose(-3, -2).to(packed.dtype)


def _rows(states: Tensor) -> Tensor:
    """Channels of all heads in one row, `[..., tokens, channels]`."""
    return states.float().transpose(-3, -2).flatten(-2)
