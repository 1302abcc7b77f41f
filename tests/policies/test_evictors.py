"""Policies that evict: what all of them owe, and what each of them scores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mmcompress.errors import SpecError
from mmcompress.kv_policy import Ahead, Evictor, KVRow
from mmcompress.policies._layers import in_proportion
from mmcompress.policies._merging import absorb, others
from mmcompress.policies._noise import gumbel
from mmcompress.policies._rotary import rotate, unrotate
from mmcompress.policies._scores import pool, text_first
from mmcompress.registry import POLICIES

EVICTORS = [name for name in POLICIES.names() if issubclass(POLICIES.get(name), Evictor)]
SMALL: dict[str, dict[str, Any]] = {
    "snapkv": {"window": 4}, "pyramidkv": {"window": 4}, "adakv": {"window": 4}, "ems": {"window": 4},
    "speckv": {"window": 3},
}  # fmt: skip
HEADS, GROUP, DIM, LAYERS = 2, 3, 8, 5
TOKENS, IMAGE = 40, slice(6, 30)


def evictor(name: str, **options: Any) -> Any:
    """A policy with a window that fits short prompts."""
    return POLICIES.build(name, {**SMALL.get(name, {}), **options})


def rotation(places: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of positions."""
    angles = (places[..., None] / 100 ** (torch.arange(0, DIM, 2) / DIM)).repeat(*[1] * places.dim(), 2)
    return angles.cos(), angles.sin()


def sequence(seed: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Unrotated queries, keys and values of one layer."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(2 * torch.randn(heads, tokens, DIM, generator=generator) for heads in (HEADS * GROUP, HEADS, HEADS))


def observed(policy: Evictor, row: KVRow, before: Tensor | None = None) -> KVRow:
    """The row with what the policy keeps count of added."""
    if type(policy).observe is Evictor.observe:
        return row
    return replace(row, observed=policy.observe(row) + (0 if before is None else before))


def prompt(policy: Evictor, seed: int = 0, tokens: int = TOKENS, image: slice = IMAGE) -> list[KVRow]:
    """A prompt in all layers, with just what the policy needs."""
    needs, places, rows = policy.needs(), torch.arange(tokens), []
    question = max(1, tokens - image.stop)
    for layer in range(LAYERS):
        query, key, value = sequence(100 * seed + layer, tokens)
        count = {"all": tokens, "question": question}.get(needs.queries, needs.queries)
        last = slice(max(0, tokens - count), tokens)
        visual = torch.zeros(HEADS, tokens, dtype=torch.bool)
        visual[:, image] = True
        row = KVRow(
            layer=layer,
            layers=LAYERS,
            key=rotate(key, rotation(places)),
            value=value,
            place=places.expand(HEADS, -1),
            visual=visual,
            seen=tokens,
            scaling=DIM**-0.5,
            query=rotate(query, rotation(places))[:, last] if count else None,
            unrotated=query[:, last] if needs.unrotated else None,
            rotation=rotation,
        )
        if needs.lookahead:
            drafted, later = sequence(100 * seed + layer + 50, 5), rotation(torch.arange(tokens, tokens + 5))
            row = replace(row, ahead=Ahead(rotate(drafted[0], later), rotate(drafted[1], later)))
        rows.append(observed(policy, row))
    if needs.masses:
        masses = torch.stack([policy.mass(row) for row in rows])
        rows = [replace(row, masses=masses) for row in rows]
    return rows


def after(policy: Evictor, row: KVRow, kept: Sequence[Tensor], seed: int) -> KVRow:
    """The row when entries have gone and another token has been read, heads being of one length."""
    indices, needs = torch.stack(list(kept)), policy.needs()
    query, key, value = sequence(seed, 1)
    position = rotation(torch.tensor([row.seen]))
    keys, values = (torch.stack(part) for part in policy.hold(row, kept))
    grown = replace(
        row,
        key=torch.cat([keys, rotate(key, position)], dim=1),
        value=torch.cat([values, value], dim=1),
        place=torch.cat([row.place.gather(1, indices), torch.full((HEADS, 1), row.seen)], dim=1),
        visual=torch.cat([row.visual.gather(1, indices), torch.zeros(HEADS, 1, dtype=torch.bool)], dim=1),
        seen=row.seen + 1,
        generated=row.generated + 1,
        query=rotate(query, position) if needs.steps else None,
        unrotated=None,
    )
    before = None if row.observed is None else torch.cat([row.observed.gather(1, indices), torch.zeros(HEADS, 1)], 1)
    return observed(policy, replace(grown, observed=before), before) if needs.steps else replace(grown, observed=before)


@pytest.mark.parametrize("name", EVICTORS)
@pytest.mark.parametrize("keep", [11, 20, 39])
def test_the_budget_is_spent_exactly(name: str, keep: int) -> None:
    policy = evictor(name)
    total = 0
    for row in prompt(policy):
        kept = policy.select(row, keep)
        assert len(kept) == HEADS
        for head, indices in enumerate(kept):
            assert torch.equal(indices, indices.unique()) and int(indices[-1]) < TOKENS
            protected = policy.protected(row, keep)[head].nonzero()[:, 0]
            assert bool(torch.isin(protected, indices).all())
        total += sum(map(len, kept))
        keys, values = policy.hold(row, kept)
        assert [key.shape for key in keys] == [value.shape for value in values] == [(len(k), DIM) for k in kept]
    assert total == keep * HEADS * LAYERS


@pytest.mark.parametrize("name", EVICTORS)
def test_a_budget_that_covers_everything_keeps_everything(name: str) -> None:
    for options in ({}, {"scope": "visual"}, {"scope": "text"}):
        policy = POLICIES.build(name, options)  # its window is longer than the shorter prompt
        for tokens, image in ((TOKENS, IMAGE), (3, slice(0, 2)), (1, slice(0, 0))):
            for keep in (TOKENS, TOKENS + 7):
                for row in prompt(policy, tokens=tokens, image=image):
                    kept = policy.select(row, keep)
                    assert all(torch.equal(indices, torch.arange(tokens)) for indices in kept)
                    keys, values = policy.hold(row, kept)
                    assert torch.equal(torch.stack(keys), row.key) and torch.equal(torch.stack(values), row.value)


@pytest.mark.parametrize("name", EVICTORS)
def test_scopes_spare_the_other_kind(name: str) -> None:
    for scope, spared in (("visual", False), ("text", True)):
        policy = evictor(name, scope=scope)
        keep = 38 if name in ("pyramidkv", "tgv-kv") else 36  # whose layers differ
        for row in prompt(policy):
            for visual, kept in zip(row.visual, policy.select(row, keep), strict=True):
                assert int((visual[kept] == spared).sum()) == int((visual == spared).sum())


@pytest.mark.parametrize("name", EVICTORS)
def test_a_budget_too_small_for_what_must_stay_is_an_error(name: str) -> None:
    policy = evictor(name, scope="visual")
    with pytest.raises(SpecError, match=rf"^{name}: \d+ entries must stay, but layer 0 may hold \d+; raise keep\.$"):
        policy.select(prompt(policy)[0], 3)


@pytest.mark.parametrize("name", EVICTORS)
def test_rows_are_scored_for_themselves_in_any_type(name: str) -> None:
    policy = evictor(name)
    row = prompt(policy)[1]
    assert policy.score(row).dtype == torch.float32
    half = replace(row, key=row.key.bfloat16(), value=row.value.bfloat16())
    if row.query is not None:
        half = replace(half, query=row.query.bfloat16())
    half = observed(policy, half)
    assert policy.score(half).dtype == torch.float32
    keys, values = policy.hold(half, policy.select(half, 20))
    assert {states.dtype for states in (*keys, *values)} == {torch.bfloat16}


@pytest.mark.parametrize("name", [name for name in EVICTORS if evictor(name).schedule == "step"])
def test_steps_stay_within_the_budget(name: str) -> None:
    policy = evictor(name)
    rows = prompt(policy)
    for row in rows:
        first = policy.select(row, 14)
        kept = first
        for step in range(12):
            row = after(policy, row, kept, seed=1000 + step)
            kept = policy.select(row, 14)
            assert {len(indices) for indices in kept} == {len(first[0])}
            assert all(int(indices[-1]) == row.entries - 1 for indices in kept), "the newest token has gone"
    if name == "h2o":
        assert row.place.min() < TOKENS, "no heavy hitter is left"


def test_of_equal_scores_the_earlier_entry_stays() -> None:
    row = prompt(evictor("keydiff"))[0]
    same = replace(row, key=torch.ones_like(row.key))
    assert all(kept.tolist() == list(range(9)) for kept in evictor("keydiff").select(same, 9))


def test_random_depends_on_seed_layer_and_size_alone() -> None:
    policy, changed = evictor("random"), evictor("random", seed=1)

    def chosen(policy: Evictor, rows: Sequence[KVRow]) -> list[tuple[int, ...]]:
        return [tuple(kept.tolist()) for row in rows for kept in policy.select(row, 10)]

    kept = chosen(policy, prompt(policy))
    assert chosen(policy, prompt(policy, seed=5)) == kept
    assert len({*kept, *chosen(changed, prompt(policy))}) == 2 * HEADS * LAYERS


def test_streamingllm_keeps_sinks_and_recent_tokens() -> None:
    policy = evictor("streamingllm", sinks=2)
    row = prompt(policy)[0]
    for step in range(5):
        kept = policy.select(row, 6)
        places = row.place.gather(1, torch.stack(kept))
        assert places.tolist() == [[0, 1, *range(TOKENS + step - 4, TOKENS + step)]] * HEADS
        row = after(policy, row, kept, step)
    with pytest.raises(SpecError, match="sinks=-1"):
        evictor("streamingllm", sinks=-1)


def test_renumbered_keys_are_where_they_would_have_been() -> None:
    policy = evictor("streamingllm", sinks=2, compat="official")
    assert (policy.positions, evictor("streamingllm").positions) == ("renumber", "original")
    row = prompt(policy)[0]
    key = sequence(0, TOKENS)[1]
    kept = policy.select(row, 6)
    moved = policy.hold(row, kept)[0]
    expected = rotate(key[:, [0, 1, *range(TOKENS - 4, TOKENS)]], rotation(torch.arange(6)))
    torch.testing.assert_close(torch.stack(moved), expected, rtol=1e-4, atol=1e-5)


def test_turning_back_undoes_turning_even_where_it_scales() -> None:
    states, (cosine, sine) = torch.randn(2, 5, DIM), rotation(torch.arange(5))
    for scale in (1.0, 1.3):
        turned = rotate(states, (scale * cosine, scale * sine))
        torch.testing.assert_close(unrotate(turned, (scale * cosine, scale * sine)), states, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reduction", ["mean", "max", "sum"])
@pytest.mark.parametrize("pooling", ["avg", "max"])
def test_snapkv_scores(reduction: str, pooling: str) -> None:
    policy = evictor("snapkv", window=5, kernel=3, pooling=pooling, group_reduction=reduction)
    row = prompt(policy)[2]
    score = policy.score(row)
    for head in range(HEADS):
        by_reader = torch.zeros(GROUP, TOKENS - 5)
        for reader in range(GROUP):
            for place in range(TOKENS - 5, TOKENS):
                query = row.query[head * GROUP + reader, place - TOKENS + 5]
                by_reader[reader] += (row.key[head, : place + 1] @ query * DIM**-0.5).softmax(0)[: TOKENS - 5]
        plain = by_reader.amax(0) if reduction == "max" else getattr(by_reader, reduction)(dim=0)
        padded = [0.0, *plain.tolist(), 0.0]
        near = [padded[n : n + 3] for n in range(TOKENS - 5)]
        expected = [max(n) if pooling == "max" else sum(n) / 3 for n in near]
        torch.testing.assert_close(score[head, : TOKENS - 5], torch.tensor(expected))


@pytest.mark.parametrize("options", [{"window": 0}, {"kernel": 4}, {"kernel": 0}])
def test_windows_and_kernels_are_checked(options: dict[str, int]) -> None:
    for name in ("snapkv", "pyramidkv", "adakv"):
        with pytest.raises(SpecError, match=rf"^{name}: {next(iter(options))}="):
            evictor(name, **options)


def test_even_a_wide_kernel_pools_a_few_entries() -> None:
    assert pool(torch.tensor([[3.0, 6.0]]), 7, "avg").tolist() == [[pytest.approx(9 / 7)] * 2]
    assert pool(torch.tensor([[3.0, 6.0]]), 7, "max").tolist() == [[6.0, 6.0]]


@pytest.mark.parametrize(("keep", "tokens"), [(20, 400), (33, 70), (128, 600), (40, 77)])
@pytest.mark.parametrize("layers", [1, 2, 7, 32])
def test_pyramids_fall_linearly_and_sum_up(keep: int, tokens: int, layers: int) -> None:
    policy = evictor("pyramidkv", window=8)
    states = torch.zeros(1, tokens, 1)
    place = torch.arange(tokens)[None]
    row = KVRow(0, layers, states, states, place, place < 0, tokens, 1.0)
    budgets = [policy.budget(replace(row, layer=layer), keep) for layer in range(layers)]
    assert sum(budgets) == layers * keep and budgets == sorted(budgets, reverse=True)
    assert max(budgets) <= tokens and min(budgets) >= 8
    if layers > 1 and tokens >= 2 * (keep - 8):
        steps = [a - b for a, b in zip(budgets, budgets[1:], strict=False)]
        assert max(steps) - min(steps) <= 1


@pytest.mark.parametrize("floor", [0.0, 0.2, 0.7, 1.0])
def test_adakv_blends_equal_shares_with_what_heads_win(floor: float) -> None:
    policy = evictor("adakv", floor=floor)
    for keep in (9, 10, 25, 39):
        stays = torch.zeros(3, 40, dtype=torch.bool)
        stays[:, -4:] = True
        scores = torch.stack([torch.arange(40.0), torch.arange(40.0) + 20.5, torch.full((40,), -1.0)])
        budgets = policy.head_budgets(scores, stays, keep)
        free, equal = keep - 4, int((keep - 4) * floor)
        assert sum(budgets) == 3 * keep and all(4 + equal <= budget <= 40 for budget in budgets)
        ranked = sorted(((float(scores[h, n]), h) for h in range(3) for n in range(36)), reverse=True)[: 3 * free]
        for head, budget in enumerate(budgets):
            won = sum(h == head for _, h in ranked)
            assert abs(budget - (4 + equal + won * (free - equal) / free)) < 1
    with pytest.raises(SpecError, match=r"adakv: floor=1\.5"):
        evictor("adakv", floor=1.5)


def test_h2o_sums_attention_up_over_steps() -> None:
    policy = evictor("h2o", recent=0.25)
    row = prompt(policy)[0]
    expected = torch.zeros(HEADS, TOKENS)
    for place in range(TOKENS):
        for head in range(HEADS * GROUP):
            logits = row.key[head // GROUP, : place + 1] @ row.query[head, place] * DIM**-0.5
            expected[head // GROUP, : place + 1] += logits.softmax(0) / GROUP
    torch.testing.assert_close(policy.score(row), expected)
    kept = policy.select(row, 12)
    recent = torch.arange(TOKENS - 3, TOKENS)
    for head, indices in enumerate(kept):
        heavy = expected[head, : TOKENS - 3].topk(9).indices
        assert torch.equal(indices, torch.cat([heavy, recent]).sort().values)
    grown = after(policy, row, kept, seed=9)
    for head in range(HEADS):
        rows = (grown.query[head * GROUP : head * GROUP + GROUP, 0] @ grown.key[head].T * DIM**-0.5).softmax(-1)
        before = torch.cat([expected[head, kept[head]], torch.zeros(1)])
        torch.testing.assert_close(policy.score(grown)[head], before + rows.mean(0))
    assert evictor("h2o", schedule="prefill").needs().steps is False


@pytest.mark.parametrize("name", ["h2o", "keyformer"])
def test_the_official_masks_lose_the_oldest_recent_token(name: str) -> None:
    policy, ours = evictor(name, recent=5, compat="official"), evictor(name, recent=5)
    row = prompt(policy)[0]
    for official, kept in zip(policy.select(row, 12), ours.select(row, 12), strict=True):
        assert official.tolist() == [entry for entry in kept.tolist() if entry != TOKENS - 5]


@pytest.mark.parametrize("recent", [0, -1, 0.0, 1.5])
def test_recent_entries_are_a_fraction_or_a_count(recent: float) -> None:
    for name in ("h2o", "keyformer", "lookm"):
        with pytest.raises(SpecError, match=rf"^{name}: recent="):
            evictor(name, recent=recent)


def test_keyformer_without_noise_at_temperature_one_is_h2o(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = evictor("keyformer", group_reduction="mean")
    row = prompt(evictor("h2o"), tokens=150)[0]
    assert not torch.allclose(policy.observe(row), row.observed, rtol=0.05)
    monkeypatch.setattr(type(policy), "noise", lambda self, row, queries: torch.zeros(()))
    torch.testing.assert_close(policy.observe(row), row.observed)
    step = replace(row, query=row.query[:, -1:], generated=50)
    logits = step.grouped(step.query) @ step.key[:, None].mT * DIM**-0.5
    torch.testing.assert_close(policy.observe(step), (logits / 1.5).softmax(-1).mean(dim=(1, 2)))
    for options in ({"temperature": 0.0}, {"temperature_step": -1.0}):
        with pytest.raises(SpecError, match="keyformer: temperature"):
            evictor("keyformer", **options)


def test_keyformer_noise_knows_tokens_and_no_more() -> None:
    policy = evictor("keyformer")
    row = prompt(policy)[1]
    noise = policy.noise(row, torch.arange(TOKENS))
    assert noise.shape == (HEADS, GROUP, TOKENS, TOKENS)
    few = torch.tensor([[0, 3, 9], [1, 2, 39]])
    held = replace(row, place=few, key=row.key[:, :3])
    part = policy.noise(held, torch.tensor([7, 39]))
    for head in range(HEADS):
        torch.testing.assert_close(part[head], noise[head][:, [7, 39]][..., few[head]])
    for changed in (
        replace(policy, seed=1).noise(row, row.place[0]),
        policy.noise(replace(row, layer=2), row.place[0]),
    ):
        assert float((changed == noise).float().mean()) < 0.01


def test_gumbel_noise_is_standard_and_uncorrelated() -> None:
    noise = gumbel((7, torch.arange(500)[:, None], torch.arange(600)))
    assert noise.isfinite().all()
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.01)
    assert float(noise.var()) == pytest.approx(math.pi**2 / 6, abs=0.02)
    for shifted in (noise.roll(1, 0), noise.roll(1, 1), gumbel((8, torch.arange(500)[:, None], torch.arange(600)))):
        assert abs(float(torch.corrcoef(torch.stack([noise.flatten(), shifted.flatten()]))[0, 1])) < 0.01


def test_keydiff_is_distance_from_the_mean_direction() -> None:
    policy = evictor("keydiff")
    row = prompt(policy)[0]
    for head in range(HEADS):
        directions = row.key[head] / row.key[head].norm(dim=1, keepdim=True)
        mean = directions.mean(dim=0)
        torch.testing.assert_close(policy.score(row)[head], -(directions @ mean) / mean.norm())


@pytest.mark.parametrize("covariance", [True, False])
def test_expected_attention_turns_queries_to_the_future(covariance: bool) -> None:
    policy = evictor("expected-attention", future=6, sinks=3, covariance=covariance, epsilon=0.1)
    row = prompt(policy)[3]
    eye = torch.eye(DIM)
    turns = [torch.stack([rotate(axis[None], rotation(torch.tensor([TOKENS + n])))[0] for axis in eye], dim=1)
             for n in range(6)]  # fmt: skip
    turn = torch.stack(turns).mean(dim=0)
    for head in range(HEADS):
        expected = torch.zeros(TOKENS - 3)
        for reader in range(GROUP):
            queries = row.unrotated[head * GROUP + reader, 3:]
            mean = turn @ queries.mean(dim=0)
            spread = turn @ torch.cov(queries.T, correction=0) @ turn.T
            keys = row.key[head, 3:]
            logits = keys @ mean / DIM**0.5
            if covariance:
                logits += torch.stack([key @ spread @ key for key in keys]) / (2 * DIM)
            expected += logits.softmax(0) / GROUP
        torch.testing.assert_close(
            policy.score(row)[head, 3:], (expected + 0.1) * row.value[head, 3:].norm(dim=1), rtol=1e-4, atol=1e-5
        )
    with pytest.raises(SpecError, match="expected-attention: future"):
        evictor("expected-attention", future=0)


def test_lookm_lets_images_go_before_text() -> None:
    policy = evictor("lookm", recent=2)
    row = prompt(policy)[0]
    text = int((~row.visual[0]).sum())
    for visual, kept in zip(row.visual, policy.select(row, text + 3), strict=True):
        assert int((~visual[kept]).sum()) == text
    for head, kept in enumerate(policy.select(row, text - 3)):
        assert not bool(row.visual[head, kept].any())
        best = row.observed[head].masked_fill(row.visual[head], -1)[:-2].topk(text - 5).indices
        assert set(kept.tolist()) == {*best.tolist(), TOKENS - 2, TOKENS - 1}
    plain = evictor("lookm", recent=2, text_first=False)
    assert torch.equal(plain.score(row), row.observed)


@pytest.mark.parametrize("merge", ["pivot", "weighted", "none"])
def test_lookm_merges_what_goes_into_the_nearest_key(merge: str) -> None:
    policy = evictor("lookm", merge=merge)
    row = prompt(policy)[0]
    kept = policy.select(row, 12)
    keys, values = policy.hold(row, kept)
    for head, indices in enumerate(kept):
        gone = [n for n in range(TOKENS) if n not in indices.tolist()]
        unit = row.key[head] / row.key[head].norm(dim=1, keepdim=True)
        similarity = unit[gone] @ unit[indices].T
        nearest = similarity.argmax(dim=1)
        for states, held in ((row.key[head], keys[head]), (row.value[head], values[head])):
            for slot, entry in enumerate(indices):
                merging = [n for n, target in enumerate(nearest) if target == slot]
                own = states[entry]
                if merge == "pivot":
                    own = torch.stack([own, *((states[gone[n]] + own) / 2 for n in merging)]).mean(dim=0)
                elif merge == "weighted":
                    weights = [(float(similarity[n, slot]) + 1) / 2 for n in merging]
                    own = own + sum(w * states[gone[n]] for w, n in zip(weights, merging, strict=True))
                    own = own / (1 + sum(weights))
                torch.testing.assert_close(held[slot], own, rtol=1e-5, atol=1e-5)


def test_absorbing_is_a_weighted_mean() -> None:
    centres, sources = torch.tensor([[1.0], [4.0], [9.0]]), torch.tensor([[3.0], [5.0], [6.0]])
    merged = absorb(centres, sources, torch.tensor([0, 0, 2]), torch.tensor([1.0, 2.0, 0.5]))
    assert merged.flatten().tolist() == [pytest.approx((1 + 3 + 10) / 4), 4.0, pytest.approx((9 + 3) / 1.5)]
    assert others(torch.tensor([0, 2]), 4).tolist() == [1, 3]


@pytest.mark.parametrize(("merged", "threshold"), [(0.5, 0.1), (1.0, 0.3), (0.0, 0.1), (1.0, 1.1), (9.0, 0.0)])
def test_ems_merges_the_next_in_rank_where_they_are_similar(merged: float, threshold: float) -> None:
    policy = evictor("ems", merged=merged, threshold=threshold)
    row = prompt(policy)[0]
    kept = policy.select(row, 14)
    keys, values = policy.hold(row, kept)
    for head, indices in enumerate(kept):
        ranked = policy.score(row)[head, :-4].argsort(descending=True).tolist()
        centres, sources = sorted(ranked[:10]), ranked[10 : 10 + round(10 * merged)]
        assert indices.tolist() == [*centres, *range(TOKENS - 4, TOKENS)]
        merging: dict[int, list[int]] = {centre: [] for centre in centres}
        for source in sources:
            likeness = [
                math.prod(
                    max(0.0, float(torch.cosine_similarity(states[head, source], states[head, centre], dim=0)))
                    for states in (row.key, row.value)
                )
                for centre in centres
            ]
            if max(likeness) >= threshold:
                merging[centres[likeness.index(max(likeness))]].append(source)
        for states, held in ((row.key[head], keys[head]), (row.value[head], values[head])):
            expected = [states[[centre, *merging[centre]]].mean(dim=0) for centre in centres]
            torch.testing.assert_close(held, torch.cat([torch.stack(expected), states[-4:]]), rtol=1e-5, atol=1e-5)


def test_ems_aligns_local_with_global_attention() -> None:
    policy = evictor("ems")
    overall, local = policy.attention(prompt(policy)[0])
    torch.testing.assert_close(overall.mean(dim=1), local.mean(dim=1))
    assert torch.equal(policy.score(prompt(policy)[0])[:, :-4], torch.maximum(overall, local))


def test_tgv_kv_lets_attended_text_vote() -> None:
    policy = evictor("tgv-kv")
    row = prompt(policy)[0]
    question = TOKENS - IMAGE.stop
    attention = torch.zeros(question, TOKENS)
    for n, place in enumerate(range(IMAGE.stop, TOKENS)):
        for head in range(HEADS * GROUP):
            logits = row.key[head // GROUP, : place + 1] @ row.query[head, n] * DIM**-0.5
            attention[n, : place + 1] += logits.softmax(0) / (HEADS * GROUP)
    votes = torch.zeros(TOKENS)
    for n in range(question):
        votes += attention[n] * attention[n:, IMAGE.stop + n].mean()
    torch.testing.assert_close(policy.score(row)[:, IMAGE], votes[IMAGE].expand(HEADS, -1))
    torch.testing.assert_close(policy.mass(row), attention[:, IMAGE].sum())
    assert policy.score(row)[~row.visual].min() > policy.score(row)[row.visual].max()


def test_tgv_kv_shares_out_by_mass_and_stays_there() -> None:
    policy = evictor("tgv-kv")
    rows = [replace(row, masses=torch.tensor([5.0, 3.0, 2.0, 0.0, 0.0])) for row in prompt(policy)]
    budgets = [policy.budget(row, 20) for row in rows]
    assert budgets == [40, 30, 20, 5, 5]
    for row in rows:
        kept = policy.select(row, 20)
        assert policy.budget(after(policy, row, kept, 3), 20) == budgets[row.layer]
    text_only = [replace(row, masses=torch.zeros(LAYERS)) for row in rows]
    assert [policy.budget(row, 20) for row in text_only] == [20] * LAYERS


@pytest.mark.parametrize(
    ("total", "weights", "bounds", "parts"),
    [
        (10, [1, 1, 1], (0, 10), [4, 3, 3]),
        (10, [3, 1, 1], (0, 10), [6, 2, 2]),
        (10, [3, 1, 1], (0, 4), [4, 3, 3]),
        (10, [98, 1, 1], (1, 8), [8, 1, 1]),
        (10, [98, 1, 1], (2, 7), [6, 2, 2]),
        (12, [0, 0, 0], (1, 9), [4, 4, 4]),
        (9, [1, 0, 5], (3, 3), [3, 3, 3]),
        (0, [1, 2], (0, 5), [0, 0]),
    ],
)
def test_shares_within_bounds(total: int, weights: list[int], bounds: tuple[int, int], parts: list[int]) -> None:
    assert in_proportion(total, weights, *bounds) == parts


def test_shares_always_sum_up() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        count, least, span = (int(torch.randint(low, 12, (), generator=generator)) for low in (1, 0, 1))
        most = least + span
        total = int(torch.randint(count * least, count * most + 1, (), generator=generator))
        weights = (torch.rand(count, generator=generator) ** 6).tolist()
        parts = in_proportion(total, weights, least, most)
        assert sum(parts) == total and all(least <= part <= most for part in parts)
    with pytest.raises(ValueError, match="cannot share 11 over 2 parts of 0 to 5"):
        in_proportion(11, [1.0, 1.0], 0, 5)


def test_text_ranks_above_images_without_losing_their_order() -> None:
    scores, visual = torch.tensor([[1e-4, 1000.0, 2e-4, 1.0]]), torch.tensor([[True, False, True, False]])
    ranked = text_first(scores, visual)
    assert ranked[0].argsort(descending=True).tolist() == [1, 3, 2, 0]
    assert torch.equal(text_first(scores, torch.zeros_like(visual)), scores)
