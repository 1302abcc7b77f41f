"""Merging and pruning between encoder layers equals a recomputation by hand, layer by layer and image by image."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from hf.fake_flash import fake_flash_attention
from hf.families import FAMILIES, IMAGE, Kind
from hf.oracle import Recomputed, ReferenceItem, loss, recompute
from hf.test_exactness import STEPS, TOLERANCE, assert_exact, generate
from hf.test_wrap import Failure, assert_same, greedy, snapshot
from registered import RATES, variants
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import PreTrainedModel

import mmcompress
import mmcompress.methods.token_transforming
from mmcompress import SpecError, UnsupportedError
from mmcompress.errors import InputError
from mmcompress.registry import METHODS
from mmcompress.spec import Spec
from mmcompress.types import Selection

KEEP, KEPT, PATCHES = 0.4, 6, 16
WAYS = ("energy", "places", "interleaved")
DIFFRATE = str(Spec("diffrate", None, {"rates": RATES}))


@dataclass(frozen=True)
class Layer:
    """One image inside one layer of the recomputation; index 0 is CLS if `cls` is 1.

    Args:
        number: the layer.
        depth: layers in all.
        cls: how many tokens are never removed.
        hidden: `[tokens, width]` what is merged.
        keys: `[heads, tokens, dim]`.
        attention: `[heads, tokens, tokens]` the map, rows summing to 1.
        size: patches each token stands for.
        left: patches to leave.
    """

    number: int
    depth: int
    cls: int
    hidden: Tensor
    keys: Tensor
    attention: Tensor
    size: list[float]
    left: int


Output = tuple[int, dict[int, float], float]
"""The token whose place it takes, what it is a mix of, and how many patches it stands for."""
Rule = Callable[[Layer], list[Output]]


@dataclass(frozen=True)
class Reading:
    """A method read from its formula: its rule, where in the layer it acts, tokens left per layer, size bias or not."""

    rule: Rule
    left: tuple[int, int]
    after_attention: bool
    proportional: bool


def cosine(one: Tensor, other: Tensor) -> float:
    return float(one @ other / (one.norm() * other.norm()))


def nearest(vectors: Tensor, token: int, candidates: list[int]) -> tuple[float, int]:
    """The largest cosine and whose it is."""
    return max((cosine(vectors[token], vectors[other]), -other) for other in candidates)


def merged(groups: dict[int, list[int]], order: list[int], mass: list[float], size: list[float]) -> list[Output]:
    """Outputs in `order`: each kept token with those that merge into it, mixed by `mass`."""
    outputs = []
    for kept in order:
        members = [kept, *groups.get(kept, [])]
        total = sum(mass[i] for i in members)
        outputs.append((kept, {i: mass[i] / total for i in members}, sum(size[i] for i in members)))
    return outputs


def alternate(vectors: Tensor, count: int, cls: int) -> tuple[dict[int, list[int]], list[int]]:
    """ToMe's matching: what merges into which odd place, and the outputs in order."""
    even, odd = range(0, len(vectors), 2), list(range(1, len(vectors), 2))
    pairs = [(*nearest(vectors, a, odd), a) for a in even if a >= cls]
    pairs.sort(reverse=True)
    groups: dict[int, list[int]] = {}
    for _, other, a in pairs[:count]:
        groups.setdefault(-other, []).append(a)
    stay = [a for *_, a in pairs[count:]]
    return groups, (sorted([*range(cls), *stay]) if cls else stay) + odd


def tome(layer: Layer) -> list[Output]:
    count = len(layer.hidden) - layer.cls - layer.left
    groups, order = alternate(layer.keys.mean(0), count, layer.cls)
    return merged(groups, order, layer.size, layer.size)


def pitome(matching: str = "staged", metric: str = "hidden", average: str = "plain") -> Rule:
    def rule(layer: Layer) -> list[Output]:
        vectors = layer.hidden if metric == "hidden" else layer.keys.mean(0)
        tokens, count = len(vectors), len(vectors) - layer.cls - layer.left
        mass = [1.0] * tokens if average == "plain" else layer.size
        if matching == "places" or (
            matching == "staged" and layer.number == 0
        ):  # of 2 used layers 1 is behind the 12th
            groups, order = alternate(vectors, count, layer.cls)
            return merged(groups, order, mass, layer.size)
        margin = 0.9 - 0.9 * layer.number / layer.depth
        patches = range(layer.cls, tokens)

        def cut(closeness: float) -> float:
            return closeness - margin if closeness > margin else math.exp(closeness - margin) - 1

        energy = {i: sum(cut(cosine(vectors[i], vectors[j])) for j in patches) for i in patches}
        ranked = sorted(patches, key=lambda i: -energy[i])
        candidates = ranked if matching == "interleaved" else ranked[: 2 * count]
        sources, targets = candidates[::2], candidates[1::2]
        pairs = sorted(((nearest(vectors, a, targets)), a) for a in sources)[::-1]
        groups: dict[int, list[int]] = {}
        for (_, other), a in pairs[:count]:
            groups.setdefault(-other, []).append(a)
        order = [*range(layer.cls), *ranked[len(candidates) :], *(a for _, a in pairs[count:]), *targets]
        return merged(groups, order, mass, layer.size)

    return rule


def diffrate(layer: Layer) -> list[Output]:
    row = layer.attention[:, 0].mean(0).tolist()
    ranked = [0, *sorted(range(1, len(row)), key=lambda i: -row[i])]
    ranked = ranked[: len(ranked) - 2]  # the table prunes two in each of the two layers
    kept, tail = ranked[: 1 + layer.left], ranked[1 + layer.left :]
    groups: dict[int, list[int]] = {}
    size = list(layer.size)
    for token in tail:
        closeness, other = nearest(layer.hidden, token, kept[1:])
        groups.setdefault(-other, []).append(token)
        size[token] *= max(closeness, 0.0)
    return merged(groups, kept, [1.0] * len(row), size)


def zerotprune(start: str = "cls") -> Rule:
    def importance(graph: Tensor, iterations: int) -> list[float]:
        heads = []
        for attention in graph:
            scores = torch.ones(len(attention))
            if start == "cls":
                scores[0] = math.sqrt(len(attention))
                scores = scores / scores.mean()
            for _ in range(iterations):
                scores = torch.stack([(scores * attention[:, j]).sum() for j in range(len(attention))])
            heads.append(scores)
        telling = [scores for scores in heads if 0.01 <= float(((scores - scores.mean()) ** 2).mean()) <= 0.7]
        chosen = telling or heads
        return (sum(scores**2 for scores in chosen) / len(chosen)).sqrt().tolist()

    def rule(layer: Layer) -> list[Output]:
        keys = layer.keys.transpose(0, 1).flatten(1)
        rank, patches = importance(layer.attention, 1), range(layer.cls, len(keys))
        ranked = sorted(patches, key=lambda i: -rank[i])
        better, lesser = ranked[: math.ceil(len(ranked) / 2)], ranked[math.ceil(len(ranked) / 2) :]
        lesser.sort(key=lambda i: -nearest(keys, i, better)[0])
        gone = lesser[: (len(patches) - layer.left) // 2]
        alive = [i for i in range(len(keys)) if i not in gone]
        graph = layer.attention[:, alive][:, :, alive]
        scores = importance(graph / graph.sum(-1, keepdim=True), [50, 10][layer.number])
        by_score = sorted(range(layer.cls, len(alive)), key=lambda i: -scores[i])
        kept = sorted(alive[i] for i in by_score[: layer.left])
        return [(i, {i: 1.0}, 1.0) for i in [*range(layer.cls), *kept]]

    return rule


def token_transforming(score: str = "cls") -> Rule:
    def rule(layer: Layer) -> list[Output]:
        scores = layer.attention[:, 0].mean(0) if score == "cls" else layer.attention.mean((0, 1))
        patches, keys = range(layer.cls, len(layer.size)), layer.keys.mean(0)
        anchors = sorted(sorted(patches, key=lambda i: -float(scores[i]))[: layer.left])
        given: dict[int, dict[int, float]] = {i: {} for i in anchors}
        for j in patches:
            odds = {i: math.exp(cosine(keys[i], keys[j]) / 0.1) for i in anchors}
            for i in anchors:
                given[i][j] = odds[i] / sum(odds.values()) * layer.size[j]
        mass = {i: sum(given[i].values()) for i in anchors}
        mixes = [(i, {j: part / mass[i] for j, part in given[i].items()}, mass[i]) for i in anchors]
        return [*((i, {i: 1.0}, layer.size[i]) for i in range(layer.cls)), *mixes]

    return rule


READINGS: dict[str, Reading] = {
    "tome": Reading(tome, (11, 6), True, True),
    "tome(proportional=false)": Reading(tome, (11, 6), True, False),
    "pitome": Reading(pitome(), (10, 6), False, False),
    **{f"pitome(matching={way})": Reading(pitome(way), (10, 6), False, False) for way in WAYS},
    "pitome(metric=keys)": Reading(pitome(metric="keys"), (10, 6), False, False),
    "pitome(average=size)": Reading(pitome(average="size"), (10, 6), False, False),
    DIFFRATE: Reading(diffrate, (11, 6), True, True),
    f"{DIFFRATE[:-1]}, proportional=false)": Reading(diffrate, (11, 6), True, False),
    "zerotprune": Reading(zerotprune(), (10, 6), False, False),
    "zerotprune(start=uniform)": Reading(zerotprune("uniform"), (10, 6), False, False),
    "token-transforming": Reading(token_transforming(), (16, 6), False, False),
    "token-transforming(score=received)": Reading(token_transforming("received"), (16, 6), False, False),
}
IDS = {spec: spec.replace(RATES, "PATH") for spec in READINGS}
every_reading = pytest.mark.parametrize("spec", READINGS, ids=IDS.get)


# --- the encoder by hand


@dataclass(frozen=True)
class Encoded:
    """One image: projected tokens in raster order, their patches, and what each is a mix of."""

    tokens: Tensor
    anchors: list[int]
    mixes: list[dict[int, float]]


def compose(mix: dict[int, float], earlier: list[dict[int, float]]) -> dict[int, float]:
    total: dict[int, float] = {}
    for token, share in mix.items():
        for patch, part in earlier[token].items():
            total[patch] = total.get(patch, 0.0) + share * part
    return total


def encode(model: Any, image: Tensor, reading: Reading, left: tuple[int, ...] | None = None) -> Encoded:
    """Run the encoder on one image `[3, side, side]`, one layer after the other."""
    tower = model.base_model.vision_tower
    tower = getattr(tower, "vision_model", tower)
    clip = hasattr(tower, "pre_layrnorm")
    hidden = tower.embeddings(image[None])[0]
    hidden = tower.pre_layrnorm(hidden) if clip else hidden
    cls, depth = int(clip), len(tower.encoder.layers)
    anchors, size = list(range(len(hidden))), [1.0] * len(hidden)
    mixes: list[dict[int, float]] = [{token: 1.0} for token in anchors]
    for number, block in enumerate(tower.encoder.layers[: len(left or reading.left)]):
        attend = block.self_attn
        normed = block.layer_norm1(hidden)
        heads = [
            project(normed).view(len(normed), attend.num_heads, -1).transpose(0, 1)
            for project in (attend.q_proj, attend.k_proj, attend.v_proj)
        ]
        logits = heads[0] @ heads[1].transpose(1, 2) / math.sqrt(heads[0].shape[-1])
        if reading.proportional:
            logits = logits + torch.tensor([math.log(s) for s in size])
        attention = logits.softmax(-1)
        hidden = hidden + attend.out_proj((attention @ heads[2]).transpose(0, 1).flatten(1))
        if not reading.after_attention:
            hidden = hidden + block.mlp(block.layer_norm2(hidden))
        target = (left or reading.left)[number]
        if target < len(hidden) - cls:
            seen = (hidden.detach(), heads[1].detach(), attention.detach())
            outputs = reading.rule(Layer(number, depth, cls, *seen, size, target))
            hidden = torch.stack([sum(share * hidden[i] for i, share in mix.items()) for _, mix, _ in outputs])
            anchors = [anchors[kept] for kept, _, _ in outputs]
            mixes = [compose(mix, mixes) for _, mix, _ in outputs]
            size = [stands for _, _, stands in outputs]
        if reading.after_attention:
            hidden = hidden + block.mlp(block.layer_norm2(hidden))
    raster = sorted(range(cls, len(hidden)), key=lambda i: anchors[i])
    tokens = model.base_model.multi_modal_projector(hidden[raster])
    patches = [{patch - cls: share for patch, share in mixes[i].items()} for i in raster]
    return Encoded(tokens, [anchors[i] - cls for i in raster], patches)


@dataclass(frozen=True)
class Case:
    """A batch and what each of its images becomes."""

    model: PreTrainedModel
    inputs: dict
    images: list[Encoded]

    @property
    def items(self) -> list[ReferenceItem]:
        places = (self.inputs["input_ids"] == IMAGE).nonzero().split(PATCHES)
        nothing: Any = None
        return [ReferenceItem(int(at[0, 0]), at[:, 1], at[:0, 1], nothing, nothing) for at in places]

    @property
    def selections(self) -> list[Selection]:
        return [Selection(torch.tensor(image.anchors)) for image in self.images]

    def features(self, *args: Any, **kwargs: Any) -> SimpleNamespace:
        """What the model's own merging code would have to be given."""
        places = [torch.tensor(image.anchors) for image in self.images]
        rows = [
            torch.zeros(PATCHES, image.tokens.shape[1]).index_put((place,), image.tokens)
            for place, image in zip(places, self.images, strict=True)
        ]
        return SimpleNamespace(pooler_output=rows)

    def answer(self, steps: int = STEPS) -> Recomputed:
        with mock.patch.object(self.model.base_model, "get_image_features", self.features):
            return recompute(self.model, "llava", self.inputs, self.items, self.selections, "renumber", steps)

    def loss(self, labels: Tensor) -> Tensor:
        with mock.patch.object(self.model.base_model, "get_image_features", self.features):
            return loss(self.model, "llava", self.inputs, self.items, self.selections, "renumber", labels)


@cache
def built(attention: str = "sdpa") -> PreTrainedModel:
    return FAMILIES["llava"].build(attention)


def case(spec: str, kind: Kind = "mixed", model: Any = None, left: tuple[int, ...] | None = None) -> Case:
    model = model or built()
    inputs = FAMILIES["llava"].inputs(model, kind)
    return Case(model, inputs, [encode(model, image, READINGS[spec], left) for image in inputs["pixel_values"]])


def assert_traced(handle: mmcompress.Handle, expected: Case) -> None:
    """Each image's trace says which patches stayed and what they absorbed."""
    assert handle.stats.kept == sum(len(image.anchors) for image in expected.images)
    assert [item.tokens for item in handle.stats.items] == [PATCHES] * len(expected.images)
    for trace, image, item in zip(handle.trace, expected.images, expected.items, strict=True):
        assert (trace.row, trace.positions.tolist()) == (item.row, item.positions.tolist())
        assert trace.selection.anchor.tolist() == image.anchors
        if all(len(mix) == 1 for image in expected.images for mix in image.mixes):
            assert trace.selection.weight is None, "nothing was merged"
            continue
        weight = torch.zeros(len(image.anchors), PATCHES)
        for output, mix in enumerate(image.mixes):
            for patch, share in mix.items():
                weight[output, patch] = share
        torch.testing.assert_close(trace.selection.weight, weight)


# --- exactness


def test_every_method_is_read_here() -> None:
    without = {spec for spec in READINGS if "proportional=false" in spec}
    assert {spec.split("(")[0] for spec in without} == {"tome", "diffrate"}
    assert set(READINGS) - without == {str(spec) for spec in variants("encoder")}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@every_reading
def test_answers_equal_a_recomputation(spec: str, attention: str) -> None:
    model = built(attention)
    with torch.no_grad():
        expected = case(spec, model=model)
        baseline = generate(model, expected.inputs, steps=1).logits[0]
        answer = expected.answer()
    with mmcompress.wrap(model, spec, keep=KEEP) as handle:
        output = generate(model, expected.inputs)
        assert_traced(handle, expected)
    assert_exact(output, answer)
    assert {len(image.anchors) for image in expected.images} == {KEPT}
    changed = (output.logits[0] - baseline).abs().amax(-1)
    assert (changed[:2] > 1e-3).all() and changed[2] < TOLERANCE, "rows with images change, the row of text does not"


@pytest.mark.parametrize("kind", ["images", "single"])
def test_answers_do_not_depend_on_the_batch(kind: Kind) -> None:
    with torch.no_grad():
        expected = case("tome", kind)
        answer = expected.answer()
    with mmcompress.wrap(built(), "tome", keep=KEEP):
        assert_exact(generate(built(), expected.inputs), answer)


def test_tokens_shared_out_in_several_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Maps that are matrices follow one another; an encoder as small as this has but one layer that shares out."""
    monkeypatch.setattr(mmcompress.methods.token_transforming, "_LAYERS", (0, 9))
    with torch.no_grad():
        expected = case("token-transforming", left=(10, 6))
        answer = expected.answer()
    with mmcompress.wrap(built(), "token-transforming", keep=KEEP) as handle:
        output = generate(built(), expected.inputs)
        assert_traced(handle, expected)
    assert_exact(output, answer)


def test_beams_and_several_answers_per_prompt() -> None:
    """What was encoded once serves several rows: all first tokens follow from the same logits."""
    with torch.no_grad():
        expected = case("pitome", "single")
        answer = expected.answer(1)
    with mmcompress.wrap(built(), "pitome", keep=KEEP):
        output = generate(built(), expected.inputs, num_beams=3, num_return_sequences=3)
    torch.testing.assert_close(output.logits[0], answer.logits[:, 0].expand(3, -1), atol=TOLERANCE, rtol=0)


def _siglip(attention: str = "sdpa") -> PreTrainedModel:
    config = transformers.LlavaConfig(
        vision_config=FAMILIES["llava_onevision"].build("sdpa").config.vision_config,
        text_config=built().config.text_config,
        image_token_id=IMAGE,
        image_token_index=IMAGE,
        vision_feature_layer=-2,
        vision_feature_select_strategy="full",
    )
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                parameter.mul_(4.0 if "q_proj" in name or "k_proj" in name else 2.0)
    return model


@pytest.mark.parametrize(
    "spec",
    [
        "tome",
        "pitome",
        "pitome(matching=energy)",
        "zerotprune(start=uniform)",
        "token-transforming(score=received)",
    ],
)
def test_encoders_without_cls(spec: str) -> None:
    model = _siglip()
    with torch.no_grad():
        expected = case(spec, model=model)
        answer = expected.answer()
    with mmcompress.wrap(model, spec, keep=KEEP) as handle:
        output = generate(model, expected.inputs)
        assert_traced(handle, expected)
    assert_exact(output, answer)


@pytest.mark.parametrize(
    "spec", [DIFFRATE, "zerotprune", "token-transforming"], ids=["diffrate", "zerotprune", "token-transforming"]
)
def test_methods_that_read_cls_are_refused_without_one(spec: str) -> None:
    with pytest.raises(UnsupportedError, match=r"needs cls_rows, which is not available: .* has no CLS token"):
        mmcompress.wrap(_siglip(), spec, keep=KEEP)


@pytest.mark.parametrize("spec", ["tome", "pitome"])
def test_training_loss_and_gradients(spec: str) -> None:
    model = FAMILIES["llava"].build("sdpa")
    expected = case(spec, model=model)
    ids = expected.inputs["input_ids"]
    labels = ids.masked_fill((ids == IMAGE) | (expected.inputs["attention_mask"] == 0), -100)
    labels[torch.arange(len(labels)), expected.inputs["attention_mask"].argmax(1)] = -100
    wanted = expected.loss(labels)
    wanted.backward()
    gradients = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    assert any("vision_tower" in name for name in gradients)
    model.zero_grad(set_to_none=True)
    with mmcompress.wrap(model, spec, keep=KEEP):
        output = model(**expected.inputs, labels=labels, use_cache=False)
        output.loss.backward()
    torch.testing.assert_close(output.loss, wanted, atol=1e-5, rtol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(dict(model.named_parameters())[name].grad, gradient, atol=1e-4, rtol=1e-3)


def test_gradient_checkpointing_of_the_encoder_is_refused() -> None:
    model = FAMILIES["llava"].build("sdpa").train()
    inputs = FAMILIES["llava"].inputs(model, "images")
    with mmcompress.wrap(model, "tome", keep=KEEP):
        model.gradient_checkpointing_enable({"use_reentrant": False})
        with pytest.raises(UnsupportedError, match="tome does not work under gradient checkpointing of the vision"):
            model(**inputs, use_cache=False)
        model.model.vision_tower.gradient_checkpointing_disable()
        assert model(**inputs, use_cache=False).logits.isfinite().all()


@pytest.mark.parametrize("spec", ["tome", "zerotprune"])
def test_half_precision(spec: str) -> None:
    model = FAMILIES["llava"].build("sdpa").to(torch.bfloat16)
    inputs = FAMILIES["llava"].inputs(model, "mixed")
    inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
    with mmcompress.wrap(model, spec, keep=KEEP) as handle:
        output = generate(model, inputs)
        assert handle.stats.kept == 3 * KEPT
    assert output.logits[0].isfinite().all()


# --- budgets


def test_keep_changes_per_call_also_where_images_are_remembered() -> None:
    model = built()
    with torch.no_grad():
        cases = {keep: case("pitome", left=left) for keep, left in {6: (10, 6), 12: (14, 12)}.items()}
        answers = {keep: expected.answer() for keep, expected in cases.items()}
        inputs = cases[6].inputs
        whole = greedy(model, inputs)
    with mmcompress.wrap(model, "pitome", keep=6) as handle, handle.reuse_vision():
        for keep in (6, 12, 6, 12):
            with handle.set(keep=keep):
                assert_exact(generate(model, inputs), answers[keep])
                assert {item.kept for item in handle.stats.items} == {keep}
        assert handle.stats.reused == 1
        handle.set(keep=1.0)
        assert torch.equal(greedy(model, inputs), whole)
        assert handle.trace[0].selection.anchor.tolist() == list(range(PATCHES))
        assert handle.trace[0].selection.weight is None


def test_a_budget_out_of_reach_is_refused_and_the_one_in_force_stays() -> None:
    model = built()
    before = snapshot(model)
    for name in ("tome", "pitome"):
        problem = f"{name} cannot keep 3 of 16 tokens: .* 2 layers leave at least 4"
        with pytest.raises(SpecError, match=problem):
            mmcompress.wrap(model, name, keep=0.2)
        with mmcompress.wrap(model, name, keep=4) as handle:
            with pytest.raises(SpecError, match=problem):
                handle.set(keep=3)
            assert handle.keep == 4
    assert_same(before, snapshot(model))


def test_rates_must_be_given(tmp_path: Any) -> None:
    with pytest.raises(SpecError, match="diffrate needs rates="):
        mmcompress.wrap(built(), "diffrate", keep=KEEP)
    with pytest.raises(SpecError, match=r"no JSON file of the form .*merge_kept_num"):
        mmcompress.wrap(built(), "diffrate", keep=KEEP, rates=str(tmp_path / "missing.json"))


# --- models that are refused, and models that stay as they were


@pytest.mark.parametrize("spec", variants("encoder"), ids=lambda spec: str(spec).replace(RATES, "PATH"))
def test_other_families_are_refused_with_the_reason(spec: Spec) -> None:
    for name, family in FAMILIES.items():
        if name != "llava":
            model = family.build("sdpa") if name not in _MODELS else _MODELS[name]
            _MODELS[name] = model
            before = snapshot(model)
            # Of methods that read CLS too, either reason is true.
            with pytest.raises(UnsupportedError, match=r"rules out: .* whole grids?|has no CLS token"):
                mmcompress.wrap(model, spec, keep=KEEP)
            assert_same(before, snapshot(model))


_MODELS: dict[str, PreTrainedModel] = {}


def test_features_of_several_layers_are_refused() -> None:
    config = transformers.LlavaConfig(
        vision_config=built().config.vision_config,
        text_config=built().config.text_config,
        vision_feature_layer=[-3, -2],
    )
    with pytest.raises(UnsupportedError, match="rules out: its projector joins the features of several encoder layers"):
        mmcompress.wrap(transformers.LlavaForConditionalGeneration(config), "tome", keep=KEEP)


@pytest.mark.parametrize("proportional", [True, False])
def test_flash_attention_takes_no_sizes(proportional: bool) -> None:
    model = FAMILIES["llava"].build("sdpa")
    with torch.no_grad():
        expected = case("tome(proportional=false)", model=model)
        answer = expected.answer()
    with fake_flash_attention(model) as calls:
        if proportional:
            with pytest.raises(UnsupportedError, match="flash_attention_2 does not take: give proportional=False"):
                mmcompress.wrap(model, "tome", keep=KEEP)
        else:
            with mmcompress.wrap(model, "tome", keep=KEEP, proportional=False):
                assert_exact(generate(model, expected.inputs), answer)
            assert calls


@pytest.mark.parametrize("spec", ["tome", "pitome", DIFFRATE], ids=["tome", "pitome", "diffrate"])
def test_unwrapping_gives_the_original_back_after_failures_too(spec: str) -> None:
    model = FAMILIES["llava"].build("sdpa")
    inputs = FAMILIES["llava"].inputs(model, "images")
    plain = greedy(model, inputs)
    before = snapshot(model)
    block = model.model.vision_tower.encoder.layers[1]
    with mmcompress.wrap(model, spec, keep=KEEP):
        compressed = greedy(model, inputs)
        for place in (block.self_attn, block.mlp, model.model.multi_modal_projector):

            def fail(*args: Any) -> None:
                raise Failure

            hook = place.register_forward_pre_hook(fail)
            with pytest.raises(Failure):
                greedy(model, inputs)
            hook.remove()
            tower = model.model.vision_tower(inputs["pixel_values"]).last_hidden_state
            assert tower.shape[1] == 1 + PATCHES, "calls of the encoder by other people see all patches"
            assert torch.equal(greedy(model, inputs), compressed)
        assert model.config.to_dict() == before["config"]
    assert_same(before, snapshot(model))
    assert torch.equal(greedy(model, inputs), plain)


@pytest.mark.parametrize("spec", ["tome", "pitome"])
def test_nan_features_name_the_image(spec: str) -> None:
    inputs = FAMILIES["llava"].inputs(built(), "images")
    inputs["pixel_values"][1] = torch.nan
    with mmcompress.wrap(built(), spec, keep=KEEP), pytest.raises(InputError, match=r"image 1 \(row 1\).*NaN"):
        greedy(built(), inputs)


def test_compiled_encoders() -> None:
    """Only what this stage acts on: whole models, which take twice as long, are compiled in the tests of `wrap`."""
    base = built().base_model
    inputs = FAMILIES["llava"].inputs(built(), "images")
    with mmcompress.wrap(built(), "tome", keep=KEEP), torch.no_grad():
        expected = built()(**inputs, use_cache=False).logits
        torch.compiler.reset()
        counters.clear()
        with mock.patch.object(base, "get_image_features", torch.compile(base.get_image_features, backend="eager")):
            compiled = built()(**inputs, use_cache=False).logits
        assert counters["stats"]["unique_graphs"] > 0
    torch.testing.assert_close(compiled, expected, atol=1e-5, rtol=0)


def test_registered_methods_say_their_stage() -> None:
    for spec in variants("encoder"):
        method = METHODS.build(spec.name, spec.options)
        assert method.info.stage == "encoder" and method.exact_count
