"""Methods that compare the frames of a clip."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from parity.handlers.base import Handler, Outputs
from torch import Tensor

from mmcompress.budget import Budget
from mmcompress.registry import METHODS
from mmcompress.types import EncoderFacts, VisualItem

if TYPE_CHECKING:
    from parity.cases import Case

ENCODER = EncoderFacts(1, 1, (0,))


def evs(case: Case) -> Outputs:
    """The mask of kept tokens and their number."""
    item = _merged_clip(case)
    method = METHODS.build("evs", case.handler.options)
    budget = max(len(item) // len(item.grids), int(len(item) * (1 - case.params["q"])))
    kept = method.compress([item], Budget(budget), method.needs(ENCODER))[0].anchor
    return {"out_mask": _mask(kept, item), "out_count": torch.tensor(len(kept))}


def vidcom2(case: Case) -> Outputs:
    """Similarities, frame scales, and what is kept with and without filling the budget.

    The published codes scale frames by the rate itself, a method by its whole number of tokens.
    """
    item = _merged_clip(case)
    method = METHODS.build("vidcom2", case.handler.options)
    official = METHODS.build("vidcom2", {**case.handler.options, "compat": "official"})
    clip, frame = method.similarities(item)
    scales = method.frame_scales(clip, case.params["base_scale"])
    budget = max(len(item.grids), int(len(item) * (1 - case.params["q"])))
    return {
        "out_similarity": clip + frame,
        "out_scales": scales,
        "out_mask_vllm": _mask(method.kept(clip + frame, scales, budget), item),
        "out_indices_official": official.kept(clip + frame, scales, len(item)),
    }


def dycoke(case: Case) -> Outputs:
    """The kept tokens, in the order of the published code."""
    params, tokens = case.params, case.inputs["in_tokens"]
    frames, size, share = params["frames"], params["tokens_per_frame"], params["keep_per_pruned_frame"]
    assert share == int((1 - params["merging_ratio_k"]) * size)
    pruned = frames // 2 + len(range(0, frames - 4, 4))
    budget = (frames - frames % 2 - pruned) * size + pruned * share
    item = _clip(tokens, frames, (1, size))
    method = METHODS.build("dycoke", case.handler.options)
    return {"out_tokens": method.compress([item], Budget(budget), method.needs(ENCODER))[0].apply(tokens)}


def fastvid(case: Case) -> Outputs:
    """Segments, kept indices and merged tokens, from frame features and attention of another encoder."""
    params, hidden, features = case.params, case.inputs["in_hidden"][0], case.inputs["in_frame_global"]
    assert "removed" in params["noise"]
    frames, size, start = params["frames"], params["tokens_per_frame"], params["video_start"]
    stop = start + frames * size
    assert len(hidden) == stop + params["text_after"]
    names = {
        "DySeg_c": "min_segments",
        "DySeg_tau": "threshold",
        "STPrune_d": "context",
        "DTM_p": "anchor_step",
        "DTM_beta": "beta",
    }
    options = {option: params[name] for name, option in names.items()}
    method = METHODS.build("fastvid", {**case.handler.options, **options})
    clip = _clip(hidden[start:stop], frames, (1, size))
    budget = frames * int(size * params["retention_ratio"])
    selection = method.merge(clip, budget, features, case.inputs["in_frame_attn"])
    before, after = torch.arange(start), torch.arange(stop, len(hidden))
    starts = torch.tensor([*method.segment_starts(features), frames])
    return {
        "out_segment_sizes": starts.diff(),
        "out_keep_indices": torch.cat([before, start + selection.anchor, after]),
        "out_hidden": torch.cat([hidden[before], selection.apply(clip.embeddings), hidden[after]])[None],
    }


def _clip(tokens: Tensor, frames: int, grid: tuple[int, int]) -> VisualItem:
    tiles = torch.arange(frames).repeat_interleave(grid[0] * grid[1])
    return VisualItem(embeddings=tokens, grids=(grid,) * frames, tiles=tiles, modality="video")


def _merged_clip(case: Case) -> VisualItem:
    """The clip of a case that states its size before the patch merger."""
    (frames, height, width), merge = case.params["thw"], case.params["spatial_merge"]
    return _clip(case.inputs["in_embeds"], frames, (height // merge, width // merge))


def _mask(kept: Tensor, item: VisualItem) -> Tensor:
    return torch.zeros(len(item), dtype=torch.bool).index_fill(0, kept, True)


HANDLERS = {
    "evs_": Handler("evs", evs),
    "vidcom2_": Handler("vidcom2", vidcom2),
    "dycoke_ttm_": Handler("dycoke", dycoke, {"compat": "official"}),
    "fastvid_": Handler("fastvid", fastvid, {"compat": "official"}),
}
