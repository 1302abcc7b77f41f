"""Removing tokens from what enters the text model: a method chooses, embeddings, positions and planes follow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from mmcompress.budget import Budget
from mmcompress.compact import ragged_origin, renumber, take, take_positions
from mmcompress.encoder_method import EncoderMethod
from mmcompress.integrations.hf.account import account, llm_shape
from mmcompress.integrations.hf.call import Call, Removal
from mmcompress.integrations.hf.clock import Span, StageClock
from mmcompress.integrations.hf.families import Family
from mmcompress.integrations.hf.llm_run import Prompt
from mmcompress.integrations.hf.placement import Placed, place_items
from mmcompress.integrations.hf.text_tower import TextTower
from mmcompress.integrations.hf.vision import Encoded
from mmcompress.method import VisualMethod, require_finite
from mmcompress.projector_method import ProjectorMethod
from mmcompress.types import Modality, Needs, Positions, Selection


class Remover:
    """Removes tokens as one method says from the prompts of one model.

    Args:
        family: facts about the model.
        method: what chooses; with None, or one that chose before, all that is left stays.
        needs: what it reads.
        positions: how kept tokens are numbered.
        projector: what tokens that absorb others are made by anew; None if they absorb each other as they are.
        text_tower: what relates features to the prompts' text, for methods that need it.
    """

    def __init__(
        self,
        family: Family,
        method: VisualMethod | EncoderMethod | ProjectorMethod | None,
        needs: Needs,
        positions: Positions,
        projector: nn.Module | None,
        text_tower: TextTower | None,
    ) -> None:
        self._family, self._method, self._needs = family, method, needs
        self._positions, self._projector = positions, projector
        self._text_tower = text_tower
        self._decoder: Any = family.base.get_decoder()

    def remove(
        self,
        kwargs: Mapping[str, Any],
        call: Call,
        current: Tensor,
        positions: Tensor,
        encoded: Mapping[Modality, Encoded],
        keep: Budget,
        newlines: bool,
    ) -> tuple[dict[str, Any], Prompt, Tensor]:
        """Remove tokens from one prefill.

        Args:
            kwargs: what the text model is given.
            call: the pass, which gets the removal.
            current: `[batch, length]` bool, which columns are no padding.
            positions: `[..., batch, length]`.
            encoded: what the vision encoder made, by modality.
            keep: how much stays.
            newlines: whether separator tokens stay.

        Returns:
            `kwargs` with what is left, its columns, and their positions `[..., batch, kept]`.
        """
        embeds: Tensor = kwargs["inputs_embeds"]
        span = Span(embeds.device)
        asked = current.clone()
        asked[:, asked.shape[1] - call.tail :] = False
        placed = place_items(self._family, self._needs, encoded, embeds, call.visual, asked, self._text_tower, call.ids)
        if call.drafted is not None:
            placed = [entry.with_drafted(call.drafted) for entry in placed]
        selections = self._select(placed, keep)

        visual = torch.stack([mask.to(embeds.device) for mask in call.visual.values()]).any(dim=0)
        stays, source, item = _mark(placed, selections, current if newlines else current & ~visual)
        index, origin = ragged_origin(stays, source, pad_left=bool(current[:, -1].all()))
        valid = index >= 0
        kwargs = {**kwargs, **self._gather(kwargs, placed, selections, origin)}
        kept_positions = take_positions(positions, origin)
        if self._positions == "renumber":
            kept_positions, shift = renumber(positions, current, kept_positions, valid)
            call.state.shift = shift if call.state.shift is None else call.state.shift + shift

        clock = StageClock()
        clock.add("encoder", *(span for part in encoded.values() for span in part.spans))
        clock.add("selection", span.stop())
        columns = torch.arange(1, visual.shape[1] + 1, device=visual.device)
        call.state.floor = call.seen + int((visual.any(dim=0) * columns).max())
        stats, trace = account(
            llm_shape(self._decoder), encoded.values(), placed, selections, newlines, asked, stays & asked
        )
        call.removal = Removal(stays, index, stats, trace, clock)
        item = take(item, origin).masked_fill(~valid, -1)
        return kwargs, Prompt(valid, item, take(~visual, origin) & valid, call.tail), kept_positions

    def _select(self, placed: Sequence[Placed], keep: Budget) -> list[Selection]:
        items = [entry.item for entry in placed]
        if isinstance(self._method, VisualMethod):
            return self._method.compress(items, keep, self._needs)
        for item in items:
            require_finite(item, self._needs)
        if self._method is None:
            return [Selection.everything(len(item), item.embeddings.device) for item in items]
        # What tokens absorbed in the encoder is in their features already.
        return [
            Selection.everything(len(entry.item), entry.positions.device)
            if entry.reduced is None
            else Selection(entry.reduced.anchor.to(entry.positions.device))
            for entry in placed
        ]

    def _gather(
        self, kwargs: Mapping[str, Any], placed: Sequence[Placed], selections: Sequence[Selection], origin: Tensor
    ) -> dict[str, Any]:
        """The columns `origin` `[batch, kept]` of embeddings and DeepStack planes, with what they absorbed."""
        embeds: Tensor = kwargs["inputs_embeds"]
        flat_row = torch.arange(embeds[..., 0].numel(), device=embeds.device).view(embeds.shape[:2])
        merged = _merge(embeds.flatten(0, 1), flat_row, placed, selections, self._projector).view_as(embeds)
        gathered: dict[str, Any] = {"inputs_embeds": take(merged, origin)}
        planes = kwargs.get("deepstack_visual_embeds")
        if planes is not None:
            seen: Tensor = kwargs["visual_pos_masks"]
            plane_row = (seen.flatten().cumsum(0) - 1).view_as(seen)
            still = take(seen, origin) & (origin >= 0)
            rows = take(plane_row, origin)[still]
            gathered["visual_pos_masks"] = still
            gathered["deepstack_visual_embeds"] = [
                _merge(plane, plane_row, placed, selections)[rows] for plane in planes
            ]
        return gathered


def _mark(placed: Sequence[Placed], selections: Sequence[Selection], others: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which columns stay, which one each is filled from, and the number of its item or -1; all `[batch, length]`.

    Args:
        placed: the items.
        selections: what stays of each.
        others: `[batch, length]` bool, which of the columns that are no candidates stay.
    """
    keep = others.clone()
    source = torch.arange(others.shape[1], device=others.device).repeat(len(others), 1)
    item = torch.full_like(source, -1)
    for number, (entry, selection) in enumerate(zip(placed, selections, strict=True)):
        rows = torch.tensor(entry.rows, device=others.device)[:, None]
        anchors = entry.positions[selection.anchor]
        keep[rows, entry.positions] = False
        keep[rows, anchors] = True
        item[rows, anchors] = number
        source[rows, anchors.sort().values] = anchors
    return keep, source, item


def _merge(
    rows: Tensor,
    row_of: Tensor,
    placed: Sequence[Placed],
    selections: Sequence[Selection],
    projector: nn.Module | None = None,
) -> Tensor:
    """Write what merged tokens absorb into `rows` `[all, dim]`; `row_of` `[batch, length]` finds a token's row.

    With a `projector`, tokens absorb features and are made of them anew.
    """
    if all(selection.weight is None for selection in selections):
        return rows
    merged = rows.clone()
    for entry, selection in zip(placed, selections, strict=True):
        if selection.weight is None:
            continue
        members = [row_of[row, entry.positions] for row in entry.rows]
        if projector is None:
            outputs = [selection.apply(rows[tokens]) for tokens in members]
        else:
            outputs = [projector(selection.apply(cast(Tensor, entry.features))).to(rows)] * len(members)
        for tokens, output in zip(members, outputs, strict=True):
            merged[tokens[selection.anchor]] = output
    return merged
