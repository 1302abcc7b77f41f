"""Token Transforming against a plain reading of its rule, and the maps it takes."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mmcompress.encoder_method import Attention, LayerTokens, Mixture, Reduction, Step, TokenMap
from mmcompress.errors import SpecError
from mmcompress.merging import Matching
from mmcompress.methods._attention import Score
from mmcompress.methods.token_transforming import TokenTransforming
from mmcompress.types import EncoderFacts, Needs

ENCODER = EncoderFacts(6, 5, tuple(range(5)), patches=16)
CLIP_L = EncoderFacts(24, 23, tuple(range(23)), patches=576)
HEADS = 3


def layer_tokens(seed: int, tokens: int, cls: int, dtype: torch.dtype = torch.float32) -> LayerTokens:
    """Two images with tokens of random sizes inside a layer."""
    generator = torch.Generator().manual_seed(seed)
    query, key = 1.5 * torch.randn(2, 2, HEADS, tokens, 4, generator=generator)
    hidden = torch.randn(2, tokens, 5, generator=generator)
    size = torch.randint(1, 5, (2, tokens), generator=generator).float()
    return LayerTokens(ENCODER, 2, cls, hidden.to(dtype), size, Attention(query.to(dtype), key.to(dtype), 0.5))


def cosine(one: Tensor, other: Tensor) -> float:
    return float(one @ other / (one.norm() * other.norm()))


def attended(query: Tensor, key: Tensor, scaling: float, score: Score) -> list[float]:
    """Attention of one image's tokens, from `[heads, tokens, dim]`."""
    tokens = key.shape[1]
    totals = [0.0] * tokens
    for head in range(HEADS):
        for i in [0] if score == "cls" else range(tokens):
            odds = [math.exp(float(query[head, i] @ key[head, j]) * scaling) for j in range(tokens)]
            totals = [total + odd / sum(odds) for total, odd in zip(totals, odds, strict=True)]
    return totals


@pytest.mark.parametrize("temperature", [0.1, 0.7])
@pytest.mark.parametrize(("score", "cls"), [("cls", 1), ("received", 1), ("received", 0)])
def test_patches_are_shared_out_over_anchors(score: Score, cls: int, temperature: float) -> None:
    tokens, left = layer_tokens(3, 10, cls), 4
    assert tokens.attention is not None
    query, key, scaling = tokens.attention
    mixture = TokenTransforming(temperature, score).reduce(tokens, Step(left))
    outputs = mixture.apply(tokens.hidden)
    for image in range(2):
        scores, patches = attended(query[image], key[image], scaling, score), range(cls, 10)
        anchors = sorted(sorted(patches, key=lambda i: -scores[i])[:left])
        assert mixture.kept[image].tolist() == [*range(cls), *anchors]
        metric, size = key[image].mean(0), tokens.size[image].tolist()
        given = {}
        for j in patches:
            odds = [math.exp(cosine(metric[i], metric[j]) / temperature) for i in anchors]
            given |= {(i, j): odd / sum(odds) * size[j] for i, odd in zip(anchors, odds, strict=True)}
        for output, i in enumerate(anchors, start=cls):
            mass = sum(given[i, j] for j in patches)
            mean = sum(given[i, j] * tokens.hidden[image, j] for j in patches) / mass
            torch.testing.assert_close(outputs[image, output], mean, atol=1e-5, rtol=1e-4)
            assert float(mixture.size[image, output]) == pytest.approx(mass, rel=1e-4)
        if cls:
            assert torch.equal(outputs[image, 0], tokens.hidden[image, 0]) and mixture.size[image, 0] == size[0]
    torch.testing.assert_close(mixture.size.sum(1), tokens.size.sum(1))


def test_a_token_between_two_goes_into_both() -> None:
    """Anchors at right angles, the third token between them, the fourth on the first."""
    key = torch.tensor([[1.0, 0], [0, 1], [1, 1], [1, 0]])[None, None]
    attention = Attention(torch.zeros(1, 1, 4, 2), key, 1.0)
    tokens = LayerTokens(ENCODER, 2, 0, torch.eye(4)[None], torch.ones(1, 4), attention)
    mixture = TokenTransforming(1 / math.log(3), "received").reduce(tokens, Step(2))
    assert mixture.kept.tolist() == [[0, 1]], "of tokens attended to alike, the first"
    expected = torch.tensor([[[0.75, 0.25, 0.5, 0.75], [0.25, 0.75, 0.5, 0.25]]])
    torch.testing.assert_close(mixture.size, torch.tensor([[2.25, 1.75]]))
    torch.testing.assert_close(mixture.apply(tokens.hidden), expected / mixture.size[..., None])


def test_a_low_temperature_merges_into_the_most_similar_anchor() -> None:
    tokens = layer_tokens(4, 11, 1)
    assert tokens.attention is not None
    mixture = TokenTransforming(1e-4).reduce(tokens, Step(4))
    for image in range(2):
        metric, anchors = tokens.attention.key[image].mean(0), mixture.kept[image].tolist()
        nearest = [max(range(1, 5), key=lambda i: cosine(metric[anchors[i]], metric[j])) for j in range(1, 11)]
        assert (mixture.weight[image] > 1e-6).long().T.tolist() == [
            [int(output == into) for output in range(5)] for into in [0, *nearest]
        ]


def test_half_precision_stays() -> None:
    tokens = layer_tokens(5, 9, 1, torch.bfloat16)
    assert tokens.attention is not None
    mixture = TokenTransforming().reduce(tokens, Step(5))
    query, key, scaling = tokens.attention
    exact = replace(tokens, attention=Attention(query.float(), key.float(), scaling))
    torch.testing.assert_close(mixture.weight, TokenTransforming().reduce(exact, Step(5)).weight)
    assert mixture.apply(tokens.hidden).dtype == torch.bfloat16


def test_three_layers_transform_by_the_same_ratio() -> None:
    steps = TokenTransforming().plan(216, 27, EncoderFacts(12, 12, ()))
    assert [step.left for step in steps] == [216] * 3 + [108] * 3 + [54] * 3 + [27] * 3
    assert TokenTransforming().needs(CLIP_L) == Needs(cls_rows=(6, 12, 18), key_metric=(6, 12, 18))
    received = TokenTransforming(score="received").needs(EncoderFacts(3, 2, (0, 1)))
    assert received == Needs(received_attention=(1,), key_metric=(1,))
    assert not TokenTransforming().proportional and TokenTransforming().place == "layer"


@pytest.mark.parametrize("temperature", [0, -0.1])
def test_temperatures_out_of_range_are_refused(temperature: float) -> None:
    with pytest.raises(SpecError, match=f"temperature={temperature} must be above 0"):
        TokenTransforming(temperature)


# --- maps of both kinds


def mixture(seed: int, tokens: int, outputs: int) -> Mixture:
    generator = torch.Generator().manual_seed(seed)
    kept = torch.stack([torch.randperm(tokens, generator=generator)[:outputs] for _ in range(2)])
    size, weight = torch.rand(2, outputs, generator=generator), torch.rand(2, outputs, tokens, generator=generator)
    return Mixture(kept, size, weight)


def reduction(seed: int, tokens: int, outputs: int) -> Reduction:
    kept, size, weight = (getattr(mixture(seed, tokens, outputs), name) for name in ("kept", "size", "weight"))
    return Reduction(kept, size, weight.argmax(dim=1), weight.amax(dim=1))


@pytest.mark.parametrize("first", [mixture, reduction])
@pytest.mark.parametrize("second", [mixture, reduction])
def test_maps_of_both_kinds_follow_one_another(first: type[TokenMap], second: type[TokenMap]) -> None:
    one, other = first(1, 7, 5), second(2, 5, 3)
    both, values = one.then(other), torch.randn(2, 7, 4)
    torch.testing.assert_close(both.apply(values), other.apply(one.apply(values)))
    torch.testing.assert_close(both.matrix(), other.matrix() @ one.matrix())
    assert both.kept.tolist() == [one.kept[image][other.kept[image]].tolist() for image in range(2)]
    assert torch.equal(both.size, other.size)
    assert isinstance(both, Reduction) == (first is second is reduction)


@pytest.mark.parametrize("build", [mixture, reduction])
def test_maps_move_whole(build: type[TokenMap]) -> None:
    moved = build(3, 6, 4).to(torch.device("meta"))
    assert {values.device.type for values in vars(moved).values()} == {"meta"}
    assert type(moved) is type(build(3, 6, 4))


def test_selections_of_mixtures_leave_cls_out() -> None:
    weight = torch.tensor([[[1.0, 0, 0, 0], [0, 0.5, 0.25, 0.25], [0, 0.2, 0.2, 0.6]]])
    (selection,) = Mixture(torch.tensor([[0, 1, 3]]), torch.ones(1, 3), weight).selections(1)
    assert selection.anchor.tolist() == [0, 2]
    assert selection.weight is not None and torch.equal(selection.weight, weight[0, 1:, 1:])


def test_a_reduction_is_a_matrix() -> None:
    pairs = Matching(torch.tensor([[3, 0]]), torch.tensor([[1, 0, 1, 0]]))
    averaged = Reduction.average(pairs, torch.tensor([[1.0, 3, 3, 1]]), torch.tensor([[1.0, 2, 3, 4]]))
    assert averaged.matrix().tolist() == [[[0, 0.75, 0, 0.25], [0.25, 0, 0.75, 0]]]
    assert averaged.size.tolist() == [[6, 4]]
    assert Reduction.keep(torch.tensor([[2]]), torch.ones(1, 3)).matrix().tolist() == [[[0, 0, 1]]]
