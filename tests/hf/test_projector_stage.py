"""Pooling behind the projector: a wrapped model answers like one that is given the pooled tokens by hand."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from hf.families import FAMILIES, IMAGE
from torch import Tensor
from torch.nn.functional import avg_pool2d
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

import mmcompress
from mmcompress import SpecError, UnsupportedError

SIDE, STEPS = 4, 4
POOLED = ("llava", "llava_next")


@cache
def built(name: str) -> Any:
    return FAMILIES[name].build("sdpa")


def greedy(model: Any, inputs: dict[str, Any]) -> Any:
    options: Any = dict(max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False)
    return model.generate(**inputs, **options, output_logits=True, return_dict_in_generate=True)


def pooled(tiles: Tensor, kernel: int) -> Tensor:
    grids = tiles.view(len(tiles), SIDE, SIDE, -1).permute(0, 3, 1, 2)
    return avg_pool2d(grids, kernel).flatten(2).transpose(1, 2)


def images_by_hand(model: Any, name: str, inputs: dict[str, Any], kernel: int) -> list[Tensor]:
    """Tokens of every image: those of the model itself, run with a vision side whose tiles have fewer patches."""
    caught: list[Tensor] = []
    hook = model.model.multi_modal_projector.register_forward_hook(lambda m, a, output: caught.append(output))
    media = {key: inputs[key] for key in ("pixel_values", "image_sizes") if key in inputs}
    with torch.no_grad():
        model.get_image_features(**media)
    hook.remove()
    tiles = pooled(torch.cat(caught), kernel)
    if name == "llava":
        return list(tiles)
    vision = model.config.vision_config
    config = model.config
    counts = [image_size_to_num_patches(size, config.image_grid_pinpoints, SIDE * 14) for size in inputs["image_sizes"]]
    patch, vision.patch_size = vision.patch_size, vision.patch_size * kernel
    try:
        packed, _ = model.model.pack_image_features(
            tiles.split(counts), inputs["image_sizes"], "default", image_newline=model.model.image_newline
        )
    finally:
        vision.patch_size = patch
    return list(packed)


def answers_by_hand(model: Any, inputs: dict[str, Any], images: list[Tensor]) -> list[Tensor]:
    """Logits of every step of every row, without cache or padding, each run of placeholders replaced by an image."""
    left, found = iter(images), []
    for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
        row = ids[mask.bool()]
        embeds, parts, place = model.get_input_embeddings()(row), [], 0
        while place < len(row):
            if row[place] == IMAGE:
                parts.append(next(left))
                while place < len(row) and row[place] == IMAGE:
                    place += 1
            else:
                parts.append(embeds[place : place + 1])
                place += 1
        prompt, logits = torch.cat(parts)[None], []
        for _ in range(STEPS):
            hidden = model.model.language_model(inputs_embeds=prompt, use_cache=False).last_hidden_state
            logits.append(model.lm_head(hidden[0, -1]))
            prompt = torch.cat([prompt, model.get_input_embeddings()(logits[-1].argmax())[None, None]], dim=1)
        found.append(torch.stack(logits))
    return found


@pytest.mark.parametrize(("keep", "kernel"), [(1, 4), (4, 2), (0.25, 2), (16, 1), (1.0, 1)])
@pytest.mark.parametrize("name", POOLED)
def test_answers_equal_those_by_hand(name: str, keep: int | float, kernel: int) -> None:
    model = built(name)
    for kind in ("mixed", "images", "single"):
        inputs = FAMILIES[name].inputs(model, kind)
        images = images_by_hand(model, name, inputs, kernel)
        with mmcompress.wrap(model, "m3", keep=keep) as handle:
            output = greedy(model, inputs)
            assert handle.stats is not None
            counts = [item.kept + item.separators for item in handle.stats.items]
        assert counts == [len(image) for image in images]
        with torch.no_grad():
            expected = answers_by_hand(model, inputs, images)
        actual = torch.stack(output.logits, dim=1)
        for logits, row in zip(actual, expected, strict=True):
            torch.testing.assert_close(logits, row, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", POOLED)
def test_the_count_is_known_beforehand(name: str) -> None:
    model = built(name)
    inputs = FAMILIES[name].inputs(model, "images")
    sizes = inputs.get("image_sizes", torch.tensor([[56, 56]] * 3)).tolist()
    with mmcompress.wrap(model, "m3", keep=16) as handle:
        for keep in (1, 4):
            with handle.set(keep=keep):
                greedy(model, inputs)
                counts = [item.kept for item in handle.stats.items]
            assert counts == [handle.dial.tokens_for(tuple(size), keep) for size in sizes]


def test_the_dial_turns_and_the_model_is_given_back() -> None:
    model, inputs = built("llava_next"), FAMILIES["llava_next"].inputs(built("llava_next"), "mixed")
    before = greedy(model, inputs).sequences
    with mmcompress.wrap(model, "m3", keep=4) as handle:
        four = greedy(model, inputs).logits[0]
        with handle.set(keep=1):
            one = greedy(model, inputs).logits[0]
        assert not torch.equal(four, one)
        assert torch.equal(four, greedy(model, inputs).logits[0])
        with pytest.raises(SpecError, match="no budget 3"):
            handle.set(keep=3)
        assert handle.keep == 4
    assert torch.equal(before, greedy(model, inputs).sequences)


def test_the_trace_says_what_was_averaged() -> None:
    model = built("llava")
    with mmcompress.wrap(model, "m3", keep=4) as handle:
        greedy(model, FAMILIES["llava"].inputs(model, "single"))
        (trace,) = handle.trace
    assert trace.selection.anchor.tolist() == [5, 7, 13, 15]
    assert trace.selection.weight is not None
    assert trace.selection.weight[1].nonzero()[:, 0].tolist() == [2, 3, 6, 7]


@pytest.mark.parametrize("name", POOLED)
def test_original_positions_are_those_of_places(name: str) -> None:
    model = built(name)
    inputs = FAMILIES[name].inputs(model, "mixed")
    with mmcompress.wrap(model, "m3", keep=4, positions="original"):
        original = greedy(model, inputs).logits[0]
    with mmcompress.wrap(model, "m3", keep=4):
        assert not torch.allclose(original, greedy(model, inputs).logits[0])


def test_it_composes_with_stages_inside_the_llm() -> None:
    model = built("llava")
    inputs = FAMILIES["llava"].inputs(model, "mixed")
    with mmcompress.wrap(model, ["m3(keep=4)", "fastv(layer=1, keep=0.5)"]) as handle:
        greedy(model, inputs)
        assert [item.kept for item in handle.stats.items] == [4, 4, 4]
    with mmcompress.wrap(model, "m3(keep=4)", kv="streamingllm(keep=6, sinks=2)"):
        greedy(model, inputs)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (dict(keep=3), "M3 has no budget 3: it takes 1, 4, 16"),
        (dict(keep=0.4), "M3 has no budget 6: it takes 1, 4, 16"),
        (dict(keep=4, scales=[1, 9]), "m3 cannot pool 4x4 tokens evenly to 9: scales can be 1, 4, 16"),
        (dict(keep=4, scales=[1, 16]), "M3 has no budget 4: it takes 1, 16"),
        (dict(), "m3 needs keep="),
    ],
)
def test_a_budget_between_scales_is_refused(request_: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        mmcompress.wrap(built("llava"), "m3", **request_)


def test_official_takes_any_budget_and_says_what_it_kept() -> None:
    model = built("llava")
    inputs = FAMILIES["llava"].inputs(model, "single")
    with mmcompress.wrap(model, "m3", keep=3, compat="official") as handle:
        greedy(model, inputs)
        assert handle.stats is not None and handle.stats.kept == 4


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in POOLED])
def test_other_families_are_refused(name: str) -> None:
    with pytest.raises(UnsupportedError, match="m3 pools the tokens of whole tiles"):
        mmcompress.wrap(built(name), "m3", keep=1)
