"""What compression saves, in numbers that can be compared: tokens, FLOPs, bytes and time by stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class LLMShape:
    """The dimensions of a dense decoder that its cost depends on.

    Args:
        layers: decoder layers.
        hidden: model width.
        heads: query heads.
        kv_heads: key/value heads.
        head_dim: width of a head.
        intermediate: MLP width (gated: three matrices).
        vocabulary: rows of the output head.
        bytes_per_value: size of a cached key or value element.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    bytes_per_value: int

    def prefill_flops(self, tokens: Sequence[int]) -> int:
        """FLOPs to prefill one sequence of `tokens` in each layer.

        Matrix products, 2 per multiply-add, the full attention square, the head for one token.
        """
        projections = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        per_token = projections + 3 * self.hidden * self.intermediate
        per_pair = 2 * self.heads * self.head_dim
        return 2 * (sum(n * (per_token + n * per_pair) for n in tokens) + self.hidden * self.vocabulary)

    def kv_bytes(self, tokens: Sequence[int]) -> int:
        """Bytes that keys and values of `tokens` in each layer occupy."""
        return 2 * self.kv_heads * self.head_dim * self.bytes_per_value * sum(tokens)


@dataclass(frozen=True)
class ItemStats:
    """One image or clip: tokens the LLM would have seen, tokens it saw, separators kept beside them."""

    row: int
    modality: str
    tokens: int
    kept: int
    separators: int


@dataclass
class StageSeconds:
    """Seconds by stage: vision encoder with projector, token selection, LLM prefill, all decode steps."""

    encoder: float = 0.0
    selection: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0


@dataclass(frozen=True)
class Stats:
    """What the last prefill with visual input kept, and what it saved.

    Args:
        items: one entry per image or clip, in row order.
        row_tokens: prompt tokens per row without compression, padding excluded.
        row_kept: prompt tokens per row that entered the LLM.
        shape: the LLM's dimensions.
        row_left: by layer before which tokens were removed inside the LLM, prompt tokens per row from there on.
        kv_held: bytes that keys and values occupy now, padding included, under a KV policy; None without one.
        kv_layers: bytes that each layer's keys and values occupy now, and the most they did since the cache is there;
            None before the first pass with a cache.
        kv_read: entries that each layer's heads read in the last step of decoding, all rows, under a KV policy that
            reads a part; None without one, and before the first step.
        reused: the share of the encoder's work that was done before, so that `seconds.encoder` covers the rest.
        seconds: time by stage, decode steps included as they happen.
    """

    items: Sequence[ItemStats]
    row_tokens: Sequence[int]
    row_kept: Sequence[int]
    shape: LLMShape
    row_left: Mapping[int, Sequence[int]] = field(default_factory=dict)
    kv_held: int | None = None
    kv_layers: Sequence[tuple[int, int]] | None = None
    kv_read: Sequence[int] | None = None
    reused: float = 0.0
    seconds: StageSeconds = field(default_factory=StageSeconds)

    @property
    def tokens(self) -> int:
        """Visual tokens before compression."""
        return sum(item.tokens for item in self.items)

    @property
    def kept(self) -> int:
        """Visual tokens that entered the LLM."""
        return sum(item.kept for item in self.items)

    @property
    def retained(self) -> float:
        """Fraction of visual tokens kept."""
        return self.kept / self.tokens if self.tokens else 1.0

    @property
    def tokens_per_layer(self) -> list[float]:
        """Visual tokens in every LLM layer, averaged over items."""
        entered = sum(self.row_kept)
        return [
            (self.kept - entered + sum(rows)) / len(self.items) if self.items else 0.0 for rows in self.rows_by_layer
        ]

    @property
    def rows_by_layer(self) -> list[Sequence[int]]:
        """Prompt tokens per row in every layer."""
        rows, by_layer = self.row_kept, []
        for layer in range(self.shape.layers):
            rows = self.row_left.get(layer, rows)
            by_layer.append(rows)
        return by_layer

    @property
    def prefill_flops(self) -> int:
        """Analytic FLOPs of the LLM prefill, all rows; attention to earlier turns is not counted."""
        return sum(self.shape.prefill_flops(tokens) for tokens in zip(*self.rows_by_layer, strict=True))

    @property
    def prefill_flops_full(self) -> int:
        """The same without compression."""
        return sum(self.shape.prefill_flops([tokens] * self.shape.layers) for tokens in self.row_tokens)

    @property
    def kv_bytes(self) -> int:
        """Bytes the prefill added to the KV cache, all rows, padding excluded."""
        return sum(self.shape.kv_bytes(tokens) for tokens in zip(*self.rows_by_layer, strict=True))

    @property
    def kv_bytes_full(self) -> int:
        """The same without compression."""
        return self.shape.kv_bytes([sum(self.row_tokens)] * self.shape.layers)

    def __str__(self) -> str:
        return (
            f"{self.kept} of {self.tokens} visual tokens kept ({self.retained:.1%}) in {len(self.items)} items; "
            f"prefill {self.prefill_flops / 1e9:.3g} of {self.prefill_flops_full / 1e9:.3g} GFLOP; "
            f"KV {self.kv_bytes / 1e6:.3g} of {self.kv_bytes_full / 1e6:.3g} MB; "
            f"seconds: encoder {self.seconds.encoder:.3f}, selection {self.seconds.selection:.3f}, "
            f"prefill {self.seconds.prefill:.3f}, decode {self.seconds.decode:.3f}"
        )
