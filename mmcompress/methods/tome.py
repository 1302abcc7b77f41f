"""ToMe: the same number of similar tokens merged in every encoder layer."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count

from mmcompress.encoder_method import (
    EncoderMethod,
    LayerTokens,
    Place,
    Reduction,
    Step,
    require_halving,
)
from mmcompress.merging import soft_match
from mmcompress.registry import register
from mmcompress.statistics import key_metric
from mmcompress.types import EncoderFacts, Needs


@register(
    "tome",
    summary="Bipartite merging of similar tokens in every encoder layer, equally many in each.",
    family="merging",
    stage="encoder",
    paper="Token Merging: Your ViT But Faster, arXiv:2210.09461",
    licence="CC BY-NC 4.0",
)
@dataclass(frozen=True)
class ToMe(EncoderMethod):
    """Bipartite soft matching between attention and MLP of every layer (Section 3).

    Tokens at even places are compared with those at odd places by the cosine of their keys, averaged over heads; the
    most similar ones merge into a mean weighted by how many patches they stand for. Every layer merges r tokens, the
    first ones one more where the budget does not divide. A layer can merge no more than half of its tokens: where r
    is more, the other layers merge more.

    Args:
        proportional: attention counts a token as many times as it stands for patches.
    """

    proportional: bool = True

    @property
    def place(self) -> Place:
        """Between attention and MLP."""
        return "attention"

    def needs(self, encoder: EncoderFacts) -> Needs:
        """The keys of every layer."""
        return Needs(key_metric=tuple(range(encoder.used)))

    def schedule(self, tokens: int, keep: int, encoder: EncoderFacts) -> list[Step]:
        """Constant r; the remainder goes to the first layers."""
        require_halving("tome", tokens, keep, encoder.used)
        # One more asked for is at most one more merged, so the budget is met exactly.
        for asked in count(tokens - keep):
            left = [tokens]
            for extra in range(encoder.used):
                wanted = asked // encoder.used + (extra < asked % encoder.used)
                left.append(left[-1] - min(wanted, left[-1] // 2))
            if left[-1] == keep:
                break
        return [Step(number) for number in left[1:]]

    def reduce(self, tokens: LayerTokens, step: Step) -> Reduction:
        """One bipartite matching, averaged by size."""
        assert tokens.attention is not None
        metric = key_metric(*tokens.attention)
        matching = soft_match(metric, tokens.count - step.left, tokens.protected)
        return Reduction.average(matching, tokens.size, tokens.size)
