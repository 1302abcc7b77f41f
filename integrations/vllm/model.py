"""The workers' side: encoded images lose tokens before they are stored, and what stays keeps its position."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mmcompress.budget import Budget
from mmcompress.errors import InputError
from mmcompress.integrations.hf.families import Layout, LlavaNext
from mmcompress.integrations.hf.placement import visual_item
from mmcompress.integrations.hf.taps import Captured, Key
from mmcompress.integrations.hf.text_tower import TextTower
from mmcompress.integrations.hf.vision import by_item
from mmcompress.integrations.vllm.compression import Compression, origins
from mmcompress.integrations.vllm.processor import COUNTS, QUERY
from mmcompress.integrations.vllm.taps import EngineTaps
from mmcompress.methods.uniform import Uniform
from mmcompress.types import Needs, Selection, VisualItem

_LOG = logging.getLogger("vllm.mmcompress")


class Compressed:
    """Stands before a LLaVA-like model of vLLM and compresses its images."""

    compression: Compression
    vision_tower: Any
    multi_modal_projector: Any
    get_language_model: Any

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        hf_config = vllm_config.model_config.hf_config
        self.compression = Compression.of(hf_config)
        self._width = hf_config.get_text_config().hidden_size
        self._tokens_at_once = vllm_config.scheduler_config.max_num_batched_tokens
        self._load_layers(vllm_config, prefix)
        self._tap()

    def _tap(self) -> None:
        """Have everything read that the method needs."""
        needs = self.compression.needs
        self._taps = EngineTaps(self._attentions, self._feature_source, needs, self._behind_encoder)
        folder = needs.text_tower
        self._text_tower = None if folder is None else _Unregistered(TextTower(folder, self.compression.family))

    @property
    def _blocks(self) -> list[Any]:
        return list(self.vision_tower.vision_model.encoder.layers)

    @property
    def _attentions(self) -> list[nn.Module]:
        return [block.self_attn.attn for block in self._blocks]

    @property
    def _feature_source(self) -> nn.Module:
        return self._blocks[self.compression.encoder.used - 1]

    @property
    def _behind_encoder(self) -> nn.Module | None:
        """The module at whose input features are read, where not behind the layer they come from."""
        return self.multi_modal_projector if self.compression.method.space == "pre_projector" else None

    def _load_layers(self, vllm_config: Any, prefix: str) -> None:
        """Have all layers loaded that the method reads; vLLM leaves out those behind the features."""
        last = max((layer for layers in self.compression.needs.layers().values() for layer in layers), default=0)
        used, encoder = self.compression.encoder.used, self.vision_tower.vision_model.encoder
        for number in range(len(encoder.layers), last + 1):
            encoder.layers.append(
                type(encoder.layers[0])(
                    encoder.config,
                    vllm_config.quant_config,
                    prefix=f"{prefix}.vision_tower.vision_model.encoder.layers.{number}".removeprefix("."),
                    attn_cls=type(self._attentions[0]),
                )
            )
        if len(encoder.layers) > used:
            run = encoder.forward

            def forward(inputs_embeds: Tensor, return_all_hidden_states: bool) -> Any:
                states = run(inputs_embeds, return_all_hidden_states=True)[: used + 1]
                return states if return_all_hidden_states else states[-1]

            encoder.forward = forward

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """The tokens of every image that enter the LLM, `[placeholders, dim]` each."""
        counts, queries = kwargs.pop(COUNTS, None), kwargs.pop(QUERY, None)
        if counts is None:
            return super().embed_multimodal(**kwargs)  # type: ignore[misc]
        embedded: list[Tensor] = []
        for begin, end in self._batches(counts[:, 2].tolist()):
            fields = self._images(kwargs, begin, end)
            with self._taps.collect() as captured:
                rows = list(super().embed_multimodal(**fields))  # type: ignore[misc]
            asked = [None] * len(rows) if queries is None else queries[begin:end]
            embedded += self._compress(rows, captured, fields, counts[begin:end, 0].tolist(), asked)
        return embedded

    def _batches(self, tokens: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Stretches of images that would be encoded together without compression, whose limit is on tokens."""
        begin, total = 0, 0
        for image, count in enumerate(tokens):
            if image > begin and total + count > self._tokens_at_once:
                yield begin, image
                begin, total = image, 0
            total += count
        yield begin, len(tokens)

    def _images(self, fields: Mapping[str, Any], begin: int, end: int) -> dict[str, Any]:
        """The fields of the images `begin` to `end`, without the empty tiles of those that have fewer than others."""
        part = {name: value[begin:end] for name, value in fields.items()}
        family = self.compression.family
        if isinstance(family, LlavaNext):
            counts = family.tile_counts(self.compression.call(part))
            part["pixel_values"] = [tiles[:count] for tiles, count in zip(part["pixel_values"], counts, strict=True)]
        return part

    def _compress(
        self,
        rows: list[Tensor],
        captured: Captured,
        fields: Mapping[str, Any],
        budgets: list[int],
        queries: Sequence[Tensor | None],
    ) -> list[Tensor]:
        call = self.compression.call(fields)
        layouts = self.compression.layouts(len(rows), call, rows[0].device)
        statistics = by_item(self.compression.family, layouts, captured, "image", call)
        items = [
            self._item(f"image {number}", *parts)
            for number, parts in enumerate(zip(rows, layouts, statistics, queries, strict=True))
        ]
        selections: dict[int, Selection] = {}
        for budget in dict.fromkeys(budgets):
            numbers = [number for number, tokens in enumerate(budgets) if tokens == budget]
            chosen = self._select([items[number] for number in numbers], Budget(budget))
            selections |= dict(zip(numbers, map(_agreed, chosen), strict=True))
        return [
            self._kept(rows[number], layouts[number], items[number], selection)
            for number, selection in sorted(selections.items())
        ]

    def _item(
        self, label: str, rows: Tensor, layout: Layout, statistics: Mapping[Key, Tensor], query: Tensor | None
    ) -> VisualItem:
        ids = None if query is None else query.to(rows.device)
        text = self.get_language_model().embed_input_ids(ids) if self.compression.needs.text else None
        item = visual_item(layout, statistics, rows[~layout.separator, : self._width], "image", label, text)
        if self._text_tower is None or ids is None or item.features is None:
            return item
        return replace(item, relevance=self._text_tower.module.relevance(item.features, ids))

    def _select(self, items: list[VisualItem], keep: Budget) -> list[Selection]:
        try:
            return self.compression.method.compress(items, keep, self.compression.needs)
        except InputError as error:
            # An exception here would end the engine for everybody.
            if len(items) > 1:
                return [selection for item in items for selection in self._select([item], keep)]
            _LOG.warning("mmcompress: %s Its answer is worthless.", error)
            return [Uniform().select(items[0], keep.tokens(len(items[0])), Needs())]

    def _kept(self, rows: Tensor, layout: Layout, item: VisualItem, selection: Selection) -> Tensor:
        """What is left of an image's `rows` `[tokens, dim]`."""
        method = self.compression.method
        if selection.weight is not None:
            candidates = (~layout.separator).nonzero().flatten()
            merged = selection.apply(rows[candidates])
            if method.space == "pre_projector" and item.features is not None:
                merged = self.multi_modal_projector(selection.apply(item.features).to(rows.dtype))
            rows = rows.clone()
            rows[candidates[selection.anchor]] = merged
        return rows[origins(layout, selection.anchor, method.newlines)]


def _agreed(selection: Selection) -> Selection:
    """What the first of the ranks that share a model selected: rounding may differ, and tokens must not."""
    from vllm.distributed import get_tp_group

    group = get_tp_group()
    if group.world_size == 1:
        return selection
    weight = selection.weight
    return Selection(
        group.broadcast(selection.anchor.contiguous()),
        None if weight is None else group.broadcast(weight.contiguous()),
    )


class _Unregistered:
    """A module that is no part of the model it is used by: its weights are not the checkpoint's."""

    def __init__(self, module: Any) -> None:
        self.module = module


POSITIONS_FACTOR = 4
"""How many times the positions that the text model knows vLLM has in its M-RoPE tables."""


class CompressedMRoPE(Compressed):
    """Stands before a Qwen-VL model of vLLM, whose tokens have a row and a column.

    To the engine all tokens of an image sit at its first position, and text goes on where it would without
    compression: so no position depends on what is kept, and any prefix of a prompt can be taken from a cache. The
    rows and columns of kept tokens travel as further channels of their embeddings and are added in `forward`.
    """

    visual: Any
    _offsets: tuple[Tensor, Tensor] | None = None

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        model_config = vllm_config.model_config
        self._length = model_config.max_model_len
        self._positions = POSITIONS_FACTOR * model_config.hf_config.get_text_config().max_position_embeddings

    @property
    def _blocks(self) -> list[Any]:
        return list(self.visual.blocks)

    @property
    def _attentions(self) -> list[nn.Module]:
        return [block.attn.attn for block in self._blocks]

    @property
    def _behind_encoder(self) -> nn.Module | None:
        # The layers themselves are called past their hooks.
        merger = self.visual.merger
        first = merger.ln_q if hasattr(merger, "ln_q") else merger.norm
        return first if self.compression.needs.features else None

    def _load_layers(self, vllm_config: Any, prefix: str) -> None:
        """Nothing to do: all layers shape the features."""

    def _images(self, fields: Mapping[str, Any], begin: int, end: int) -> dict[str, Any]:
        grids = fields["image_grid_thw"]
        sizes = grids.prod(dim=-1).tolist()
        first, last = sum(sizes[:begin]), sum(sizes[:end])
        return {"pixel_values": fields["pixel_values"][first:last], "image_grid_thw": grids[begin:end]}

    def _kept(self, rows: Tensor, layout: Layout, item: VisualItem, selection: Selection) -> Tensor:
        kept = super()._kept(rows, layout, item, selection)
        place = origins(layout, selection.anchor, newlines=True)
        columns = layout.grids[0][1]
        return torch.cat([kept, _encode(torch.stack([place // columns, place % columns], dim=1)).to(kept)], dim=1)

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[Tensor, int]:
        """The model's own positions of the uncompressed prompt, an image's tokens at the position of its first."""
        tokens, features, images = list(input_tokens), [], []
        added = 0
        for feature in sorted(mm_features, key=lambda feature: feature.mm_position.offset):
            place = feature.mm_position
            offset, kept = place.offset + added, place.length
            features.append(replace(feature, mm_position=replace(place, offset=offset)))
            if feature.modality == "image":
                whole = int(feature.data[COUNTS].data[2])
                tokens[offset + kept : offset + kept] = [tokens[offset]] * (whole - kept)
                images.append((offset, kept, whole))
                added += whole - kept
        positions, delta = super().get_mrope_input_positions(tokens, features)  # type: ignore[misc]
        stays = torch.ones(len(tokens), dtype=torch.bool)
        for offset, kept, whole in images:
            positions[:, offset : offset + kept] = positions[:, offset : offset + 1]
            stays[offset + kept : offset + whole] = False
        return self._within_reach(positions[:, stays], delta + added, max((size for *_, size in images), default=0))

    def _within_reach(self, positions: Tensor, delta: int, size: int) -> tuple[Tensor, int]:
        """Keep positions within the model's table, which many images of which almost nothing is kept could leave."""
        room = self._positions - self._length
        if delta <= room:
            return positions, delta
        _LOG.warning("mmcompress: positions of a prompt exceed what the model knows; its answer is worthless.")
        return positions.clamp(max=self._positions - size), room

    def embed_input_ids(
        self, input_ids: Tensor, multimodal_embeddings: Any = None, *, is_multimodal: Tensor | None = None
    ) -> Tensor:
        """Merge features into embeddings, after taking off the channels that hold positions."""
        self._offsets = None
        if multimodal_embeddings is not None and len(multimodal_embeddings) and is_multimodal is not None:
            parts = [self._split(rows) for rows in multimodal_embeddings]
            multimodal_embeddings = [rows for rows, _ in parts]
            self._offsets = (torch.cat([offsets for _, offsets in parts]).T, is_multimodal)
        return super().embed_input_ids(  # type: ignore[misc]
            input_ids, multimodal_embeddings, is_multimodal=is_multimodal
        )

    def _split(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Features and offsets `[tokens, 2]`; the latter are zero for videos, which are left as they are."""
        width = self.visual.out_hidden_size
        if rows.shape[1] == width:
            return rows, torch.zeros(len(rows), 2, dtype=torch.long, device=rows.device)
        return rows[:, :width], _decode(rows[:, width:])

    def forward(self, input_ids: Any, positions: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Add the offsets to the positions, in place: graphs of the layers read this very memory."""
        if self._offsets is not None:
            offsets, is_multimodal = self._offsets
            self._offsets = None
            places = is_multimodal.to(positions.device).nonzero().flatten()
            positions[1:, places] += offsets.to(positions)
        return super().forward(input_ids, positions, *args, **kwargs)  # type: ignore[misc]


_BASE = 128  # so that digits are exact in bfloat16


def _encode(offsets: Tensor) -> Tensor:
    """Two digits per number, `[tokens, 2]` -> `[tokens, 4]`."""
    return torch.cat([offsets // _BASE, offsets % _BASE], dim=1)


def _decode(digits: Tensor) -> Tensor:
    high, low = digits.float().chunk(2, dim=1)
    return (high * _BASE + low).round().long()
