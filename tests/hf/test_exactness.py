"""A compressed model equals an independent no-cache recomputation of the same kept tokens."""

from __future__ import annotations

import copy
import dataclasses
import typing
from contextlib import nullcontext
from functools import cache

import pytest
import torch
import transformers
from hf.fake_flash import fake_flash_attention
from hf.families import FAMILIES, IMAGE, Kind
from hf.generating import generating
from hf.oracle import (
    Recomputed,
    ReferenceItem,
    encoder_facts,
    forced_logits,
    loss,
    recompute,
    reference_items,
    score,
)
from packaging.version import Version
from registered import variants
from torch import Tensor
from transformers import PreTrainedModel

import mmcompress
from mmcompress.budget import Budget
from mmcompress.method import VisualMethod
from mmcompress.registry import METHODS
from mmcompress.spec import Spec
from mmcompress.types import Needs, Positions, Selection, Space, VisualItem

STEPS, KEEP, TOLERANCE = 5, 0.4, 1e-5
generate = generating(STEPS)
TRANSFORMERS = Version(transformers.__version__)
REFERENCE = "todre(parts=first)"
# Merging before the projector, and what it takes without one that maps each token by itself or a CLS token.
PRE_PROJECTOR = ("visionzip", "prumerge", "prumerge-plus", "aim(parts=first)")
WITHOUT_CLS = Spec("visionzip", None, {"score": "received", "space": "projected"})
WITHOUT_NEWLINES = Spec("hired", None, {"score": "received", "compat": "official"})
# Families whose pixels transformers 5.17 repeats image by image rather than prompt by prompt.
REPEATED_BY_PIXELS = ("llava", "llava_next", "llava_onevision", "internvl")
MROPE = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


def of_one_part() -> list[Spec]:
    """What has no second part inside the LLM; the other methods have such a variant each."""
    specs = [spec for spec in variants("pre_llm") if "draft" not in spec.options]
    return [spec for spec in specs if METHODS.build(spec.name, spec.options).second_part is None]


@cache
def built(name: str, attention: str = "sdpa") -> PreTrainedModel:
    return FAMILIES[name].build(attention)


@dataclasses.dataclass(frozen=True)
class Case:
    """A batch, what a method should keep of it, and the answer that follows."""

    model: PreTrainedModel
    name: str
    inputs: dict
    items: list[ReferenceItem]
    selections: list[Selection]
    positions: Positions
    space: Space
    newlines: bool

    def answer(self, steps: int = STEPS) -> Recomputed:
        prompt = (self.model, self.name, self.inputs, self.items, self.selections, self.positions)
        return recompute(*prompt, steps, self.space, self.newlines)

    def forced(self, row: int, tokens: list[int]) -> Tensor:
        prompt = (self.model, self.name, self.inputs, self.items, self.selections, self.positions)
        return forced_logits(*prompt, row, tokens, self.space, self.newlines)


def case(
    name: str,
    kind: Kind,
    spec: str | Spec = REFERENCE,
    positions: Positions | None = None,
    keep: int | float = KEEP,
    model: PreTrainedModel | None = None,
    inputs: dict | None = None,
) -> Case:
    model = model or built(name)
    inputs = inputs or FAMILIES[name].inputs(model, kind)
    items = reference_items(model, name, inputs)
    parsed = Spec.parse(spec)
    method = METHODS.build(parsed.name, parsed.options)
    needs = method.needs(encoder_facts(model, name))
    selections = method.compress([reference.item for reference in items], Budget(keep), needs)
    default: Positions = "original" if name in MROPE else "renumber"
    return Case(model, name, inputs, items, selections, positions or default, method.space, method.newlines)


def assert_exact(output: typing.Any, expected: Recomputed) -> None:
    steps = len(expected.tokens[0])
    torch.testing.assert_close(torch.stack(output.logits, 1), expected.logits, atol=TOLERANCE, rtol=0)
    assert output.sequences[:, -steps:].tolist() == expected.tokens


def assert_compressed(output: typing.Any, handle: mmcompress.Handle, expected: Case, baseline: Tensor) -> None:
    """Tokens left for real: in the cache, in the statistics, in the answer."""
    valid = expected.inputs["attention_mask"].bool()
    dropped = torch.zeros(len(valid), dtype=torch.long)
    for reference, selection in zip(expected.items, expected.selections, strict=True):
        dropped[reference.row] += len(reference.item) - len(selection)
        dropped[reference.row] += 0 if expected.newlines else len(reference.separators)
    kept = valid.sum(1) - dropped
    layers = output.past_key_values.layers
    assert {layer.keys.shape[-2] for layer in layers} == {int(kept.max()) + STEPS - 1}
    assert {layer.get_seq_length() for layer in layers} == {valid.shape[1] + STEPS - 1}
    assert list(handle.stats.row_kept) == kept.tolist()
    assert list(handle.stats.row_tokens) == valid.sum(1).tolist()
    separators = [len(reference.separators) if expected.newlines else 0 for reference in expected.items]
    assert [item.separators for item in handle.stats.items] == separators
    for trace, reference, selection in zip(handle.trace, expected.items, expected.selections, strict=True):
        assert trace.row == reference.row
        assert trace.positions.tolist() == reference.positions.tolist()
        assert trace.selection.anchor.tolist() == selection.anchor.tolist()
    changed = (torch.stack(output.logits, 1)[:, 0] - baseline).abs().amax(-1)
    rows_with_items = sorted({reference.row for reference in expected.items})
    assert (changed[rows_with_items] > 1e-3).all(), "the pruned run must differ, or the test shows nothing"
    text_rows = [row for row in range(len(valid)) if row not in rows_with_items]
    assert (changed[text_rows] < TOLERANCE).all(), "text-only rows must not change"


@pytest.mark.parametrize("spec", [*of_one_part(), WITHOUT_CLS], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_method_on_every_family(name: str, spec: Spec) -> None:
    model = built(name)
    facts = encoder_facts(model, name)
    method = METHODS.build(spec.name, spec.options)
    missing = set(method.needs(facts).layers()) & set(facts.missing)
    if not missing and facts.no_pre_projector and method.space == "pre_projector":
        missing.add('before the projector, .* space="projected"')
    if missing:
        with pytest.raises(mmcompress.UnsupportedError, match=missing.pop()):
            mmcompress.wrap(model, spec, keep=KEEP)
        return
    expected = case(name, "mixed", spec)
    baseline = generate(model, expected.inputs, steps=1).logits[0]
    with mmcompress.wrap(model, spec, keep=KEEP) as handle:
        output = generate(model, expected.inputs)
        assert_compressed(output, handle, expected, baseline)
    assert_exact(output, expected.answer())


@pytest.mark.parametrize("positions", ["renumber", "original"])
@pytest.mark.parametrize("attention", ["sdpa", "eager", "flash"])
@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, family in FAMILIES.items() for kind in family.kinds])
def test_every_situation(name: str, kind: Kind, attention: str, positions: Positions) -> None:
    model = built(name, "sdpa" if attention == "flash" else attention)
    expected = case(name, kind, positions=positions, model=model)
    answer = expected.answer()
    with fake_flash_attention(model) if attention == "flash" else nullcontext([]) as calls:
        baseline = generate(model, expected.inputs, steps=1).logits[0]
        with mmcompress.wrap(model, REFERENCE, keep=KEEP, positions=positions) as handle:
            output = generate(model, expected.inputs)
            assert_compressed(output, handle, expected, baseline)
            with torch.no_grad():
                uncached = model(**expected.inputs, use_cache=False).logits[:, -1]
        assert bool(calls) == (attention == "flash")
    assert_exact(output, answer)
    torch.testing.assert_close(uncached, answer.logits[:, 0], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("positions", ["renumber", "original"])
@pytest.mark.parametrize(
    ("name", "kind"), [("llava_next", "images"), ("llava_onevision", "images"), ("llava_onevision", "video")]
)
def test_newlines_may_leave_too(name: str, kind: Kind, positions: Positions) -> None:
    """After the rows of crops, after a single tile and after a clip; in a later turn they stay away."""
    expected = case(name, kind, WITHOUT_NEWLINES, positions)
    assert all(len(reference.separators) for reference in expected.items)
    baseline = generate(expected.model, expected.inputs, steps=1).logits[0]
    added = torch.tensor([[40, 41, 42]]).expand(len(expected.inputs["input_ids"]), -1)
    with mmcompress.wrap(expected.model, WITHOUT_NEWLINES, keep=KEEP, positions=positions) as handle:
        first = generate(expected.model, expected.inputs)
        assert_compressed(first, handle, expected, baseline)
        second = generate(expected.model, _second_turn(first, expected.inputs, added), steps=1)
    assert_exact(first, expected.answer())
    for row, logits in enumerate(second.logits[0]):
        said = first.sequences[row, -STEPS:].tolist() + added[row].tolist()
        torch.testing.assert_close(logits, expected.forced(row, said)[-1], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("keep", [1, 3, 1.0, 10_000])
@pytest.mark.parametrize("name", ["llava", "qwen3_vl"])
def test_counts_and_budgets_that_keep_everything(name: str, keep: int | float) -> None:
    expected = case(name, "mixed", keep=keep)
    with mmcompress.wrap(expected.model, REFERENCE, keep=keep) as handle:
        assert_exact(generate(expected.model, expected.inputs), expected.answer())
        counts = [(item.kept, item.tokens) for item in handle.stats.items]
    assert counts == [(tokens if type(keep) is float else min(keep, tokens), tokens) for _, tokens in counts]


@pytest.mark.parametrize("name", FAMILIES)
def test_keep_changes_per_call(name: str) -> None:
    inputs = FAMILIES[name].inputs(built(name), "images")
    with mmcompress.wrap(built(name), REFERENCE, keep=KEEP) as handle:
        with handle.set(keep=0.7):
            assert_exact(generate(built(name), inputs), _unwrapped_answer(name, handle, 0.7))
        assert handle.keep == KEEP
        assert_exact(generate(built(name), inputs), _unwrapped_answer(name, handle, KEEP))
        handle.set(keep=0.7)
        assert_exact(generate(built(name), inputs), _unwrapped_answer(name, handle, 0.7))


def _unwrapped_answer(name: str, handle: mmcompress.Handle, keep: float) -> Recomputed:
    # The oracle builds its own copy of the model: the wrapped one must not answer for itself.
    return case(name, "images", keep=keep, model=_twin(name)).answer()


@cache
def _twin(name: str) -> PreTrainedModel:
    return FAMILIES[name].build("sdpa")


@pytest.mark.parametrize("name", FAMILIES)
def test_an_answer_does_not_depend_on_its_batch(name: str) -> None:
    model = built(name)
    single = FAMILIES[name].inputs(model, "single")
    expected = case(name, "single").answer()
    with mmcompress.wrap(model, REFERENCE, keep=KEEP):
        alone = generate(model, single)
        without_mask = generate(model, {key: value for key, value in single.items() if key != "attention_mask"})
    assert_exact(alone, expected)
    assert_exact(without_mask, expected)


@pytest.mark.parametrize("positions", ["renumber", "original"])
@pytest.mark.parametrize("name", FAMILIES)
def test_beam_search(name: str, positions: Positions, request: pytest.FixtureRequest) -> None:
    if name in REPEATED_BY_PIXELS and Version("5.19") > TRANSFORMERS:
        reason = "transformers < 5.19 orders the images of multi-image prompts wrongly under beam search"
        request.applymarker(pytest.mark.xfail(strict=True, reason=reason))
    expected = case(name, "images", positions=positions)
    with mmcompress.wrap(expected.model, REFERENCE, keep=KEEP, positions=positions):
        output = generate(expected.model, expected.inputs, num_beams=3, length_penalty=0.0, output_scores=True)
    for row, tokens in enumerate(output.sequences[:, -STEPS:].tolist()):
        wanted = score(
            expected.model, name, expected.inputs, expected.items, expected.selections, positions, row, tokens
        )
        assert abs(float(output.sequences_scores[row]) - wanted) < 1e-4


@pytest.mark.parametrize("name", FAMILIES)
def test_sampling_several_answers_per_prompt(name: str, request: pytest.FixtureRequest) -> None:
    if name in REPEATED_BY_PIXELS and Version("5.19") > TRANSFORMERS:
        reason = "transformers < 5.19 orders the images of multi-image prompts wrongly when it repeats prompts"
        request.applymarker(pytest.mark.xfail(strict=True, reason=reason))
    expected = case(name, "images")
    torch.manual_seed(0)
    with mmcompress.wrap(expected.model, REFERENCE, keep=KEEP):
        output = generate(expected.model, expected.inputs, do_sample=True, num_return_sequences=2)
    logits = torch.stack(output.logits, 1)
    for number, tokens in enumerate(output.sequences[:, -STEPS:].tolist()):
        wanted = expected.forced(number // 2, tokens[:-1])
        torch.testing.assert_close(logits[number], wanted, atol=TOLERANCE, rtol=0)


def _second_turn(first: typing.Any, inputs: dict, added: Tensor) -> dict:
    """The inputs of a text turn that continues `first` with `added` `[rows, tokens]`."""
    ids = torch.cat([first.sequences, added], dim=1)
    grown = ids.shape[1] - inputs["input_ids"].shape[1]
    later = {
        "input_ids": ids,
        "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (0, grown), value=1),
        "past_key_values": first.past_key_values,
    }
    if "mm_token_type_ids" in inputs:
        later["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, grown))
        later |= {key: inputs[key] for key in ("image_grid_thw", "video_grid_thw") if key in inputs}
    return later


@pytest.mark.parametrize("positions", ["renumber", "original"])
@pytest.mark.parametrize("attention", ["sdpa", "flash"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_second_turn_reuses_the_cache(name: str, attention: str, positions: Positions) -> None:
    expected = case(name, "mixed", positions=positions)
    added = torch.tensor([[40, 41, 42]]).expand(len(expected.inputs["input_ids"]), -1)
    with (
        fake_flash_attention(expected.model) if attention == "flash" else nullcontext(),
        mmcompress.wrap(expected.model, REFERENCE, keep=KEEP, positions=positions),
    ):
        first = generate(expected.model, expected.inputs)
        second = generate(expected.model, _second_turn(first, expected.inputs, added), steps=3)
    logits = torch.stack(second.logits, 1)
    for row in range(len(added)):
        said = first.sequences[row, -STEPS:].tolist() + added[row].tolist()
        answer = second.sequences[row, -3:].tolist()
        wanted = expected.forced(row, said + answer[:-1])[len(said) :]
        torch.testing.assert_close(logits[row], wanted, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("positions", ["renumber", "original"])
@pytest.mark.parametrize("attention", ["sdpa", "flash"])
@pytest.mark.parametrize("opening", ["text", "image"])
@pytest.mark.parametrize("name", ["llava", "llava_onevision", "internvl", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_a_new_image_in_a_later_turn(
    name: str, opening: str, attention: str, positions: Positions, request: pytest.FixtureRequest
) -> None:
    if name in MROPE and opening == "text" and positions == "original" and Version("5.20") > TRANSFORMERS:
        reason = "transformers < 5.20 reuses the first turn's rope_deltas when a Qwen image arrives in a later turn"
        request.applymarker(pytest.mark.xfail(strict=True, reason=reason))
    model = built(name)
    one = FAMILIES[name].inputs(model, "single")
    begin = {key: value for key, value in one.items() if key != "attention_mask"}
    if opening == "text":
        begin = {"input_ids": torch.tensor([[1, 50, 51, 52, 53]])}
        if name in MROPE:
            begin["mm_token_type_ids"] = torch.zeros_like(begin["input_ids"], dtype=torch.int)
    with (
        fake_flash_attention(model) if attention == "flash" else nullcontext(),
        mmcompress.wrap(model, REFERENCE, keep=KEEP, positions=positions),
    ):
        first = generate(model, begin, steps=3)
        ids = torch.cat([first.sequences, one["input_ids"][:, 1:]], dim=1)
        later = {key: value for key, value in one.items() if key != "attention_mask"} | {"input_ids": ids}
        if name in MROPE:
            later["mm_token_type_ids"] = (ids == IMAGE).int()
        explicit = {}
        if name in MROPE and opening == "image":  # generate() cannot tell the grid of an image it is not given again
            grids = one["image_grid_thw"].repeat(2, 1)
            rope, _ = model.model.get_rope_index(
                ids,
                mm_token_type_ids=later["mm_token_type_ids"],
                image_grid_thw=grids,
                attention_mask=torch.ones_like(ids),
            )
            explicit["position_ids"] = torch.cat([torch.arange(ids.shape[1]).expand(1, 1, -1), rope])
        output = generate(model, later | explicit, steps=3, past_key_values=first.past_key_values)
    together = {**later, "attention_mask": torch.ones_like(ids)}
    if opening == "image":
        media = [key for key in ("pixel_values", "image_sizes", "batch_num_images", "image_grid_thw") if key in one]
        together |= {key: torch.cat([one[key], one[key]]) for key in media}
    whole = case(name, "single", positions=positions, inputs=together)
    assert_exact(output, whole.answer(3))


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        *((name, REFERENCE) for name in FAMILIES),
        *((name, spec) for name in ("llava", "llava_next") for spec in PRE_PROJECTOR),
        ("llava", "visionzip(space=projected)"),
        ("llava_next", "visionzip(compat=official)"),
    ],
)
def test_training_loss_and_gradients(name: str, spec: str) -> None:
    model = FAMILIES[name].build("sdpa")
    expected = case(name, "mixed", spec, model=model)
    visual = torch.zeros_like(expected.inputs["input_ids"], dtype=torch.bool)
    for reference in expected.items:
        visual[reference.row, reference.positions] = True
        visual[reference.row, reference.separators] = True
    labels = expected.inputs["input_ids"].masked_fill(visual | (expected.inputs["attention_mask"] == 0), -100)
    labels[torch.arange(len(labels)), expected.inputs["attention_mask"].argmax(1)] = -100  # predicted by padding

    wanted = loss(
        model,
        name,
        expected.inputs,
        expected.items,
        expected.selections,
        expected.positions,
        labels,
        space=expected.space,
        newlines=expected.newlines,
    )
    wanted.backward()
    gradients = {
        key: parameter.grad.clone() for key, parameter in model.named_parameters() if parameter.grad is not None
    }
    model.zero_grad(set_to_none=True)
    with mmcompress.wrap(model, spec, keep=KEEP):
        output = model(**expected.inputs, labels=labels, use_cache=False)
        output.loss.backward()
    assert output.logits.shape[:2] == labels.shape
    torch.testing.assert_close(output.loss, wanted, atol=1e-5, rtol=0)
    vision = [key for key in gradients if "projector" in key or "merger" in key or "connector" in key]
    assert vision, "the projector must learn"
    for key, gradient in gradients.items():
        torch.testing.assert_close(dict(model.named_parameters())[key].grad, gradient, atol=1e-4, rtol=1e-3)


def test_gradient_checkpointing_changes_nothing() -> None:
    model = FAMILIES["llava"].build("sdpa").train()
    inputs = FAMILIES["llava"].inputs(model, "images")
    labels = inputs["input_ids"].masked_fill((inputs["input_ids"] == IMAGE) | (inputs["attention_mask"] == 0), -100)
    losses = []
    with mmcompress.wrap(model, REFERENCE, keep=KEEP):
        for checkpointing in (False, True):
            model.zero_grad()
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            output = model(**inputs, labels=labels, use_cache=False)
            output.loss.backward()
            gradient = model.model.multi_modal_projector.linear_1.weight.grad.norm()
            losses.append((float(output.loss.detach()), float(gradient)))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@dataclasses.dataclass(frozen=True)
class Reversed(VisualMethod):
    """Keeps the first tokens, last one first, each mixed with its neighbour."""

    def select(self, item: VisualItem, budget: int, needs: Needs) -> Selection:
        anchor = torch.arange(budget).flip(0)
        weight = torch.eye(len(item))[anchor] * 0.75 + torch.eye(len(item)).roll(1, 1)[anchor] * 0.25
        return Selection(anchor, weight)


@pytest.mark.parametrize("positions", ["renumber", "original"])
@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_in_any_order_that_absorb_others(name: str, positions: Positions) -> None:
    METHODS.register("test-reversed", summary="", family="")(Reversed)
    try:
        expected = case(name, "mixed", "test-reversed", positions)
        with mmcompress.wrap(expected.model, "test-reversed", keep=KEEP, positions=positions):
            assert_exact(generate(expected.model, expected.inputs), expected.answer())
    finally:
        METHODS._classes.pop("test-reversed")


@dataclasses.dataclass(frozen=True)
class First(VisualMethod):
    """Keeps the first tokens, or makes them anew from features."""

    anew: bool = False
    space: Space = "pre_projector"

    def select(self, item: VisualItem, budget: int, needs: Needs) -> Selection:
        return Selection(torch.arange(budget), torch.eye(len(item))[:budget] if self.anew else None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layers", [-2, [-3, -2]], ids=str)
def test_tokens_made_anew_are_the_models_own(layers: int | list[int], dtype: torch.dtype) -> None:
    """Whatever the projector is given: the features of one encoder layer or of several, in any precision."""
    config = copy.deepcopy(built("llava").config)
    config.vision_feature_layer = layers
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config).eval().to(dtype)
    inputs = FAMILIES["llava"].inputs(model, "images")
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    METHODS.register("test-first", summary="", family="")(First)
    try:
        answers = []
        for anew in (False, True):
            with mmcompress.wrap(model, "test-first", keep=KEEP, anew=anew) as handle:
                answers.append(generate(model, inputs, num_beams=2, output_scores=True))
                with handle.reuse_vision():
                    assert torch.equal(generate(model, inputs, num_beams=2).sequences, answers[-1].sequences)
                assert (handle.trace[0].selection.weight is not None) == anew
        assert torch.equal(answers[0].sequences, answers[1].sequences)
        torch.testing.assert_close(answers[0].sequences_scores, answers[1].sequences_scores, atol=1e-5, rtol=0)
    finally:
        METHODS._classes.pop("test-first")


def test_right_padded_batches_train_alike() -> None:
    expected = case("llava", "images")
    ids, mask = expected.inputs["input_ids"], expected.inputs["attention_mask"]
    shifts = [int(row.argmax()) for row in mask]
    right = expected.inputs | {
        "input_ids": torch.stack([row.roll(-shift) for row, shift in zip(ids, shifts, strict=True)]),
        "attention_mask": torch.stack([row.roll(-shift) for row, shift in zip(mask, shifts, strict=True)]),
    }
    with mmcompress.wrap(expected.model, REFERENCE, keep=KEEP), torch.no_grad():
        logits = expected.model(**right, use_cache=False).logits
    last = right["attention_mask"].sum(1) - 1
    wanted = expected.answer(1).logits[:, 0]
    torch.testing.assert_close(logits[torch.arange(len(last)), last], wanted, atol=TOLERANCE, rtol=0)


def test_prompts_given_as_embeddings() -> None:
    expected = case("llava", "mixed")
    embeds = expected.model.get_input_embeddings()(expected.inputs["input_ids"])
    inputs = {key: value for key, value in expected.inputs.items() if key != "input_ids"} | {"inputs_embeds": embeds}
    with mmcompress.wrap(expected.model, REFERENCE, keep=KEEP), torch.no_grad():
        logits = expected.model(**inputs).logits[:, -1]
    torch.testing.assert_close(logits, expected.answer(1).logits[:, 0], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_a_hand_written_decoding_loop(name: str) -> None:
    expected = case(name, "single")
    answer = expected.answer()
    inputs = {key: value for key, value in expected.inputs.items() if key != "attention_mask"}
    with mmcompress.wrap(expected.model, REFERENCE, keep=KEEP), torch.no_grad():
        output = expected.model(**inputs, use_cache=True)
        for step in range(STEPS):
            torch.testing.assert_close(output.logits[:, -1], answer.logits[:, step], atol=TOLERANCE, rtol=0)
            token = output.logits[:, -1:].argmax(-1)
            output = expected.model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)


def test_peft_models() -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    adapted = get_peft_model(
        FAMILIES["llava"].build("sdpa"), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    ).eval()
    expected = case("llava", "mixed", model=adapted.get_base_model())
    answer = expected.answer()
    with mmcompress.wrap(adapted, REFERENCE, keep=KEEP):
        assert_exact(generate(adapted, expected.inputs), answer)


def test_accelerate_offload(tmp_path) -> None:
    from accelerate import dispatch_model

    model = FAMILIES["qwen2_5_vl"].build("sdpa")
    expected = case("qwen2_5_vl", "mixed", model=model)
    answer = expected.answer()
    text = "model.language_model"
    places = dict.fromkeys(
        ["model.visual", f"{text}.embed_tokens", f"{text}.norm", f"{text}.rotary_emb", "lm_head"], "cpu"
    )
    places |= {f"{text}.layers.{layer}": "cpu" if layer < 2 else "disk" for layer in range(4)}
    model = dispatch_model(model, places, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)
    with mmcompress.wrap(model, REFERENCE, keep=KEEP):
        assert_exact(generate(model, expected.inputs), answer)
