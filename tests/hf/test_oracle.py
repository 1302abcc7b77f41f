"""The oracle checks itself against unwrapped models before anything is checked against the oracle."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hf.fake_flash import fake_flash_attention
from hf.families import FAMILIES, IMAGE, VIDEO, Kind
from hf.oracle import _unwindowed, encoder_facts, forced_logits, loss, recompute, reference_items, score
from torch import Tensor
from transformers import PreTrainedModel
from transformers.vision_utils import get_vision_window_index

from mmcompress.types import Selection

STEPS = 4
CASES = [(name, kind) for name, family in FAMILIES.items() for kind in family.kinds]
cases = pytest.mark.parametrize(("name", "kind"), CASES)
families = pytest.mark.parametrize("name", FAMILIES)


@cache
def built(name: str, attention: str) -> PreTrainedModel:
    return FAMILIES[name].build(attention)


def generated(model: PreTrainedModel, inputs: dict) -> tuple[list[list[int]], Tensor]:
    output = model.generate(
        **inputs,
        max_new_tokens=STEPS,
        min_new_tokens=STEPS,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return output.sequences[:, -STEPS:].tolist(), torch.stack(output.logits, 1)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@cases
def test_keeping_everything_is_the_stock_model(name: str, kind: Kind, attention: str) -> None:
    model = built(name, attention)
    inputs = FAMILIES[name].inputs(model, kind)
    items = reference_items(model, name, inputs)
    everything = [Selection.everything(len(item.item)) for item in items]
    answer = recompute(model, name, inputs, items, everything, "original", STEPS)
    tokens, logits = generated(model, inputs)
    torch.testing.assert_close(answer.logits, logits, atol=1e-5, rtol=0)
    assert answer.tokens == tokens


@cases
def test_items_cover_the_placeholders(name: str, kind: Kind) -> None:
    model = built(name, "sdpa")
    inputs = FAMILIES[name].inputs(model, kind)
    covered = torch.zeros_like(inputs["input_ids"])
    for reference in reference_items(model, name, inputs):
        item = reference.item
        assert len(item) == len(reference.positions) == len(item.tiles) == sum(h * w for h, w in item.grids)
        covered[reference.row, reference.positions] += 1
        covered[reference.row, reference.separators] += 1
    placeholders = (inputs["input_ids"] == IMAGE) | (inputs["input_ids"] == VIDEO)
    assert torch.equal(covered, placeholders.long())


@cases
def test_statistics_are_complete(name: str, kind: Kind) -> None:
    model = built(name, "sdpa")
    facts = encoder_facts(model, name)
    for reference in reference_items(model, name, FAMILIES[name].inputs(model, kind)):
        item = reference.item
        for statistic in ("received_attention", "keys", "key_metric", "cls_rows", "cls_logits", "cls_rows_full_width"):
            values = getattr(item, statistic)
            assert sorted(values) == ([] if statistic in facts.missing else list(range(facts.depth)))
            assert all(len(value) == len(item) and value.isfinite().all() for value in values.values())
        assert item.features is not None and len(item.features) == len(item)


@pytest.mark.parametrize("kind", ["images", "video"])
def test_window_order_is_undone(kind: Kind) -> None:
    model = built("qwen2_5_vl", "sdpa")
    inputs = FAMILIES["qwen2_5_vl"].inputs(model, kind)
    grids = inputs["image_grid_thw" if kind == "images" else "video_grid_thw"]
    order, _ = get_vision_window_index(grids, spatial_merge_size=2, window_size=56, patch_size=14)
    patches = (order[:, None] * 4 + torch.arange(4)).flatten()
    assert not torch.equal(patches, torch.arange(len(patches)))
    assert torch.equal(patches[_unwindowed(model, grids)], torch.arange(len(patches)))


@families
def test_fake_flash_equals_sdpa(name: str) -> None:
    model = built(name, "sdpa")
    for kind in FAMILIES[name].kinds:
        inputs = FAMILIES[name].inputs(model, kind)
        tokens, logits = generated(model, inputs)
        with fake_flash_attention(model) as calls:
            flash_tokens, flash_logits = generated(model, inputs)
        # Both the causal text model and the non-causal encoder must really have come this way.
        assert {call.causal for call in calls} == {True, False}
        torch.testing.assert_close(flash_logits, logits, atol=1e-5, rtol=0)
        assert flash_tokens == tokens
        assert torch.equal(generated(model, inputs)[1], logits)


@families
def test_selection_and_positions_matter(name: str) -> None:
    model = built(name, "sdpa")
    inputs = FAMILIES[name].inputs(model, "images")
    items = reference_items(model, name, inputs)
    everything = [Selection.everything(len(item.item)) for item in items]
    some = [Selection(torch.arange(0, len(item.item), 3)) for item in items]
    full = recompute(model, name, inputs, items, everything, "original", 1).logits
    original = recompute(model, name, inputs, items, some, "original", 1).logits
    renumbered = recompute(model, name, inputs, items, some, "renumber", 1).logits
    assert (full - original).abs().amax((1, 2)).min() > 1e-2
    assert (original - renumbered).abs().amax((1, 2)).min() > 1e-3


@families
def test_one_hot_weights_are_pruning(name: str) -> None:
    model = built(name, "sdpa")
    inputs = FAMILIES[name].inputs(model, "images")
    items = reference_items(model, name, inputs)
    pruning = [Selection(torch.arange(0, len(item.item), 3)) for item in items]
    merging = [
        Selection(one.anchor, torch.eye(len(item.item))[one.anchor]) for one, item in zip(pruning, items, strict=True)
    ]
    answers = [recompute(model, name, inputs, items, chosen, "original", 2).logits for chosen in (pruning, merging)]
    torch.testing.assert_close(*answers, atol=1e-6, rtol=0)


@families
def test_forced_continuations_agree_with_greedy(name: str) -> None:
    model = built(name, "sdpa")
    inputs = FAMILIES[name].inputs(model, "images")
    items = reference_items(model, name, inputs)
    some = [Selection(torch.arange(0, len(item.item), 2)) for item in items]
    greedy = recompute(model, name, inputs, items, some, "renumber", STEPS)
    for row, tokens in enumerate(greedy.tokens):
        arguments = (model, name, inputs, items, some, "renumber", row, tokens)
        torch.testing.assert_close(forced_logits(*arguments)[:-1], greedy.logits[row], atol=1e-5, rtol=0)
        assert score(*arguments) == pytest.approx(float(greedy.logits[row].log_softmax(-1).amax(-1).sum()), abs=1e-4)


@families
def test_loss_is_the_stock_loss(name: str) -> None:
    model = built(name, "sdpa")
    inputs = FAMILIES[name].inputs(model, "mixed")
    ids = inputs["input_ids"]
    labels = ids.masked_fill((ids == IMAGE) | (inputs["attention_mask"] == 0), -100)
    # With left padding the stock loss lets the last pad predict a row's first token; here nothing predicts it.
    labels[torch.arange(len(ids)), inputs["attention_mask"].argmax(-1)] = -100
    with torch.no_grad():
        items = reference_items(model, name, inputs)
        everything = [Selection.everything(len(item.item)) for item in items]
        stock = model(**inputs, labels=labels, use_cache=False).loss
        assert loss(model, name, inputs, items, everything, "original", labels).item() == pytest.approx(
            stock.item(), abs=1e-5
        )
