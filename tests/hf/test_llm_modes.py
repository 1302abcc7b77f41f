"""Pruning inside the LLM, alone and behind a method before it, is exact however a model is called."""

from __future__ import annotations

import typing
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from hf.fake_devices import HERE, THERE, PretendedDevices, put_there
from hf.fake_flash import fake_flash_attention
from hf.families import FAMILIES, IMAGE, Kind
from hf.oracle import encoder_facts, reference_items
from hf.test_exactness import _second_turn, generate
from hf.test_llm_stage import MROPE, Entering, in_llm, last_row, only_here, prompts
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

import mmcompress
from mmcompress.budget import Budget
from mmcompress.registry import METHODS
from mmcompress.spec import Spec
from mmcompress.types import Positions, Selection

__all__ = ["only_here"]  # registers `test-progressive`

KEEP, TOLERANCE = 0.4, 1e-5


@dataclass(frozen=True)
class Setup:
    """What is asked for, and how its removals are computed anew.

    Args:
        specs: the methods.
        keep: what the last layer has left of the tokens that enter the LLM.
        cuts: before which layers tokens go.
        previous: whether the layer before decides, by the last token's attention, or the one about to run.
        renumbers: whether what stays is numbered anew.
        before: how many tokens of an item the method before the LLM keeps, if there is one.
    """

    specs: list[str]
    keep: float
    cuts: range
    previous: bool
    renumbers: bool = False
    before: int | None = None


SETUPS = {
    "fastv": Setup(["fastv(keep=0.4)"], 0.4, range(2, 3), True),
    "several": Setup(["test-progressive(keep=0.4, first=2, times=2, renumbers=true)"], 0.4, range(2, 4), False, True),
    "stack": Setup(["uniform(keep=8)", "fastv(keep=0.5)"], 0.5, range(2, 3), True, before=8),
}
every_setup = pytest.mark.parametrize("setup", SETUPS.values(), ids=SETUPS)


@cache
def built(name: str) -> PreTrainedModel:
    return FAMILIES[name].build("sdpa")


@dataclass(frozen=True)
class Case:
    """A batch, what of it enters the LLM, and how many tokens per item may go there."""

    model: PreTrainedModel
    setup: Setup
    renumbers: bool
    rows: list[Entering]
    sizes: list[list[int]]

    def lefts(self, row: int, items: slice) -> dict[int, int]:
        """By layer, how many tokens of some items of a row stay."""
        sizes, cuts = self.sizes[row][items], self.setup.cuts
        away = sum(sizes) - sum(int(self.setup.keep * size + 1e-9) for size in sizes)
        return {layer: sum(sizes) - away * (number + 1) // len(cuts) for number, layer in enumerate(cuts)}


def case(name: str, inputs: dict, setup: Setup, model: PreTrainedModel | None = None) -> Case:
    model = model or built(name)
    items = reference_items(model, name, inputs)
    selections = [Selection.everything(len(item.item)) for item in items]
    if setup.before is not None:
        uniform: typing.Any = METHODS.build("uniform", {})
        needs = uniform.needs(encoder_facts(model, name))
        selections = uniform.compress([item.item for item in items], Budget(setup.before), needs)
    positions = "renumber" if setup.before is not None and name not in MROPE else "original"
    rows = prompts(model, name, inputs, selections, positions, "projected")
    sizes: list[list[int]] = [[] for _ in rows]
    for item, selection in zip(items, selections, strict=True):
        sizes[item.row].append(len(selection))
    return Case(model, setup, setup.renumbers and name not in MROPE, rows, sizes)


def replay(
    case: Case, row: int, said: Sequence[int] = (), turns: Sequence[int] | None = None, prunes: bool = True
) -> tuple[Tensor, Tensor]:
    """One pass without cache, padding or hooks: logits `[left, vocabulary]`, and where what is left came from `[left]`.

    Args:
        case: what is compressed.
        row: its row.
        said: tokens behind it.
        turns: where the prompts end that the row consists of, one image in each; None where it is one prompt.
        prunes: whether anything is removed.
    """
    model, prompt = case.model, case.rows[row].row
    decoder: typing.Any = model.base_model.get_decoder()
    length = len(prompt.embeddings)
    added = torch.arange(prompt.following, prompt.following + len(said)).expand(*prompt.positions.shape[:-1], -1)
    ids = torch.cat([prompt.positions, added], -1)
    extra = model.get_input_embeddings()(torch.tensor(said, dtype=torch.long))
    hidden = torch.cat([prompt.embeddings, extra])[None]
    candidate = torch.cat([case.rows[row].candidate, torch.zeros(len(said), dtype=torch.bool)])
    ends = turns or [length]
    at = torch.arange(length + len(said))
    rotary, entered = decoder.rotary_emb(hidden, ids[..., None, :]), hidden
    for layer, block in enumerate(decoder.layers):
        if prunes and layer in case.setup.cuts:
            reader = decoder.layers[layer - 1] if case.setup.previous else block
            states = (entered if case.setup.previous else hidden).detach()
            stays = torch.ones_like(at, dtype=torch.bool)
            for turn, end in enumerate(ends):
                left = case.lefts(row, slice(turn, turn + 1) if turns else slice(None))[layer]
                begin, now = ends[turn - 1] if turn else 0, int((at < end).sum())
                scores = last_row(reader, states[:, :now], (rotary[0][:, :now], rotary[1][:, :now]))
                visual = (candidate[at[:now]] & (at[:now] >= begin)).nonzero()[:, 0]
                stays[visual[scores[visual].argsort(descending=True)[left:]]] = False
            hidden, at = hidden[:, stays], at[stays]
            rotary = decoder.rotary_emb(
                hidden, (torch.arange(len(at)) if case.renumbers else ids[..., at])[..., None, :]
            )
        mask = torch.full((len(at), len(at)), -torch.inf).triu(1)[None, None]
        entered = hidden
        hidden = block(hidden, attention_mask=mask, position_embeddings=rotary, position_ids=None)
        if prompt.deepstack is not None and layer < len(prompt.deepstack):
            hidden[0, :length] += prompt.deepstack[layer]
    return model.get_output_embeddings()(decoder.norm(hidden))[0], at


@torch.no_grad()
def assert_follows(case: Case, logits: Tensor, said: list[list[int]], turns: Sequence[int] | None = None) -> None:
    """`logits` `[answers, steps, vocabulary]` are the last of those that lead from the prompts to what is `said`."""
    copies, steps = len(said) // len(case.rows), logits.shape[1]
    for number, tokens in enumerate(said):
        row, forced = number // copies, tokens[:-1]
        wanted = replay(case, row, forced, turns)[0][-steps:]
        torch.testing.assert_close(logits[number], wanted, atol=TOLERANCE, rtol=0)
        if case.sizes[row]:
            whole = replay(case, row, forced, turns, prunes=False)[0][-steps:]
            assert (whole - wanted).abs().max() > 1e-3, "the pruned run must differ, or the test shows nothing"


def answers(output: typing.Any) -> tuple[Tensor, list[list[int]]]:
    logits = torch.stack(output.logits, 1)
    return logits, output.sequences[:, -logits.shape[1] :].tolist()


@pytest.mark.parametrize("kind", ["mixed", "single"])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl"])
@every_setup
def test_flash_attention(name: str, kind: Kind, setup: Setup) -> None:
    inputs = FAMILIES[name].inputs(built(name), kind)
    expected = case(name, inputs, setup)
    with fake_flash_attention(built(name)) as calls, mmcompress.wrap(built(name), setup.specs):
        output = generate(built(name), inputs)
    assert {call.kernel for call in calls if call.causal} == {"varlen" if kind == "mixed" else "dense"}
    assert_follows(expected, *answers(output))


@pytest.mark.parametrize("attention", ["sdpa", "flash"])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
@every_setup
def test_a_second_turn_reuses_the_cache(name: str, attention: str, setup: Setup) -> None:
    model = built(name)
    inputs = FAMILIES[name].inputs(model, "mixed")
    expected = case(name, inputs, setup)
    added = torch.tensor([[40, 41, 42]]).expand(len(inputs["input_ids"]), -1)
    with (
        fake_flash_attention(model) if attention == "flash" else nullcontext(),
        mmcompress.wrap(model, setup.specs),
    ):
        first = generate(model, inputs, steps=3)
        second = generate(model, _second_turn(first, inputs, added), steps=3)
    said = second.sequences[:, inputs["input_ids"].shape[1] :].tolist()
    assert_follows(expected, torch.stack(second.logits, 1), said)


@pytest.mark.parametrize("attention", ["sdpa", "flash"])
@pytest.mark.parametrize(("name", "opening"), [("llava", "text"), ("llava", "image"), ("qwen2_5_vl", "image")])
@every_setup
def test_a_new_image_in_a_later_turn(name: str, opening: str, attention: str, setup: Setup) -> None:
    model = built(name)
    one = FAMILIES[name].inputs(model, "single")
    begin = {key: value for key, value in one.items() if key != "attention_mask"}
    if opening == "text":
        begin = {"input_ids": torch.tensor([[1, 50, 51, 52, 53]])}
    with (
        fake_flash_attention(model) if attention == "flash" else nullcontext(),
        mmcompress.wrap(model, setup.specs),
    ):
        first = generate(model, begin, steps=3)
        ids = torch.cat([first.sequences, one["input_ids"][:, 1:]], dim=1)
        later = begin | {"pixel_values": one["pixel_values"], "input_ids": ids}
        together = later | {"attention_mask": torch.ones_like(ids)}
        if opening == "image":
            repeated = {key: one[key] for key in ("pixel_values", "image_grid_thw") if key in one}
            together |= {key: torch.cat([value, value]) for key, value in repeated.items()}
        if name in MROPE:  # generate() cannot tell the grid of an image it is not given again
            together["mm_token_type_ids"] = later["mm_token_type_ids"] = (ids == IMAGE).int()
            rope = {key: together[key] for key in ("mm_token_type_ids", "image_grid_thw", "attention_mask")}
            positions = model.model.get_rope_index(ids, **rope)[0]
            later["position_ids"] = torch.cat([torch.arange(ids.shape[1]).expand(1, 1, -1), positions])
        output = generate(model, later, steps=3, past_key_values=first.past_key_values)
    expected = case(name, together, setup)
    ends = [len(prompt.rows[0].row.embeddings) for prompt in (case(name, one, setup), expected)]
    assert_follows(expected, *answers(output), None if opening == "text" else ends)


@pytest.mark.parametrize(("name", "kind"), [("llava", "single"), ("qwen2_5_vl", "images")])
@every_setup
def test_beam_search(name: str, kind: Kind, setup: Setup) -> None:
    model = built(name)
    inputs = FAMILIES[name].inputs(model, kind)
    expected = case(name, inputs, setup)
    with mmcompress.wrap(model, setup.specs):
        output = generate(model, inputs, num_beams=3, length_penalty=0.0, output_scores=True)
    for row, tokens in enumerate(output.sequences[:, -5:].tolist()):
        with torch.no_grad():
            logits = replay(expected, row, tokens[:-1])[0][-5:]
        wanted = logits.log_softmax(-1)[torch.arange(5), torch.tensor(tokens)].sum()
        assert abs(float(output.sequences_scores[row] - wanted)) < 1e-4


@pytest.mark.parametrize(("name", "kind"), [("llava", "single"), ("qwen2_5_vl", "images")])
@every_setup
def test_sampling_several_answers_per_prompt(name: str, kind: Kind, setup: Setup) -> None:
    inputs = FAMILIES[name].inputs(built(name), kind)
    expected = case(name, inputs, setup)
    torch.manual_seed(0)
    with mmcompress.wrap(built(name), setup.specs):
        output = generate(built(name), inputs, do_sample=True, num_return_sequences=2)
    assert_follows(expected, *answers(output))


def predicted(case: Case, inputs: dict) -> typing.Iterator[tuple[int, Tensor, Tensor]]:
    """Per row `[tokens]` the columns of text that something stands before, and the logits that predict them."""
    for row in range(len(case.rows)):
        valid = inputs["attention_mask"][row].bool()
        text = (valid & ~torch.isin(inputs["input_ids"][row], torch.tensor([IMAGE]))).nonzero()[:, 0]
        logits, at = replay(case, row)
        entered = ~torch.isin(at, case.rows[row].candidate.nonzero()[:, 0])
        yield row, text[1:], logits[entered.nonzero()[1:, 0] - 1]


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl"])
@every_setup
def test_a_forward_pass_keeps_the_length_of_its_prompt(name: str, use_cache: bool, setup: Setup) -> None:
    """What follows a removed token is predicted by the last one before it that is left."""
    inputs = FAMILIES[name].inputs(built(name), "mixed")
    expected = case(name, inputs, setup)
    with torch.no_grad():
        with mmcompress.wrap(built(name), setup.specs):
            logits = built(name)(**inputs, use_cache=use_cache).logits
        assert logits.shape[:2] == inputs["input_ids"].shape
        for row, columns, wanted in predicted(expected, inputs):
            torch.testing.assert_close(logits[row, columns - 1], wanted, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
@every_setup
def test_training_loss_and_gradients(name: str, setup: Setup) -> None:
    model = FAMILIES[name].build("sdpa")
    inputs = FAMILIES[name].inputs(model, "mixed")
    expected = case(name, inputs, setup, model)
    labels = torch.full_like(inputs["input_ids"], -100)
    losses = []
    for row, columns, logits in predicted(expected, inputs):
        labels[row, columns] = inputs["input_ids"][row, columns]
        losses.append(cross_entropy(logits, labels[row, columns], reduction="none"))
    wanted = torch.cat(losses).mean()
    wanted.backward()
    trained = {key: value for key, value in model.named_parameters() if "layers" in key and "language" in key}
    gradients = {key: parameter.grad.clone() for key, parameter in trained.items()}
    model.zero_grad(set_to_none=True)
    with mmcompress.wrap(model, setup.specs):
        loss = model(**inputs, labels=labels).loss
        loss.backward()
    torch.testing.assert_close(loss, wanted, atol=TOLERANCE, rtol=0)
    for key, gradient in gradients.items():
        torch.testing.assert_close(trained[key].grad, gradient, atol=1e-4, rtol=1e-3)
    projector = [value.grad for key, value in model.named_parameters() if "projector" in key or "merger" in key]
    assert projector and all(bool(gradient.isfinite().all()) and bool(gradient.any()) for gradient in projector)


@pytest.mark.parametrize(
    ("spec", "positions"), [*((spec, "original") for spec in in_llm()), (Spec("fastv"), "renumber")], ids=str
)
def test_layers_on_two_devices(spec: Spec, positions: Positions) -> None:
    model = FAMILIES["llava"].build("sdpa")
    decoder: typing.Any = model.base_model.get_decoder()
    one = FAMILIES["llava"].inputs(model, "single")
    keep = KEEP if METHODS.get(spec.name).info.takes_keep else None

    def talk() -> list[typing.Any]:
        first = generate(model, one, steps=3)
        later = _second_turn(first, one, one["input_ids"][:, 1:]) | {"pixel_values": one["pixel_values"]}
        return [first, generate(model, later, steps=3), generate(model, FAMILIES["llava"].inputs(model, "mixed"))]

    with mmcompress.wrap(model, spec, keep=keep, positions=positions):
        expected = talk()
        for module in (*decoder.layers[1:], decoder.norm, model.lm_head):
            put_there(module)
        model.lm_head.register_forward_hook(lambda module, args, output: output.to(HERE))
        with PretendedDevices():
            outputs = talk()
            assert outputs[-1].past_key_values.layers[1].keys.device == THERE
    for output, wanted in zip(outputs, expected, strict=True):
        assert torch.equal(output.sequences, wanted.sequences)
        torch.testing.assert_close(torch.stack(output.logits), torch.stack(wanted.logits), atol=TOLERANCE, rtol=0)


def test_pretended_devices_do_not_mix() -> None:
    with PretendedDevices():
        there = torch.ones(2, 3).to(THERE)
        assert (there + 1)[torch.tensor([0])].device == THERE
        for mixed in (lambda: there + torch.ones(3), lambda: torch.ones(3)[there[0].long()]):
            with pytest.raises(RuntimeError, match="two devices"):
                mixed()
