"""Keys and values in 8 bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mmcompress.policies._groups import PerToken
from mmcompress.registry import register_policy


@register_policy(
    "int8",
    summary="Keys and values in 8 bits, with a range per token and KV head.",
    family="baseline",
    stage="kv",
    takes_keep=False,
)
@dataclass(frozen=True)
class Int8(PerToken):
    """Asymmetric rounding to 256 values between the smallest and the largest of a token and head."""

    bits: ClassVar[int] = 8
