"""The base class of methods that merge or prune tokens between the layers of a vision encoder."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import ClassVar, Literal, NamedTuple, Self

import torch
from torch import Tensor

from mmcompress.errors import SpecError
from mmcompress.merging import Matching
from mmcompress.registry import MethodInfo
from mmcompress.types import EncoderFacts, Needs, Selection

Place = Literal["attention", "layer"]


@dataclass(frozen=True)
class Step:
    """What one layer is to do; tokens are counted without CLS.

    Args:
        left: tokens that stay.
        first: how many a method of two parts removes in its first part.
    """

    left: int
    first: int = 0


class Attention(NamedTuple):
    """What passed through a layer's attention: query and key `[images, heads, tokens, dim]`, and the logit scaling."""

    query: Tensor
    key: Tensor
    scaling: float


@dataclass(frozen=True)
class LayerTokens:
    """The tokens of a batch of images inside one encoder layer; all images have equally many.

    Args:
        encoder: the encoder.
        layer: number of the layer.
        protected: so many tokens at the front always stay (1 where there is a CLS token, else 0).
        hidden: `[images, tokens, width]` what is merged.
        size: `[images, tokens]` float32, how many patches each token stands for.
        attention: queries and keys of the layer's attention; None unless the method's needs name the layer.
    """

    encoder: EncoderFacts
    layer: int
    protected: int
    hidden: Tensor
    size: Tensor
    attention: Attention | None = None

    @property
    def count(self) -> int:
        """Tokens that may be removed."""
        return self.hidden.shape[1] - self.protected


@dataclass(frozen=True)
class TokenMap(ABC):
    """A linear map over the tokens of a batch of images.

    Args:
        kept: `[images, outputs]` int64, the token whose place each output takes; none twice, protected ones in front.
        size: `[images, outputs]` float32, how many patches each output stands for.
    """

    kept: Tensor
    size: Tensor

    @abstractmethod
    def matrix(self) -> Tensor:
        """How much of each token goes into each output, `[images, outputs, tokens]` float32."""

    def apply(self, tokens: Tensor) -> Tensor:
        """Map `[images, tokens, width]` to `[images, outputs, width]`, computed in float32."""
        return (self.matrix() @ tokens.float()).to(tokens.dtype)

    def then(self, later: TokenMap) -> TokenMap:
        """This map followed by `later`, as one over the tokens of this one."""
        return Mixture(self.kept.gather(-1, later.kept), later.size, later.apply(self.matrix()))

    def to(self, device: torch.device) -> Self:
        """The same on `device`."""
        return replace(self, **{field.name: getattr(self, field.name).to(device) for field in fields(self)})

    def selections(self, protected: int) -> list[Selection]:
        """Per image the map over its patches, `protected` tokens left out; without weights if none absorbed another."""
        anchors = self.kept[:, protected:] - protected
        weights = self.matrix()[:, protected:, protected:]  # what CLS absorbed is no patch's
        if int(weights.count_nonzero()) == anchors.numel():
            return [Selection(anchor) for anchor in anchors]
        return [Selection(anchor, weight) for anchor, weight in zip(anchors, weights, strict=True)]


@dataclass(frozen=True)
class Mixture(TokenMap):
    """A map in which a token may go into several outputs.

    Args:
        weight: `[images, outputs, tokens]` float32, how much of each token goes into each output.
    """

    weight: Tensor

    def matrix(self) -> Tensor:
        """The weights."""
        return self.weight


@dataclass(frozen=True)
class Reduction(TokenMap):
    """A map in which every token goes into one output at most, and which needs no matrix.

    Args:
        group: `[images, tokens]` int64, the output each token goes into.
        share: `[images, tokens]` float32, its weight there; 0 if it is dropped.
    """

    group: Tensor
    share: Tensor

    @classmethod
    def average(cls, matching: Matching, mass: Tensor, size: Tensor) -> Reduction:
        """Each output is the mean of its tokens weighted by `mass` `[images, tokens]`, and the sum of their `size`."""
        total = matching.sum(mass[..., None])[..., 0]
        share = mass / total.gather(-1, matching.group)
        return cls(matching.kept, matching.sum(size[..., None])[..., 0], matching.group, share)

    @classmethod
    def keep(cls, kept: Tensor, size: Tensor) -> Reduction:
        """The tokens `kept` as they are; all others are dropped."""
        outputs = torch.arange(kept.shape[-1], device=kept.device).expand_as(kept)
        group = torch.zeros_like(size, dtype=torch.long).scatter(-1, kept, outputs)
        share = torch.zeros_like(size).scatter(-1, kept, 1.0)
        return cls(kept, size.gather(-1, kept), group, share)

    def matrix(self) -> Tensor:
        """The shares, each in the row of its token's group."""
        weight = self.share.new_zeros(*self.kept.shape, self.share.shape[-1])
        return weight.scatter(1, self.group[:, None], self.share[:, None])

    def apply(self, tokens: Tensor) -> Tensor:
        """Map `[images, tokens, width]` to `[images, outputs, width]`, computed in float32."""
        weighted = tokens.float() * self.share[..., None]
        return Matching(self.kept, self.group).sum(weighted).to(tokens.dtype)

    def then(self, later: TokenMap) -> TokenMap:
        """This map followed by `later`, as one over the tokens of this one; a reduction if both are."""
        if not isinstance(later, Reduction):
            return super().then(later)
        kept, group = self.kept.gather(-1, later.kept), later.group.gather(-1, self.group)
        return Reduction(kept, later.size, group, self.share * later.share.gather(-1, self.group))


class EncoderMethod(ABC):
    """Answers two questions: how many tokens each encoder layer leaves, and what becomes of those of one layer.

    Subclasses are frozen dataclasses whose fields are the options; `keep` never is one of them. CLS stays always.
    """

    info: ClassVar[MethodInfo]

    @property
    def exact_count(self) -> bool:
        """Whether exactly the budget is kept."""
        return True

    @property
    def place(self) -> Place:
        """Where in a layer tokens are removed: between "attention" and MLP, or at the end of the "layer"."""
        return "layer"

    @property
    def proportional(self) -> bool:
        """Whether attention counts a token as many times as it stands for patches (proportional attention)."""
        return False

    def needs(self, encoder: EncoderFacts) -> Needs:
        """The statistics to tap, each with the layers that remove tokens by it."""
        return Needs()

    @abstractmethod
    def schedule(self, tokens: int, keep: int, encoder: EncoderFacts) -> list[Step]:
        """What the layers 0..used-1 do so that `keep` of `tokens` are left; called only when `0 < keep < tokens`.

        Raises:
            SpecError: the method cannot come down to `keep`.
        """

    @abstractmethod
    def reduce(self, tokens: LayerTokens, step: Step) -> TokenMap:
        """Bring the tokens of one layer down to `step.left`; called only where that is fewer than there are."""

    def plan(self, tokens: int, keep: int, encoder: EncoderFacts) -> list[Step]:
        """The checked schedule; empty if nothing is to be removed.

        Raises:
            SpecError: the method cannot come down to `keep`, or its schedule is none.
        """
        if keep >= tokens:
            return []
        steps = self.schedule(tokens, keep, encoder)
        counts = [tokens, *(step.left for step in steps)]
        if len(steps) != encoder.used or counts[-1] != keep or counts != sorted(counts, reverse=True):
            raise SpecError(f"method {self.info.name!r} planned {counts} tokens for a budget of {keep}.")
        return steps


def require_halving(name: str, tokens: int, keep: int, layers: int) -> None:
    """Refuse a budget that `layers` layers which remove at most half of their tokens each cannot reach."""
    least = tokens
    for _ in range(layers):
        least -= least // 2
    if keep < least:
        raise SpecError(
            f"{name} cannot keep {keep} of {tokens} tokens: a layer merges at most half of its tokens away, so "
            f"{layers} layers leave at least {least}."
        )


def left_at(layers: Sequence[int], targets: Sequence[int], tokens: int, encoder: EncoderFacts) -> list[int]:
    """Tokens left after each layer of `encoder` if those of `layers` leave `targets` and the others all."""
    by_layer, left = dict(zip(layers, targets, strict=True)), []
    for layer in range(encoder.used):
        tokens = by_layer.get(layer, tokens)
        left.append(tokens)
    return left


def constant_ratio_at(layers: Sequence[int], tokens: int, keep: int, encoder: EncoderFacts) -> list[int]:
    """Tokens left after each layer of `encoder` if those of `layers` keep the same fraction and the others all."""
    return left_at(layers, constant_ratio(tokens, keep, len(layers)), tokens, encoder)


def constant_ratio(tokens: int, keep: int, steps: int) -> list[int]:
    """Tokens left after each of `steps` steps that keep the same fraction, as nearly as whole tokens allow."""
    return [round(tokens * (keep / tokens) ** (step / steps)) for step in range(1, steps)] + [keep]
