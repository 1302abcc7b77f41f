"""Teaching a vision encoder what every patch shows, and its CLS token what the picture contains."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmcompress.evals.micro.training.families import Hidden
from mmcompress.evals.micro.training.targets import (
    BACKGROUND,
    BLANK,
    FIELDS,
    GLYPH,
    IGNORE,
    PLACE,
    SLOTS,
    SUMMARY,
    TEXT,
)

# Of the layer the LLM reads, and of the last.
_PATCH_WEIGHTS = (1.0, 0.3)
_SUMMARY_WEIGHTS = (0.5, 0.5)
_BACKGROUND_WEIGHT = 0.15
_FIELD_WEIGHTS = (1.0, 1.0, *[0.5] * SLOTS, 0.2, 0.2, 1.0)
_WRITTEN = {*range(len(FIELDS))[TEXT], GLYPH}
_RARE_FACT_WEIGHT = 4.0

Metrics = dict[str, Tensor]


class VisionHeads(nn.Module):
    """Linear read-outs of patches and summaries, thrown away after training.

    Args:
        hidden: width of the states.
        levels: of patches that are read.
        summaries: that are read.
        characters: weight of what signs say, relative to the other labels.
    """

    def __init__(self, hidden: int, levels: int, summaries: int, characters: float = 1.0) -> None:
        super().__init__()
        self.characters = characters
        self.patches = nn.ModuleList(_read_out(hidden, sum(FIELDS)) for _ in range(levels))
        self.summaries = nn.ModuleList(_read_out(hidden, SUMMARY) for _ in range(summaries))

    def forward(self, hidden: Hidden, labels: Tensor, facts: Tensor | None) -> tuple[Tensor, Metrics]:
        """The loss, and shares of right labels at the layer the LLM reads.

        Args:
            hidden: of a batch of pictures.
            labels: [batch, fields, patches].
            facts: [batch, SUMMARY], needed for summaries only.
        """
        loss = labels.new_zeros((), dtype=torch.float32)
        metrics: Metrics = {}
        flat = labels.transpose(0, 1).flatten(1)
        for level, (states, head, weight) in enumerate(zip(hidden.patches, self.patches, _PATCH_WEIGHTS, strict=False)):
            predicted = head(states).float().flatten(0, 1).split(FIELDS, dim=1)
            loss = loss + weight * _patch_loss(predicted, flat, self.characters)
            if level == 0:
                metrics |= _patch_metrics(predicted, flat)
        for states, head, weight in zip(hidden.summaries, self.summaries, _SUMMARY_WEIGHTS, strict=False):
            assert facts is not None
            said = head(states).float()
            rare = torch.tensor(_RARE_FACT_WEIGHT, device=said.device)
            wrong = functional.binary_cross_entropy_with_logits(said, facts, pos_weight=rare, reduction="sum")
            loss = loss + weight * wrong / facts.sum()
            metrics["facts recalled"] = ((said > 0) * facts).sum() / facts.sum()
        return loss, metrics


def _read_out(hidden: int, classes: int) -> nn.Module:
    return nn.Sequential(nn.LayerNorm(hidden), nn.Linear(hidden, classes))


def _patch_loss(predicted: tuple[Tensor, ...], labels: Tensor, characters: float) -> Tensor:
    class_weights = predicted[0].new_ones(FIELDS[0])
    class_weights[BACKGROUND] = _BACKGROUND_WEIGHT
    loss = functional.cross_entropy(predicted[0], labels[0], class_weights)
    weights = [weight * (characters if field in _WRITTEN else 1) for field, weight in enumerate(_FIELD_WEIGHTS)]
    for logits, label, weight in zip(predicted[1:], labels[1:], weights[1:], strict=True):
        said = (label != IGNORE).sum().clamp(min=1)  # a batch may show no sign
        loss = loss + weight * functional.cross_entropy(logits, label, ignore_index=IGNORE, reduction="sum") / said
    return loss


@torch.no_grad()
def _patch_metrics(predicted: tuple[Tensor, ...], labels: Tensor) -> Metrics:
    said = torch.stack([logits.argmax(1) for logits in predicted])
    right = said == labels
    things = labels[0] != BACKGROUND
    signs = labels[GLYPH] != IGNORE
    written = (labels[TEXT] != IGNORE) & (labels[TEXT] != BLANK)
    return {
        "kind": right[0][things].float().mean(),
        "color": right[1][things].float().mean(),
        "characters": right[TEXT][written].float().mean(),
        "glyphs": right[GLYPH][signs].float().mean(),
        "place": right[PLACE, things].float().mean(),
    }
