"""What holds for every method between encoder layers, and each one's own rule."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from registered import RATES, variants
from torch import Tensor

from mmcompress.encoder_method import (
    Attention,
    EncoderMethod,
    LayerTokens,
    Mixture,
    Reduction,
    Step,
    TokenMap,
    constant_ratio,
)
from mmcompress.errors import SpecError
from mmcompress.merging import Matching
from mmcompress.methods.diffrate import DiffRate
from mmcompress.methods.pitome import PiToMe, energy
from mmcompress.methods.token_transforming import TokenTransforming
from mmcompress.methods.tome import ToMe
from mmcompress.methods.zerotprune import ZeroTPrune
from mmcompress.registry import METHODS
from mmcompress.statistics import NEEDS_CLS
from mmcompress.types import EncoderFacts

CLIP_L = EncoderFacts(24, 23, tuple(range(23)), patches=576)
SMALL = EncoderFacts(6, 5, tuple(range(5)), patches=16)
WITHOUT_CLS = replace(SMALL, missing=dict.fromkeys(NEEDS_CLS, "no CLS token"))
METHODS_HERE = [METHODS.build(spec.name, spec.options) for spec in variants("encoder")]
every_method = pytest.mark.parametrize("method", METHODS_HERE, ids=lambda m: repr(m).replace(RATES, "PATH"))


def layer_tokens(
    seed: int, patches: int, cls: int = 1, images: int = 2, layer: int = 1, dtype: torch.dtype = torch.float32
) -> LayerTokens:
    """Random tokens of random sizes inside a layer."""
    generator = torch.Generator().manual_seed(seed)
    tokens = patches + cls
    query, key = 1.5 * torch.randn(2, images, 3, tokens, 4, generator=generator)
    return LayerTokens(
        encoder=SMALL if cls else WITHOUT_CLS,
        layer=layer,
        protected=cls,
        hidden=torch.randn(images, tokens, 5, generator=generator).to(dtype),
        size=torch.randint(1, 5, (images, tokens), generator=generator).float(),
        attention=Attention(query.to(dtype), key.to(dtype), 0.5),
    )


def of_image(tokens: LayerTokens, image: int) -> LayerTokens:
    here = slice(image, image + 1)
    assert tokens.attention is not None
    query, key, scaling = tokens.attention
    attention = Attention(query[here], key[here], scaling)
    return replace(tokens, hidden=tokens.hidden[here], size=tokens.size[here], attention=attention)


def dense(reduction: TokenMap, image: int) -> Tensor:
    """The map of one image as a matrix `[outputs, tokens]`."""
    if isinstance(reduction, Mixture):
        return reduction.weight[image]
    assert isinstance(reduction, Reduction)
    group, share = reduction.group[image], reduction.share[image]
    return torch.stack([torch.where(group == output, share, 0.0) for output in range(reduction.kept.shape[1])])


def reads(method: EncoderMethod, encoder: EncoderFacts) -> bool:
    return not set(method.needs(encoder).layers()) & set(encoder.missing)


# --- reductions


def random_reduction(seed: int, tokens: int, outputs: int) -> Reduction:
    generator = torch.Generator().manual_seed(seed)
    kept = torch.stack([torch.randperm(tokens, generator=generator)[:outputs] for _ in range(2)])
    group = torch.randint(outputs, (2, tokens), generator=generator)
    group.scatter_(1, kept, torch.arange(outputs).expand(2, -1))
    mass = torch.rand(2, tokens, generator=generator) + 0.1
    mass[:, torch.randperm(tokens, generator=generator)[0]] = 0.0
    mass.scatter_(1, kept, 1.0)
    return Reduction.average(Matching(kept, group), mass, torch.ones(2, tokens))


@given(seed=st.integers(0, 1000), counts=st.tuples(st.integers(2, 12), st.integers(1, 12), st.integers(1, 12)))
@settings(max_examples=25)
def test_reductions_are_matrices(seed: int, counts: tuple[int, int, int]) -> None:
    tokens, middle, last = sorted(counts, reverse=True)
    first, second = random_reduction(seed, tokens, middle), random_reduction(seed + 1, middle, last)
    both, values = first.then(second), torch.randn(2, tokens, 3)
    for image in range(2):
        matrix = dense(second, image) @ dense(first, image)
        torch.testing.assert_close(dense(both, image), matrix)
        torch.testing.assert_close(both.apply(values)[image], matrix @ values[image])
        assert both.kept[image].tolist() == first.kept[image][second.kept[image]].tolist()
        torch.testing.assert_close(dense(first, image).sum(1), torch.ones(middle))
    assert both.apply(values.bfloat16()).dtype == torch.bfloat16


def test_selections_leave_cls_out() -> None:
    kept, group = torch.tensor([[0, 3, 2]]), torch.tensor([[0, 1, 2, 1, 0]])
    reduction = Reduction.average(Matching(kept, group), torch.tensor([[1.0, 1, 1, 3, 1]]), torch.ones(1, 5))
    (selection,) = reduction.selections(1)
    assert selection.anchor.tolist() == [2, 1]
    assert selection.weight is not None
    assert selection.weight.tolist() == [[0.25, 0, 0.75, 0], [0, 1, 0, 0]]  # the last patch went into CLS
    (whole,) = reduction.selections(0)
    assert whole.anchor.tolist() == [0, 3, 2] and whole.weight is not None
    assert whole.weight[0].tolist() == [0.5, 0, 0, 0, 0.5]


def test_pruning_keeps_tokens_as_they_are() -> None:
    values = torch.randn(2, 6, 3)
    reduction = Reduction.keep(torch.tensor([[0, 2, 5], [0, 1, 3]]), torch.arange(12.0).view(2, 6))
    assert torch.equal(reduction.apply(values), torch.stack([values[0, [0, 2, 5]], values[1, [0, 1, 3]]]))
    assert reduction.size.tolist() == [[0, 2, 5], [6, 7, 9]]
    assert [(s.anchor.tolist(), s.weight) for s in reduction.selections(1)] == [([1, 4], None), ([0, 2], None)]


# --- every method


@every_method
def test_every_budget_is_met_or_refused(method: EncoderMethod) -> None:
    for encoder in (SMALL, EncoderFacts(3, 2, (0, 1)), EncoderFacts(1, 1, (0,)), EncoderFacts(24, 23, ())):
        if isinstance(method, DiffRate) and encoder.depth == 1:
            continue  # all entries but the first lie behind the features
        for tokens in (2, 3, 9, 16, 33):
            least = tokens
            for _ in range(encoder.used):
                least = math.ceil(least / 2)
            for keep in range(1, tokens):
                if keep < least and isinstance(method, (ToMe, PiToMe)):
                    with pytest.raises(SpecError, match=f"cannot keep {keep} of {tokens} .* leave at least {least}"):
                        method.plan(tokens, keep, encoder)
                    continue
                left = [tokens, *(step.left for step in method.plan(tokens, keep, encoder))]
                assert left[-1] == keep and left == sorted(left, reverse=True) and len(left) == encoder.used + 1
                if isinstance(method, (ToMe, PiToMe)):
                    assert all(after >= math.ceil(before / 2) for before, after in zip(left, left[1:], strict=False))
            assert method.plan(tokens, tokens, encoder) == method.plan(tokens, tokens + 5, encoder) == []


@every_method
@pytest.mark.parametrize("cls", [1, 0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_keep_what_they_say(method: EncoderMethod, cls: int, dtype: torch.dtype) -> None:
    tokens = layer_tokens(1, 11, cls, dtype=dtype)
    if not reads(method, tokens.encoder):
        return
    for left in range(6, 11):
        removed = 11 - left
        for first in {0, removed // 2, removed}:
            reduction = method.reduce(tokens, Step(left, first))
            assert reduction.kept.shape == (2, left + cls) and reduction.apply(tokens.hidden).dtype == dtype
            assert all(len(set(row)) == left + cls and row[:cls] == [0] * cls for row in reduction.kept.tolist())
            for image in range(2):
                matrix = dense(reduction, image)
                torch.testing.assert_close(matrix.sum(1), torch.ones(left + cls))
                assert (matrix[torch.arange(left + cls), reduction.kept[image]] > 0).all()
                assert cls == 0 or matrix[0].tolist() == [1.0] + [0.0] * 11, "CLS stays as it is"
            if isinstance(method, (ToMe, PiToMe, TokenTransforming)):
                torch.testing.assert_close(reduction.size.sum(1), tokens.size.sum(1))


@every_method
def test_neighbours_change_nothing(method: EncoderMethod) -> None:
    tokens = layer_tokens(2, 14, images=4)
    together = method.reduce(tokens, Step(9, 2))
    for image in range(4):
        alone = method.reduce(of_image(tokens, image), Step(9, 2))
        assert torch.equal(together.kept[image], alone.kept[0])
        torch.testing.assert_close(dense(together, image), dense(alone, 0))


@every_method
def test_only_layers_that_remove_are_tapped(method: EncoderMethod) -> None:
    needs = method.needs(CLIP_L).layers()
    removing, left = [], 576
    for layer, step in enumerate(method.plan(576, 64, CLIP_L)):
        removing += [layer] if step.left < left else []
        left = step.left
    assert all(set(removing) <= set(layers) <= set(range(23)) for layers in needs.values())


def test_a_wrong_schedule_is_an_error() -> None:
    @dataclass(frozen=True)
    class Wrong(ToMe):
        def schedule(self, tokens: int, keep: int, encoder: EncoderFacts) -> list[Step]:
            return [Step(tokens), Step(tokens - 1)]

    with pytest.raises(SpecError, match=r"method 'tome' planned \[9, 9, 8\] tokens for a budget of 4"):
        Wrong().plan(9, 4, EncoderFacts(3, 2, (0, 1)))


def test_constant_ratio_is_one() -> None:
    assert constant_ratio(81, 16, 2) == [36, 16]
    assert constant_ratio(576, 72, 3) == [288, 144, 72]
    assert constant_ratio(5, 2, 1) == [2]


# --- tome


def left_by(method: EncoderMethod, tokens: int, keep: int, encoder: EncoderFacts) -> list[int]:
    return [step.left for step in method.plan(tokens, keep, encoder)]


def test_tome_removes_equally_many_per_layer() -> None:
    left = [576, *left_by(ToMe(), 576, 192, CLIP_L)]
    removed = [before - after for before, after in zip(left, left[1:], strict=False)]
    assert removed == [17] * 16 + [16] * 7 and sum(removed) == 384
    # Halving stops the last layers; the others make up for it, and not one token more.
    assert left_by(ToMe(), 16, 4, EncoderFacts(3, 2, ())) == [8, 4]
    assert left_by(ToMe(), 33, 3, SMALL) == [26, 19, 12, 6, 3]


def test_tome_reads_the_keys_of_used_layers() -> None:
    assert ToMe().needs(CLIP_L).layers() == {"key_metric": tuple(range(23))}
    assert ToMe().place == "attention" and ToMe().proportional and not ToMe(proportional=False).proportional


# --- pitome


def test_energy_by_plain_loops() -> None:
    metric = torch.randn(2, 7, 4)
    for margin in (0.0, 0.45, 0.9):
        for image in range(2):
            for i in range(7):
                total = 0.0
                for j in range(7):
                    one, other = metric[image, i], metric[image, j]
                    excess = float(one @ other / one.norm() / other.norm()) - margin
                    total += excess if excess > 0 else math.exp(excess) - 1
                assert float(energy(metric, margin)[image, i]) == pytest.approx(total / 7, abs=1e-5)


def test_pitome_stages_by_relative_depth() -> None:
    """Layers up to 12 of 24 match by places, later ones by energy with a margin that falls linearly."""
    tokens = replace(layer_tokens(3, 14), encoder=CLIP_L)

    def groups(method: PiToMe, layer: int) -> list[list[int]]:
        return method.reduce(replace(tokens, layer=layer), Step(9)).group.tolist()

    for layer in range(23):
        assert groups(PiToMe(), layer) == groups(PiToMe("places" if layer <= 12 else "energy"), layer)
    assert groups(PiToMe("places"), 12) != groups(PiToMe("energy"), 12)
    later, first = PiToMe("energy", margin=0.8), PiToMe("energy", margin=0.8 * (1 - 18 / 24))
    assert groups(later, 18) == groups(first, 0) != groups(later, 0)


def test_pitome_protects_tokens_that_have_no_like() -> None:
    """Ten copies of one token and three of their own: only copies merge."""
    hidden = torch.cat([torch.eye(6)[:1].expand(10, -1) + 0.01 * torch.randn(10, 6), torch.eye(6)[2:5]])[None]
    tokens = LayerTokens(WITHOUT_CLS, 0, 0, hidden, torch.ones(1, 13))
    reduction = PiToMe("energy").reduce(tokens, Step(8))
    sizes = dict(zip(reduction.kept[0].tolist(), reduction.size[0].tolist(), strict=True))
    assert {sizes[token] for token in (10, 11, 12)} == {1.0} and sum(sizes.values()) == 13


# --- diffrate


def table(tmp_path: Path, **content: Any) -> str:
    path = tmp_path / "rates.json"
    path.write_text(json.dumps(content))
    return str(path)


PRUNED, MERGED = [180, 170, 150, 120, 90, 60], [175, 160, 135, 100, 75, 41]


def test_diffrate_is_the_table_where_it_fits(tmp_path: Path) -> None:
    method = DiffRate(table(tmp_path, tokens=197, prune_kept_num=PRUNED, merge_kept_num=MERGED))
    steps = method.plan(196, 40, EncoderFacts(6, 6, ()))
    assert [step.left + 1 for step in steps] == MERGED
    before = [197, *MERGED[:-1]]
    assert [step.first for step in steps] == [tokens - kept for tokens, kept in zip(before, PRUNED, strict=True)]


def test_diffrate_is_stretched_to_depth_tokens_and_budget(tmp_path: Path) -> None:
    method = DiffRate(table(tmp_path, tokens=197, prune_kept_num=PRUNED, merge_kept_num=MERGED))
    steps = method.plan(576, 64, CLIP_L)
    counts = {0: 175, 4: 160, 8: 135, 12: 100, 16: 75, 20: 41}
    expected, now = [], 197
    for layer in range(23):
        now = counts.get(layer, now)
        expected.append(576 - (576 - 64) * (197 - now) // (197 - 41))
    assert [step.left for step in steps] == expected
    assert [layer for layer, step in enumerate(steps) if step.first] == list(counts)
    # A shallower encoder takes two entries at once; those behind the features are left out.
    shallow = method.plan(196, 96, EncoderFacts(3, 2, ()))
    removed = 197 - 135
    assert [step.left for step in shallow] == [196 - 100 * (197 - 160) // removed, 96]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (dict(tokens=9, prune_kept_num=[9, 8]), "merge_kept_num"),
        (dict(tokens=9, prune_kept_num=[9, 8], merge_kept_num=[8]), "zip"),
        (dict(tokens=9, prune_kept_num=[9, 9], merge_kept_num=[8, 7]), "never rise"),
        (dict(tokens=9, prune_kept_num=[8], merge_kept_num=[9]), "never rise"),
        (dict(tokens=8, prune_kept_num=[9], merge_kept_num=[9]), "never rise"),
        (dict(tokens=9, prune_kept_num=[9.0], merge_kept_num=[9]), "positive integers"),
        (dict(tokens=9, prune_kept_num=[9], merge_kept_num=[0]), "positive integers"),
        (dict(tokens=9, prune_kept_num=[], merge_kept_num=[]), "positive integers"),
        (dict(tokens=9, prune_kept_num=4, merge_kept_num=[9]), "not iterable"),
    ],
)
def test_malformed_rates_are_refused(content: dict[str, Any], problem: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=f"no JSON file of the form .*{problem}"):
        DiffRate(table(tmp_path, **content)).plan(8, 4, SMALL)
    with pytest.raises(SpecError, match="removes no tokens"):
        DiffRate(table(tmp_path, tokens=9, prune_kept_num=[9], merge_kept_num=[9])).plan(8, 4, SMALL)


def test_diffrate_counts_sizes_in_attention() -> None:
    tokens = layer_tokens(5, 9)
    assert tokens.attention is not None
    query, key, scaling = tokens.attention
    for proportional in (True, False):
        order = DiffRate(proportional=proportional).ranking(tokens)
        for image in range(2):
            scores = []
            for j in range(1, 10):
                rows = []
                for head in range(3):
                    odds = [
                        math.exp(float(query[image, head, 0] @ key[image, head, i]) * scaling)
                        * (float(tokens.size[image, i]) if proportional else 1.0)
                        for i in range(10)
                    ]
                    rows.append(odds[j] / sum(odds))
                scores.append((sum(rows), -j))
            assert order[image].tolist() == [0, *(-j for _, j in sorted(scores, reverse=True))]
    with_sizes, without = (DiffRate(proportional=flag).ranking(tokens) for flag in (True, False))
    assert not torch.equal(with_sizes, without)


# --- zero-tprune


def test_zerotprune_prunes_at_the_papers_layers() -> None:
    assert ZeroTPrune().needs(CLIP_L).keys == (2, 6, 12, 18, 22)
    assert ZeroTPrune().needs(EncoderFacts(12, 12, ())).received_attention == (1, 3, 6, 9, 11)
    assert ZeroTPrune("uniform").needs(CLIP_L).cls_rows == ()
    steps = ZeroTPrune().plan(243, 1, EncoderFacts(12, 12, ()))
    assert [step.left for step in steps] == [243, 81, 81, 27, 27, 27, 9, 9, 9, 3, 3, 1]
    assert [step.first for step in steps] == [0, 81, 0, 27, 0, 0, 9, 0, 0, 3, 0, 1]


def test_zerotprune_takes_a_schedule() -> None:
    method = METHODS.build("zerotprune", {"ratios": (0.9, 0.75, 0.5, 0.29)})
    assert left_by(method, 100, 20, EncoderFacts(12, 12, ())) == [100, 90, 90, 75, 75, 75, 50, 50, 50, 29, 29, 20]
    assert left_by(method, 100, 60, EncoderFacts(12, 12, ())) == [100, 90, 90, 75, 75, 75, *[60] * 6]
    with pytest.raises(SpecError, match=r"zerotprune: ratios=\[.*\] must be 1, one for every removal but the last"):
        method.plan(100, 20, EncoderFacts(3, 2, (0, 1)))
    with pytest.raises(SpecError, match=r"zerotprune: ratios=\[.*\] must descend within"):
        ZeroTPrune(ratios=(0.5, 0.5, 0.4, 0.2)).plan(100, 20, CLIP_L)


@pytest.mark.parametrize(("layer", "iterations"), [(0, 50), (1, 50), (2, 10), (4, 10)])
def test_importance_is_pagerank_over_telling_heads(layer: int, iterations: int) -> None:
    graph = (2 * torch.randn(5, 8, 8, generator=torch.Generator().manual_seed(layer))).softmax(-1)
    graph[0] = 1 / 8  # says nothing
    graph[1] = torch.tensor([1.0] + [0.0] * 7)  # says one thing only
    scores = torch.ones(5, 8)
    scores[:, 0] = 8**0.5
    scores = scores / scores.mean(1, keepdim=True)
    for _ in range(iterations):
        scores = torch.stack([graph[head].T @ scores[head] for head in range(5)])
    spread = ((scores - 1) ** 2).mean(1)
    telling = [head for head in range(5) if 0.01 <= spread[head] <= 0.7]
    assert telling and not {0, 1} & set(telling)
    expected = (scores[telling] ** 2).mean(0).sqrt()
    method, attention = (
        ZeroTPrune(),
        Attention(graph.clamp(min=1e-30).log()[None], torch.eye(8).expand(1, 5, 8, 8), 1.0),
    )
    torch.testing.assert_close(method.importance(attention, iterations)[0], expected)
    quiet = Attention(*(part[:, :1] for part in attention[:2]), 1.0)
    torch.testing.assert_close(method.importance(quiet, 3), torch.ones(1, 8), msg="all heads if none tells")


def test_ties_go_to_the_lower_index() -> None:
    tokens = layer_tokens(7, 10, images=1)
    assert tokens.attention is not None
    alike = replace(tokens, attention=Attention(*(torch.ones_like(part) for part in tokens.attention[:2]), 1.0))
    assert ZeroTPrune("uniform").reduce(alike, Step(4, 3)).kept[0].tolist() == [0, 1, 2, 3, 4]
    assert DiffRate().ranking(replace(alike, size=torch.ones_like(tokens.size)))[0].tolist() == list(range(11))
