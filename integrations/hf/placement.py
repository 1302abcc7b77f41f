"""Finding encoded items in a batch of prompts, and showing them to a method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from mmcompress.errors import InputError, UnsupportedError
from mmcompress.integrations.hf.families import Family, Layout
from mmcompress.integrations.hf.taps import FEATURES, Key
from mmcompress.integrations.hf.text_tower import TextTower
from mmcompress.integrations.hf.vision import Encoded
from mmcompress.types import Modality, Needs, Selection, VisualItem


@dataclass(frozen=True)
class Placed:
    """An item at its place in the batch.

    Args:
        rows: the batch rows that hold it (several under beam search).
        positions: `[candidates]` columns of its candidate tokens.
        separators: how many separator tokens it has beside them.
        features: `[candidates, width]` what the projector made them of, gradients included; None if it was not tapped.
        reduced: which candidates the encoder left and what they absorbed; None if it left all.
    """

    item: VisualItem
    rows: range
    positions: Tensor
    separators: int
    features: Tensor | None
    reduced: Selection | None

    def with_drafted(self, drafted: Tensor) -> Placed:
        """The same with its part of what a draft attends to, `[batch, layers, columns]`."""
        return replace(self, item=replace(self.item, drafted=drafted[self.rows[0]][:, self.positions]))


def place_items(
    family: Family,
    needs: Needs,
    encoded: Mapping[Modality, Encoded],
    embeds: Tensor,
    visual: Mapping[Modality, Tensor],
    current: Tensor,
    text_tower: TextTower | None = None,
    ids: Tensor | None = None,
) -> list[Placed]:
    """Find every encoded item in the prompts, in row order.

    Args:
        family: facts about the model.
        needs: what the method reads.
        encoded: what the vision encoder made, by modality.
        embeds: `[batch, length, dim]` prompt embeddings, features merged in.
        visual: `[batch, length]` placeholder masks by modality.
        current: `[batch, length]` which columns are no padding.
        text_tower: what relates features to the prompts' text, for methods that need it.
        ids: `[batch, length]` token ids of the prompts, where they are known.

    Raises:
        UnsupportedError: an item was not encoded under watch, or is only partly here; or `text_tower` has no `ids`.
        InputError: placeholders and features do not match.
    """
    any_visual = torch.stack([mask.to(embeds.device) for mask in visual.values()]).any(dim=0)
    is_text = current & ~any_visual
    if text_tower is not None and ids is None:
        raise UnsupportedError("the text tower reads the prompt's token ids; pass input_ids, not inputs_embeds.")
    placed: list[tuple[int, int, Placed]] = []
    for modality, mask in visual.items():
        places = mask.to(embeds.device).nonzero()
        if len(places) == 0:
            continue
        known = _matching(encoded.get(modality), modality, len(places))
        layouts, statistics, reductions = known.layouts, known.statistics, known.reduced
        copies = len(places) // sum(len(layout.separator) for layout in layouts)
        originals = places[places[:, 0] % copies == 0]
        if family.joins_runs:
            layouts, statistics = _join_runs(originals, layouts, statistics)
            reductions = [None] * len(layouts)  # these families have no encoder stage
        lengths = [len(layout.separator) for layout in layouts]
        bounds = [(end - length, end - 1) for length, end in zip(lengths, accumulate(lengths), strict=True)]
        # At once, for the host waits for every number that it reads.
        corners = originals[torch.tensor(bounds, device=originals.device)].tolist()
        items = zip(layouts, statistics, reductions, originals[:, 1].split(lengths), corners, strict=True)
        for number, (layout, values, reduced, columns, ((row, column), (last_row, _))) in enumerate(items):
            if last_row != row:
                raise InputError(f"{modality} {number} has {len(columns)} features but row {row} has room for fewer.")
            candidates = columns[~layout.separator.to(columns.device)]
            features = values[FEATURES].to(embeds.device) if FEATURES in values else None
            item = visual_item(
                layout,
                values,
                embeds.detach()[row, candidates],
                modality,
                label=f"{modality} {number} (row {row})",
                text=embeds.detach()[row, is_text[row]] if needs.text else None,
            )
            if text_tower is not None and ids is not None and item.features is not None:
                prompt = ids[row, is_text[row].to(ids.device)]
                item = replace(item, relevance=text_tower.relevance(item.features, prompt))
            rows = range(row, row + copies)
            separators = len(columns) - len(candidates)
            placed.append((row, column, Placed(item, rows, candidates, separators, features, reduced)))
    return [entry for *_, entry in sorted(placed, key=lambda found: found[:2])]


def visual_item(
    layout: Layout,
    values: Mapping[Key, Tensor],
    embeddings: Tensor,
    modality: Modality,
    label: str,
    text: Tensor | None = None,
) -> VisualItem:
    """An item as methods see it, from its `layout`, its statistics `values` and its tokens `[tokens, dim]`."""
    device = embeddings.device
    return VisualItem(
        embeddings=embeddings,
        grids=layout.grids,
        tiles=layout.tiles.to(device),
        modality=modality,
        label=label,
        crops=layout.crops,
        features=values[FEATURES].detach().float().to(device) if FEATURES in values else None,
        text=text,
        **_by_layer(values, device),
    )


def _matching(encoded: Encoded | None, modality: Modality, placeholders: int) -> Encoded:
    """What was encoded, if it fits the number of placeholders."""
    if encoded is None:
        raise UnsupportedError(
            f"{modality} features were not encoded by the wrapped model; pass the pixel inputs, or call "
            f"model.get_{modality}_features after wrapping."
        )
    features = sum(len(layout.separator) for layout in encoded.layouts)
    if placeholders < features:
        raise UnsupportedError(
            f"the prompt holds {placeholders} of {features} {modality} tokens; an item must arrive in one piece "
            "(do not use prefill_chunk_size with compression)."
        )
    if placeholders % features:
        raise InputError(f"{placeholders} {modality} placeholders do not match {features} features.")
    return encoded


def _by_layer(values: Mapping[Key, Tensor], device: torch.device) -> dict[str, Any]:
    """`(name, layer) -> values` as one mapping per statistic."""
    named: dict[str, dict[int, Tensor]] = {}
    for (name, layer), value in values.items():
        if (name, layer) != FEATURES:
            named.setdefault(name, {})[layer] = value.to(device)
    return named


def _join_runs(
    places: Tensor, layouts: list[Layout], statistics: list[dict[Key, Tensor]]
) -> tuple[list[Layout], list[dict[Key, Tensor]]]:
    """Join the tiles that share an unbroken run of placeholders `[placeholders, (row, column)]` into one item."""
    per_tile = len(layouts[0].separator)
    follows = (places[1:, 0] == places[:-1, 0]) & (places[1:, 1] == places[:-1, 1] + 1)
    starts = [0, *(torch.nonzero(~follows).flatten() + 1).tolist(), len(places)]
    joined_layouts, joined_statistics = [], []
    for begin, end in zip(starts, starts[1:], strict=False):
        if (end - begin) % per_tile:
            raise InputError(f"a run of {end - begin} image placeholders is no multiple of a tile's {per_tile}.")
        tiles = range(begin // per_tile, end // per_tile)
        count = len(tiles)
        # With several tiles the thumbnail comes last, and thumbnails have number 0.
        numbers = torch.tensor([(i + 1) % count for i in range(count)], device=places.device)
        joined_layouts.append(
            replace(
                layouts[tiles[0]],
                separator=torch.cat([layouts[tile].separator for tile in tiles]),
                grids=tuple(grid for tile in tiles for grid in layouts[tile].grids),
                tiles=numbers.repeat_interleave(per_tile),
            )
        )
        names = statistics[tiles[0]]
        joined_statistics.append({name: torch.cat([statistics[tile][name] for tile in tiles]) for name in names})
    return joined_layouts, joined_statistics
