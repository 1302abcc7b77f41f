"""Methods made for clips: each against a plain reading of its rule, and what they do with images."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from mmcompress.budget import Budget, largest_remainder
from mmcompress.errors import SpecError
from mmcompress.frames import as_frames, frame_shape
from mmcompress.method import VisualMethod
from mmcompress.methods.dycoke import DyCoke
from mmcompress.methods.evs import EVS
from mmcompress.methods.fastvid import FastVID
from mmcompress.methods.uniform import Uniform
from mmcompress.methods.vidcom2 import VidCom2
from mmcompress.types import EncoderFacts, Selection, VisualItem

ENCODER = EncoderFacts(4, 4, (0, 2))
METHODS = (EVS(), VidCom2(), DyCoke(), FastVID())
Vectors = list[list[float]]


def item_of(embeddings: Tensor, grids: tuple[tuple[int, int], ...], attention: Tensor | None = None) -> VisualItem:
    sizes = torch.tensor([rows * columns for rows, columns in grids])
    return VisualItem(
        embeddings=embeddings,
        grids=grids,
        tiles=torch.arange(len(grids)).repeat_interleave(sizes),
        modality="video" if len(grids) > 1 else "image",
        received_attention={} if attention is None else {2: attention},
    )


def clip(seed: int, frames: int, grid: tuple[int, int] = (2, 3), dim: int = 7) -> VisualItem:
    """A clip of a still scene that is more and less disturbed."""
    generator = torch.Generator().manual_seed(seed)
    size = grid[0] * grid[1]
    disturbance = torch.rand(frames, 1, 1, generator=generator)
    scene = torch.randn(1, size, dim, generator=generator)
    tokens = scene + disturbance * torch.randn(frames, size, dim, generator=generator)
    return item_of(tokens.flatten(0, 1), (grid,) * frames, torch.rand(frames * size, generator=generator))


def compress(method: VisualMethod, item: VisualItem, budget: int) -> Selection:
    return method.compress([item], Budget(budget), method.needs(ENCODER))[0]


def kept(method: VisualMethod, item: VisualItem, budget: int) -> list[int]:
    return compress(method, item, budget).anchor.tolist()


def vectors(item: VisualItem) -> Vectors:
    return item.embeddings.double().tolist()


def dot(one: list[float], other: list[float]) -> float:
    return sum(x * y for x, y in zip(one, other, strict=True))


def cosine(one: list[float], other: list[float]) -> float:
    return dot(one, other) / math.sqrt(dot(one, one) * dot(other, other))


def unit(vector: list[float]) -> list[float]:
    return [x / math.sqrt(dot(vector, vector)) for x in vector]


def mean(rows: Vectors) -> list[float]:
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def squared_distance(one: list[float], other: list[float]) -> float:
    return sum((x - y) ** 2 for x, y in zip(one, other, strict=True))


# --- frames


def test_planes_of_one_grid_are_frames() -> None:
    item = clip(0, 3)
    assert frame_shape(item) == (3, 6)
    assert torch.equal(as_frames(item)[1, 2], item.embeddings[8])
    assert as_frames(replace(item, embeddings=item.embeddings.bfloat16())).dtype == torch.float32


def test_what_has_no_common_grid_is_one_frame() -> None:
    assert frame_shape(item_of(torch.zeros(12, 2), ((3, 4),))) == (1, 12)
    assert frame_shape(item_of(torch.zeros(10, 2), ((2, 2), (2, 3)))) == (1, 10)
    assert frame_shape(item_of(torch.zeros(12, 2), ((2, 3), (3, 2)))) == (1, 12)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.info.name)
def test_images_and_clips_may_share_a_batch(method: VisualMethod) -> None:
    attention = torch.rand(10, generator=torch.Generator().manual_seed(1))
    tokens = torch.randn(10, 7, generator=torch.Generator().manual_seed(2))
    items = [item_of(tokens, ((2, 5),), attention), clip(3, 5), item_of(tokens, ((2, 2), (2, 3)), attention)]
    together = method.compress(items, Budget(0.5), method.needs(ENCODER))
    assert [len(selection) for selection in together] == [5, 15, 5]
    for item, selection in zip(items, together, strict=True):
        assert torch.equal(selection.anchor, method.compress([item], Budget(0.5), method.needs(ENCODER))[0].anchor)


# --- evs


def test_evs_keeps_what_changed_most() -> None:
    item = clip(1, 5)
    tokens = vectors(item)
    unlike = [math.inf if i < 6 else 1 - cosine(tokens[i], tokens[i - 6]) for i in range(30)]
    for budget in range(1, 30):
        assert kept(EVS(), item, budget) == sorted(sorted(range(30), key=lambda i: -unlike[i])[:budget])


def test_evs_keeps_the_one_token_that_moves() -> None:
    frames = torch.eye(4).repeat(3, 1, 1)
    frames[2, 1] = torch.tensor([0.0, 0.0, 3.0, 0.0])
    assert kept(EVS(), item_of(frames.flatten(0, 1), ((2, 2),) * 3), 5) == [0, 1, 2, 3, 9]


def test_evs_fills_a_small_budget_from_the_first_frame() -> None:
    assert kept(EVS(), clip(2, 4), 4) == [0, 1, 2, 3]
    assert kept(EVS(), clip(2, 1), 4) == [0, 1, 2, 3]
    assert kept(EVS(), item_of(torch.randn(10, 3), ((2, 2), (2, 3))), 7) == list(range(7))


# --- vidcom2


def gaussian(one: list[float], other: list[float]) -> float:
    return sum(math.exp(-squared_distance(one, other) / (2 * 2**k)) for k in (-3, -2, -1, 0, 1))


def vidcom2(item: VisualItem, budget: int, official: bool) -> tuple[list[int], int]:
    """What is kept, and by how much the rounded frame budgets exceed the budget."""
    frames, size = frame_shape(item)
    tokens = vectors(item)
    centre = mean(tokens)
    spread = [sum((token[c] - centre[c]) ** 2 for token in tokens) for c in range(len(centre))]
    steady = sorted(range(len(spread)), key=lambda c: spread[c])[: len(spread) // 2]
    tokens = [unit([token[c] for c in steady]) for token in tokens]
    by_frame = [range(t * size, (t + 1) * size) for t in range(frames)]
    to_clip = [gaussian(token, mean(tokens)) for token in tokens]
    to_frame = [gaussian(tokens[i], mean([tokens[j] for j in frame])) for frame in by_frame for i in frame]
    similarity = [one + other for one, other in zip(to_clip, to_frame, strict=True)]
    powers = [math.exp(-sum(to_clip[i] for i in frame) / size / 0.01) for frame in by_frame]
    chosen: list[int] = []
    for frame, power in zip(by_frame, powers, strict=True):
        scale = min(1, budget / len(item) * (1 + power / sum(powers) - 1 / frames))
        chosen += sorted(frame, key=lambda i: similarity[i])[: max(1, round(scale * size))]
    excess = len(chosen) - budget
    while len(chosen) > budget:
        chosen.remove(max(chosen, key=lambda i: similarity[i]))
    while len(chosen) < budget and not official:
        chosen.append(min(set(range(len(item))) - set(chosen), key=lambda i: similarity[i]))
    return sorted(chosen), excess


def test_vidcom2_fills_the_budget_exactly() -> None:
    item = clip(3, 5, (3, 4))
    excesses = []
    for budget in range(1, 60):
        expected, excess = vidcom2(item, budget, official=False)
        excesses.append(excess)
        assert kept(VidCom2(), item, budget) == expected
    assert min(excesses) < 0 < max(excesses)


def test_vidcom2_official_leaves_a_shortfall() -> None:
    item = clip(3, 5, (3, 4))
    lengths = []
    for budget in range(1, 60):
        expected, excess = vidcom2(item, budget, official=True)
        assert kept(VidCom2(compat="official"), item, budget) == expected
        lengths.append(len(expected) - budget)
        assert lengths[-1] == min(0, excess)
    assert min(lengths) < 0


def test_vidcom2_of_an_image_keeps_what_is_far_from_its_mean() -> None:
    item = clip(4, 1, (3, 4))
    for budget in range(1, 12):
        assert vidcom2(item, budget, official=False) == (kept(VidCom2(), item, budget), 0)


def test_vidcom2_gives_more_to_a_frame_that_stands_out() -> None:
    item = clip(5, 6, (3, 4))
    tokens = as_frames(item).clone()
    tokens[1:] = tokens[0] + 0.01 * tokens[1:]
    tokens[4] = -tokens[4].roll(3, dims=0)
    clip_similarity, _ = VidCom2().similarities(replace(item, embeddings=tokens.flatten(0, 1)))
    scales = VidCom2().frame_scales(clip_similarity, 0.5)
    assert scales.argmax() == 4
    assert scales.mean() == pytest.approx(0.5)
    assert VidCom2().frame_scales(clip_similarity, 0.99).max() == 1


def test_vidcom2_sees_only_the_steadier_half_of_the_channels() -> None:
    item = clip(6, 4, dim=6)
    noisy = item.embeddings.clone()
    noisy[:, [1, 2, 4]] *= 20
    noisier = noisy.clone()
    noisier[:, [1, 2, 4]] = noisy[:, [1, 2, 4]].flip(0)
    for budget in (5, 12):
        one, other = (kept(VidCom2(), replace(item, embeddings=tokens), budget) for tokens in (noisy, noisier))
        assert one == other


# --- dycoke


def dycoke(tokens: Vectors, size: int, frames: list[int], budget: int) -> list[int]:
    """Groups of four, and when their first frames are too many, groups of four of these."""
    if budget < size:
        return [int((i + 0.5) * len(tokens) / budget) for i in range(budget)]
    groups = [frames[i : i + 4] for i in range(0, len(frames), 4)]
    whole = [group[0] for group in groups]
    if len(whole) * size > budget:
        return dycoke(tokens, size, whole, budget)
    pairs = [(g[a], g[b]) for g in groups for a, b in ((1, 0), (2, 0), (3, 2)) if len(g) > a]
    each, extra = divmod(budget - len(whole) * size, len(pairs))
    found = [frame * size + i for frame in whole for i in range(size)]
    for n, (frame, reference) in enumerate(pairs):
        found += least_similar(tokens, size, frame, reference)[: each + (n < extra)]
    return sorted(found)


def least_similar(tokens: Vectors, size: int, frame: int, reference: int) -> list[int]:
    likeness = [cosine(tokens[frame * size + i], tokens[reference * size + i]) for i in range(size)]
    return [frame * size + i for i in sorted(range(size), key=lambda i: likeness[i])]


@pytest.mark.parametrize("frames", [1, 2, 3, 4, 5, 6, 7, 8, 9, 18])
def test_dycoke_keeps_what_differs_within_groups_of_four(frames: int) -> None:
    item = clip(frames, frames)
    for budget in range(1, len(item)):
        assert kept(DyCoke(), item, budget) == dycoke(vectors(item), 6, list(range(frames)), budget)


def test_dycoke_keeps_the_tokens_that_change() -> None:
    frames = torch.eye(4).repeat(7, 1, 1)
    frames[1, 3] = frames[2, 0] = frames[6, 1] = -1
    frames[3] = frames[2]  # the fourth frame is compared with the third
    frames[3, 2] = -1
    frames[5, 2] = -1
    item = item_of(frames.flatten(0, 1), ((2, 2),) * 7)
    assert kept(DyCoke(), item, 13) == [0, 1, 2, 3, 7, 8, 14, 16, 17, 18, 19, 22, 25]


def test_dycoke_below_one_frame_is_uniform() -> None:
    for item in (clip(1, 9), clip(1, 1), item_of(torch.randn(10, 3), ((2, 2), (2, 3)))):
        for budget in range(1, 6):
            assert kept(DyCoke(), item, budget) == kept(Uniform(), item, budget)


@pytest.mark.parametrize("frames", [2, 3, 4, 5, 6, 7, 8, 9, 12])
@pytest.mark.parametrize("share", [0, 1, 4])
def test_dycoke_official_is_the_authors_code(frames: int, share: int) -> None:
    item = clip(frames, frames)
    tokens = vectors(item)
    blocks = {frame: list(range(frame * 6, frame * 6 + 6)) for frame in range(frames // 2 * 2)}
    compared = [(t + 1, t) for t in range(0, frames // 2 * 2, 2)] + [
        (t + 2, t) for t in range(0, frames, 4) if t < frames - 4
    ]
    for frame, reference in compared:
        blocks[frame] = least_similar(tokens, 6, frame, reference)[:share]
    expected = [i for frame in sorted(blocks) for i in blocks[frame]]
    for budget in range(len(expected), len(expected) + len(compared)):
        assert kept(DyCoke(compat="official"), item, budget) == expected


def test_dycoke_official_drops_an_odd_last_frame() -> None:
    item = clip(5, 5)
    tokens = vectors(item)
    compared = [i for frame, of in ((1, 0), (2, 0), (3, 2)) for i in least_similar(tokens, 6, frame, of)]
    assert kept(DyCoke(compat="official"), item, 29) == [*range(6), *compared]


def test_dycoke_official_meets_smaller_budgets_like_the_default() -> None:
    item = clip(8, 8)  # the authors' rule keeps frames 0, 4 and 6 whole, the paper's 0 and 4
    assert kept(DyCoke(compat="official"), item, 17) == list(range(6)) + list(range(24, 30))
    assert kept(DyCoke(compat="official"), item, 18) == [*range(6), *range(24, 30), *range(36, 42)]
    assert kept(DyCoke(compat="official"), item, 5) == kept(Uniform(), item, 5)


# --- fastvid


def fastvid(method: FastVID, item: VisualItem, budget: int) -> tuple[list[int], dict[int, dict[int, float]]]:
    """The kept tokens, and the weights of each."""
    frames, size = frame_shape(item)
    tokens, attention = vectors(item), item.received_attention[2].tolist()
    frame_of = [range(t * size, (t + 1) * size) for t in range(frames)]
    rows: dict[int, dict[int, float]] = {}
    context = []
    for frame in range(frames):
        share = budget // frames + (frame < budget % frames)
        context.append(int(share * method.context))
        for i in sorted(frame_of[frame], key=lambda i: -attention[i])[: share - context[-1]]:
            rows[i] = {i: 1.0}
    others = [[i for i in frame if i not in rows] for frame in frame_of]
    for segment in segments(method, [mean([tokens[i] for i in frame]) for frame in frame_of]):
        total, step = sum(context[t] for t in segment), method.anchor_step
        while total > sum(len(others[t]) for t in segment if (segment[-1] - t) % step == 0):
            step -= 1
        anchors = [t for t in segment if (segment[-1] - t) % step == 0]
        if method.compat == "official":
            counts = [total // len(anchors)] * len(anchors)
        else:
            counts = largest_remainder(total, [len(others[t]) for t in anchors])
        members = [i for t in segment for i in others[t]]
        for frame, count in zip(anchors, counts, strict=True):
            peaks = sorted(density_peaks(tokens, others[frame])[:count])
            absorbed: dict[int, list[int]] = {peak: [] for peak in peaks}
            for i in members if peaks else []:
                absorbed[max(peaks, key=lambda peak: cosine(tokens[i], tokens[peak]))].append(i)
            for peak, group in absorbed.items():
                own = max(1 / (len(group) + 1), method.beta)
                rows[peak] = {i: (1 - own) / len(group) for i in group}
                rows[peak][peak] += own
    return sorted(rows), rows


def segments(method: FastVID, features: Vectors) -> Iterator[list[int]]:
    likeness = [cosine(one, other) for one, other in pairwise(features)]
    cuts = sorted(range(len(likeness)), key=lambda t: likeness[t])[: method.min_segments - 1]
    segment = [0]
    for t in range(len(likeness)):
        if t in cuts or likeness[t] < method.threshold:
            yield segment
            segment = []
        segment.append(t + 1)
    yield segment


def density_peaks(tokens: Vectors, members: list[int]) -> list[int]:
    """All members, the best peak first."""
    apart = {(i, j): squared_distance(tokens[i], tokens[j]) / len(tokens[0]) for i in members for j in members}
    density = {i: math.exp(-mean([[d] for d in sorted(apart[i, j] for j in members)[:4]])[0]) for i in members}

    def score(i: int) -> float:
        nearest = [apart[i, j] for j in members if density[j] > density[i]]
        return density[i] * math.sqrt(min(nearest) if nearest else max(apart.values()))

    return sorted(members, key=lambda i: -score(i))


FASTVID: list[dict[str, Any]] = [
    {"min_segments": 3, "threshold": -1.0},
    {"min_segments": 1, "threshold": 0.9, "anchor_step": 2},
    {"min_segments": 1, "threshold": -1.0, "context": 0.9, "beta": 0.1},
    {"min_segments": 2, "threshold": -1.0, "anchor_step": 3, "context": 0.7, "compat": "official"},
    {},
]


@pytest.mark.parametrize("options", FASTVID, ids=str)
@pytest.mark.parametrize("frames", [1, 7])
def test_fastvid_keeps_salient_tokens_and_merges_the_rest(options: dict[str, Any], frames: int) -> None:
    method, item = FastVID(**options), clip(11, frames, (3, 4))
    for budget in range(1, len(item), 5):
        anchors, rows = fastvid(method, item, budget)
        selection = compress(method, item, budget)
        assert selection.anchor.tolist() == anchors
        expected = torch.tensor([[rows[i].get(j, 0.0) for j in range(len(item))] for i in anchors])
        torch.testing.assert_close(selection.weight, expected)
        assert len(anchors) == budget or options.get("compat") == "official"


def test_fastvid_cuts_between_unlike_frames() -> None:
    angles = torch.tensor([0.0, 0.1, 0.4, 0.5, 1.5, 1.6])  # differences 0.1, 0.3, 0.1, 1.0, 0.1
    features = torch.stack([angles.cos(), angles.sin()], dim=1)
    assert FastVID(min_segments=1, threshold=-1.0).segment_starts(features) == [0]
    assert FastVID(min_segments=2, threshold=-1.0).segment_starts(features) == [0, 4]
    assert FastVID(min_segments=3, threshold=-1.0).segment_starts(2 * features) == [0, 2, 4]
    assert FastVID(min_segments=1, threshold=math.cos(0.2)).segment_starts(features) == [0, 2, 4]
    assert FastVID(min_segments=2, threshold=math.cos(0.2)).segment_starts(features) == [0, 2, 4]
    assert FastVID(min_segments=99, threshold=-1.0).segment_starts(features) == [0, 1, 2, 3, 4, 5]


def test_fastvid_official_drops_the_remainder_of_peaks() -> None:
    item = clip(12, 5, (3, 4))  # one segment of five frames, anchors 0 and 4, one peak per frame
    options: dict[str, Any] = {"min_segments": 1, "threshold": -1.0}
    assert len(compress(FastVID(**options), item, 15)) == 15
    assert len(compress(FastVID(**options, compat="official"), item, 15)) == 14


def test_fastvid_has_more_anchor_frames_where_few_cannot_hold_the_peaks() -> None:
    item = clip(13, 4, (3, 4))  # 11 of 12 tokens stay per frame: 4 peaks, 7 salient and room for 5 in each
    selection = compress(FastVID(min_segments=1, threshold=-1.0), item, 44)
    assert (selection.anchor // 12).bincount().tolist() == [11, 11, 11, 11]
    sparse = compress(FastVID(min_segments=1, threshold=-1.0), item, 12)  # 1 peak, 2 salient: one frame holds all peaks
    assert (sparse.anchor // 12).bincount().tolist() == [2, 2, 2, 6]


def test_fastvid_with_beta_one_merges_nothing() -> None:
    item = clip(14, 6, (3, 4))
    selection = compress(FastVID(beta=1.0), item, 30)
    assert torch.equal(selection.apply(item.embeddings), item.embeddings[selection.anchor])


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_fastvid_survives_tokens_that_are_all_alike(value: float) -> None:
    item = clip(15, 4, (3, 4))
    alike = replace(item, embeddings=torch.full_like(item.embeddings, value))
    selection = compress(FastVID(), alike, 30)
    torch.testing.assert_close(selection.apply(alike.embeddings), alike.embeddings[:30])


def test_fastvid_reads_the_last_global_layer() -> None:
    needs = FastVID().needs(EncoderFacts(32, 32, (7, 15, 23, 31)))
    assert needs.received_attention == (31,)
    assert needs.embeddings


@pytest.mark.parametrize(
    "options", [{"min_segments": 0}, {"anchor_step": 0}, {"context": 1.0}, {"context": -0.1}, {"beta": 1.1}], ids=str
)
def test_fastvid_refuses_options_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match=f"fastvid: .*{next(iter(options))}"):
        FastVID(**options)
