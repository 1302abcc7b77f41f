"""Pruning inside the LLM is exact: generation equals an independent recomputation, layer by layer and without cache."""

from __future__ import annotations

import typing
from collections.abc import Callable, Container
from dataclasses import dataclass, replace

import pytest
import torch
from hf.families import FAMILIES
from hf.generating import generating
from hf.oracle import Entering, encoder_facts, prompts, reference_items, whole_prompts
from registered import variants
from torch import Tensor
from transformers import PreTrainedModel

import mmcompress
from mmcompress.budget import Budget
from mmcompress.errors import SpecError, UnsupportedError
from mmcompress.integrations.hf.families import FAMILIES as FAMILY_ADAPTERS
from mmcompress.integrations.hf.llm_stage import LLMStage, llm_facts
from mmcompress.llm_method import LLMFacts, LLMMethod, LLMNeeds, PromptRow
from mmcompress.ranking import top_indices
from mmcompress.registry import METHODS, register
from mmcompress.spec import Spec
from mmcompress.types import Positions, Selection

STEPS, KEEP, TOLERANCE = 5, 0.4, 1e-5
generate = generating(STEPS)
MROPE = {"qwen2_vl", "qwen2_5_vl", "qwen3_vl"}
DEEPSTACK_LEVELS = {"qwen3_vl": 2}


@dataclass(frozen=True)
class Progressive(LLMMethod):
    """The last token's attention before several layers, by what these layers would make of the tokens."""

    first: int = 1
    times: int = 3
    renumbers: bool = False

    @property
    def positions(self) -> Positions:
        return "renumber" if self.renumbers else "original"

    def needs(self, llm: LLMFacts) -> LLMNeeds:
        return LLMNeeds(upcoming=True)

    def layers(self, llm: LLMFacts) -> tuple[int, ...]:
        return tuple(range(self.first, self.first + self.times))

    def schedule(self, tokens: int, keep: int, ratio: float, llm: LLMFacts) -> list[int]:
        return [tokens - (tokens - keep) * (n + 1) // self.times for n in range(self.times)]

    def select(self, row: PromptRow, left: int) -> Selection:
        assert row.upcoming is not None
        scores = row.upcoming.rows(torch.tensor([len(row.visual) - 1]))[:, 0].mean(0)
        return Selection(top_indices(scores[row.visual], left))


@pytest.fixture(autouse=True, scope="module")
def only_here() -> typing.Iterator[None]:
    register("test-progressive", summary="For these tests.", family="test", stage="in_llm")(Progressive)
    yield
    del METHODS._classes["test-progressive"]


def rotated(states: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    half = states.shape[-1] // 2
    turned = torch.cat([-states[..., half:], states[..., :half]], -1)
    return states * cosines + turned * sines


def last_row(layer: typing.Any, hidden: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """The last token's attention in `layer` to all tokens before and itself, averaged over heads `[tokens]`."""
    attention, states = layer.self_attn, layer.input_layernorm(hidden)
    query, key = (
        projection(states).unflatten(-1, (-1, attention.head_dim))
        for projection in (attention.q_proj, attention.k_proj)
    )
    if hasattr(attention, "q_norm"):
        query, key = attention.q_norm(query), attention.k_norm(key)
    query, key = (rotated(part.transpose(1, 2), rotary[0][:, None], rotary[1][:, None]) for part in (query, key))
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    return (query[0, :, -1:] @ key[0].transpose(-1, -2) * attention.head_dim**-0.5).softmax(-1)[:, 0].mean(0)


@dataclass(frozen=True)
class Depth:
    """One row of a prompt on its way through the layers, nothing padded, what was generated behind it.

    Args:
        row: its number.
        layer: the layer about to run.
        hidden: `[1, tokens, width]` what enters it.
        entered: `[1, tokens, width]` what entered the layer before.
        rotary: cosines and sines of both.
        visual: `[visual]` where the tokens are that may go.
    """

    row: int
    layer: int
    hidden: Tensor
    entered: Tensor
    rotary: tuple[Tensor, Tensor]
    visual: Tensor


Choose = Callable[[Depth], Selection | None]
"""What stays of a row's visual tokens before a layer; None where all do."""


@dataclass(frozen=True)
class Recomputed:
    """Greedy decoding: tokens, logits `[rows, steps, vocabulary]`, and per row the prompt's length in every layer."""

    tokens: list[list[int]]
    logits: Tensor
    lengths: list[list[int]]


@torch.no_grad()
def recompute(
    model: PreTrainedModel, rows: list[Entering], cuts: Container[int], choose: Choose, renumbers: bool
) -> Recomputed:
    decoder: typing.Any = model.base_model.get_decoder()
    tokens, logits, lengths = [], [], []
    for number, entering in enumerate(rows):
        prompt = entering.row
        said = len(prompt.embeddings)
        candidate = torch.cat([entering.candidate, torch.zeros(STEPS, dtype=torch.bool)])
        kept: dict[int, Selection | None] = {}
        chosen: list[int] = []
        steps = []
        for _ in range(STEPS):
            entered = torch.empty(0)
            added = torch.arange(prompt.following, prompt.following + len(chosen))
            ids = torch.cat([prompt.positions, added.expand(*prompt.positions.shape[:-1], -1)], -1)
            extra = model.get_input_embeddings()(torch.tensor(chosen, dtype=torch.long))
            hidden = torch.cat([prompt.embeddings, extra])[None]
            at = torch.arange(hidden.shape[1])
            rotary = decoder.rotary_emb(hidden, ids[..., None, :])
            length = []
            for layer, block in enumerate(decoder.layers):
                if layer in cuts:
                    visual = candidate[at].nonzero()[:, 0]
                    if layer not in kept:
                        depth = Depth(number, layer, hidden, entered, rotary, visual)
                        kept[layer] = choose(depth) if len(visual) else None
                    selection = kept[layer]
                    if selection is not None:
                        hidden, order = reduced(hidden, visual, selection)
                        at = at[order]
                        now = torch.arange(len(at)) if renumbers else ids[..., at]
                        rotary = decoder.rotary_emb(hidden, now[..., None, :])
                length.append(int((at < said).sum()))
                mask = torch.full((len(at), len(at)), -torch.inf).triu(1)[None, None]
                entered = hidden
                hidden = block(hidden, attention_mask=mask, position_embeddings=rotary, position_ids=None)
                if prompt.deepstack is not None and layer < len(prompt.deepstack):
                    hidden[0, :said] += prompt.deepstack[layer]
            out = model.get_output_embeddings()(decoder.norm(hidden[0, -1]))
            steps.append(out)
            forbidden = out.clone()
            forbidden[model.generation_config.eos_token_id] = -torch.inf
            chosen.append(int(forbidden.argmax()))
        tokens.append(chosen)
        logits.append(torch.stack(steps))
        lengths.append(length)
    return Recomputed(tokens, torch.stack(logits), lengths)


def reduced(hidden: Tensor, visual: Tensor, selection: Selection) -> tuple[Tensor, Tensor]:
    """What is left of `hidden` `[1, tokens, width]`, and the tokens it stems from `[left]`."""
    sources = visual[selection.anchor].tolist()
    gone = set(visual.tolist())
    order, outputs = [], []
    for token in range(hidden.shape[1]):
        if token not in gone:
            order.append(token)
            outputs.append(hidden[0, token])
        elif token in sources:
            place = sum(source < token for source in sources)  # outputs fill the places of what they stem from
            order.append(sources[place])
            if selection.weight is None:
                outputs.append(hidden[0, sources[place]])
            else:
                outputs.append((selection.weight[place][:, None] * hidden[0, visual]).sum(0))
    return torch.stack(outputs)[None], torch.tensor(order)


def by_last_token(model: PreTrainedModel, name: str, inputs: dict, cuts: range, previous: bool) -> Choose:
    """FastV's rule, and that of `Progressive`, computed anew."""
    decoder: typing.Any = model.base_model.get_decoder()
    sizes: dict[int, list[int]] = {}
    for item in reference_items(model, name, inputs):
        sizes.setdefault(item.row, []).append(len(item.positions))

    def choose(depth: Depth) -> Selection:
        total = sum(sizes[depth.row])
        away = total - sum(int(KEEP * size + 1e-9) for size in sizes[depth.row])
        left = total - away * (cuts.index(depth.layer) + 1) // len(cuts)
        reader = decoder.layers[depth.layer - 1] if previous else decoder.layers[depth.layer]
        scores = last_row(reader, depth.entered if previous else depth.hidden, depth.rotary)[depth.visual]
        return Selection(scores.argsort(descending=True)[:left].sort().values)

    return choose


class Recording:
    """Writes down what a method chooses for every row at every layer."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.choices: dict[tuple[int, int], Selection] = {}
        numbers: dict[int, int] = {}
        rows, reduce = LLMStage._rows, LLMMethod.reduce

        def numbered(stage: LLMStage, *args: typing.Any, **kwargs: typing.Any) -> typing.Any:
            views = rows(stage, *args, **kwargs)
            numbers.clear()
            numbers.update({id(view): number for number, (view, _) in views.items()})
            return views

        def noted(method: LLMMethod, row: PromptRow, left: int) -> Selection:
            choice = reduce(method, row, left)
            self.choices[numbers[id(row)], row.layer] = choice
            return choice

        monkeypatch.setattr(LLMStage, "_rows", numbered)
        monkeypatch.setattr(LLMMethod, "reduce", noted)

    def choose(self, depth: Depth) -> Selection | None:
        return self.choices.get((depth.row, depth.layer))


# With random weights the question attends to everything: a higher threshold than the authors' lets tokens go.
OPTIONS = {"todre-stage2": {"threshold": 1.0}}


def in_llm() -> list[Spec]:
    return [replace(spec, options={**spec.options, **OPTIONS.get(spec.name, {})}) for spec in variants("in_llm")]


def wrapped(model: PreTrainedModel, spec: Spec | str) -> mmcompress.Handle:
    spec = Spec.parse(spec)
    method: typing.Any = METHODS.get(spec.name)
    return mmcompress.wrap(model, spec, keep=KEEP if method.info.takes_keep else None)


def assert_exact(output: typing.Any, stats: typing.Any, expected: Recomputed, width: int, whole: typing.Any) -> None:
    assert output.sequences[:, -STEPS:].tolist() == expected.tokens
    torch.testing.assert_close(torch.stack(output.logits, 1), expected.logits, atol=TOLERANCE, rtol=0)
    for layer, held in enumerate(output.past_key_values.layers):
        longest = max(length[layer] for length in expected.lengths)
        assert held.keys.shape[-2] == longest + STEPS - 1
        assert held.get_seq_length() == width + STEPS - 1
    by_layer = [sum(length[layer] for length in expected.lengths) for layer in range(len(expected.lengths[0]))]
    assert [sum(rows) for rows in stats.rows_by_layer] == by_layer
    differs = (torch.stack(whole.logits, 1) - expected.logits).abs().max() > 1e-3
    assert differs, "the pruned run must differ, or the test shows nothing"


CUTS = {
    "fastv": (range(2, 3), True, False),
    "test-progressive(times=1)": (range(1, 2), False, False),
    "test-progressive(times=2)": (range(1, 3), False, False),
    "test-progressive": (range(1, 4), False, False),
    "test-progressive(renumbers=true)": (range(1, 4), False, True),
}


def cases() -> typing.Iterator[typing.Any]:
    for name in FAMILIES:
        for spec, (cuts, previous, renumbers) in CUTS.items():
            if cuts[0] >= DEEPSTACK_LEVELS.get(name, 0):
                yield pytest.param(name, spec, cuts, previous, renumbers and name not in MROPE, id=f"{name}-{spec}")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("name", "spec", "cuts", "previous", "renumbers"), cases())
def test_exact(name: str, spec: str, cuts: range, previous: bool, renumbers: bool, attention: str) -> None:
    family = FAMILIES[name]
    model = family.build(attention)
    for kind in family.kinds:
        inputs = family.inputs(model, kind)
        choose = by_last_token(model, name, inputs, cuts, previous)
        expected = recompute(model, whole_prompts(model, name, inputs), cuts, choose, renumbers)
        with wrapped(model, spec) as handle:
            output = generate(model, inputs)
            stats = handle.stats
        assert_exact(output, stats, expected, inputs["input_ids"].shape[1], generate(model, inputs))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("spec", in_llm(), ids=str)
def test_every_method_on_every_family(name: str, spec: Spec, monkeypatch: pytest.MonkeyPatch) -> None:
    """Generation equals a recomputation, without cache or padding, of what the method chose to keep."""
    family = FAMILIES[name]
    model = family.build("sdpa")
    if name in DEEPSTACK_LEVELS:
        method: typing.Any = METHODS.build(spec.name, spec.options)
        if method.layers(llm_facts(FAMILY_ADAPTERS[name](model.base_model)))[0] < DEEPSTACK_LEVELS[name]:
            with pytest.raises(UnsupportedError, match="DeepStack"):
                wrapped(model, spec)
            return
    for kind in family.kinds:
        inputs = family.inputs(model, kind)
        with monkeypatch.context() as patching, wrapped(model, spec) as handle:
            recording = Recording(patching)
            output = generate(model, inputs)
            stats, renumbers = handle.stats, handle.llm_method.positions == "renumber" and name not in MROPE
        cuts = {layer for _, layer in recording.choices}
        assert cuts
        expected = recompute(model, whole_prompts(model, name, inputs), cuts, recording.choose, renumbers)
        assert_exact(output, stats, expected, inputs["input_ids"].shape[1], generate(model, inputs))


def of_two_parts() -> list[Spec]:
    specs = variants("pre_llm")
    return [spec for spec in specs if METHODS.build(spec.name, spec.options).second_part is not None]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("spec", of_two_parts(), ids=str)
def test_methods_of_two_parts(name: str, spec: Spec, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the first part keeps enters the LLM, and generation equals a recomputation of what the second one keeps."""
    family = FAMILIES[name]
    model = family.build("sdpa")
    method: typing.Any = METHODS.build(spec.name, spec.options)
    facts = encoder_facts(model, name)
    if facts.no_pre_projector and method.space == "pre_projector":
        with pytest.raises(UnsupportedError, match="before the projector"):
            mmcompress.wrap(model, spec, keep=KEEP)
        return
    needs = method.needs(facts)
    inputs = family.inputs(model, "mixed")
    selections = method.compress([item.item for item in reference_items(model, name, inputs)], Budget(KEEP), needs)
    with monkeypatch.context() as patching, mmcompress.wrap(model, spec, keep=KEEP) as handle:
        recording = Recording(patching)
        output = generate(model, inputs)
        stats, positions = handle.stats, handle.positions
        renumbers = handle.llm_method.positions == "renumber" and name not in MROPE
        with handle.set(keep=0.9):
            assert handle.keep == 0.9
    cuts = {layer for _, layer in recording.choices}
    assert cuts
    rows = prompts(model, name, inputs, selections, positions, method.space)
    expected = recompute(model, rows, cuts, recording.choose, renumbers)
    assert_exact(output, stats, expected, inputs["input_ids"].shape[1], generate(model, inputs))


@pytest.mark.parametrize("spec", in_llm(), ids=str)
def test_choices_do_not_depend_on_the_batch(spec: Spec, monkeypatch: pytest.MonkeyPatch) -> None:
    family = FAMILIES["llava"]
    model = family.build("sdpa")
    inputs = family.inputs(model, "images")
    patches = int((inputs["input_ids"] == model.config.image_token_id).sum()) // len(inputs["pixel_values"])
    counts = (inputs["input_ids"] == model.config.image_token_id).sum(1) // patches
    assert counts.max() > 1
    with wrapped(model, spec):
        with monkeypatch.context() as patching:
            together = Recording(patching)
            answers = generate(model, inputs).sequences[:, -STEPS:]
        for row, images in enumerate(inputs["pixel_values"].split(counts.tolist())):
            valid = inputs["attention_mask"][row].bool()
            single = {"input_ids": inputs["input_ids"][row : row + 1, valid]}
            single["attention_mask"] = torch.ones_like(single["input_ids"])
            if len(images):
                single["pixel_values"] = images
            with monkeypatch.context() as patching:
                alone = Recording(patching)
                answer = generate(model, single).sequences[0, -STEPS:]
            assert answer.tolist() == answers[row].tolist()
            assert bool(alone.choices) == bool(len(images))
            for (_, layer), choice in alone.choices.items():
                assert choice.anchor.tolist() == together.choices[row, layer].anchor.tolist()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_beside_a_method_before_the_llm(attention: str) -> None:
    family = FAMILIES["llava"]
    model = family.build(attention)
    inputs = family.inputs(model, family.kinds[0])
    with mmcompress.wrap(model, ["uniform(keep=8)", "fastv(keep=0.5)"]) as handle:
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
        stats = handle.stats
        assert stats.tokens_per_layer == [8, 8, 4, 4] and stats.kept == 8 * len(stats.items)
        with pytest.raises(SpecError, match="two methods have two budgets"):
            handle.set(keep=0.1)


@pytest.mark.parametrize("average", [0.65, 11])
@pytest.mark.parametrize("spec", [spec for spec in in_llm() if METHODS.get(spec.name).info.takes_keep], ids=str)
def test_an_average_over_layers(spec: Spec, average: float) -> None:
    """The schedule with the most tokens of those that leave at most so many per layer."""
    family = FAMILIES["llava"]
    model = family.build("sdpa")
    inputs = family.inputs(model, "single")
    with mmcompress.wrap(model, spec, keep_avg=average) as handle:
        model(**inputs)
        stats, method, llm = handle.stats, handle.llm_method, handle.llm
        plan = method.plan_average(16, 16 * average if average < 1 else average, llm)
        cuts = method.layers(llm)
    assert {item.tokens for item in stats.items} == {16}
    by_layer = [16.0] * cuts[0] + [
        float(left) for cut, end, left in zip(cuts, (*cuts[1:], 4), plan, strict=True) for _ in range(cut, end)
    ]
    if method.exact_count:
        assert stats.tokens_per_layer == by_layer
    target = 16 * average if average < 1 else average
    more = method.plan(16, plan[-1] + 1, (plan[-1] + 1) / 16, llm)
    with_more = [16] * cuts[0] + [
        left for cut, end, left in zip(cuts, (*cuts[1:], 4), more, strict=True) for _ in range(cut, end)
    ]
    assert sum(by_layer) / 4 <= target < sum(with_more) / 4


def test_an_average_changes_per_call_and_back() -> None:
    family = FAMILIES["llava"]
    model = family.build("sdpa")
    inputs = family.inputs(model, "single")
    with mmcompress.wrap(model, "fastv(layer=1)", keep_avg=0.5) as handle:
        with handle.set(keep_avg=0.7):
            model(**inputs)
            assert sum(handle.stats.tokens_per_layer) / 4 == pytest.approx(0.7 * 16, abs=0.75)
        with handle.set(keep=4):
            model(**inputs)
            assert handle.stats.tokens_per_layer == [16, 4, 4, 4]
        with pytest.raises(SpecError, match=r"cannot leave 20\.0%"):
            handle.set(keep_avg=0.2)
        with pytest.raises(SpecError, match="not both"):
            handle.set(keep=0.2, keep_avg=0.5)
        model(**inputs)
        assert sum(handle.stats.tokens_per_layer) / 4 <= 8


def test_nothing_is_read_after_the_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    family = FAMILIES["llava"]
    model = family.build("sdpa")
    calls = []
    reduce = LLMMethod.reduce
    monkeypatch.setattr(LLMMethod, "reduce", lambda self, row, left: calls.append(row.layer) or reduce(self, row, left))
    inputs = family.inputs(model, family.kinds[0])
    with mmcompress.wrap(model, "test-progressive", keep=KEEP) as handle:
        model.generate(**inputs, max_new_tokens=1, do_sample=False)
        after_prompt = len(calls)
        model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        assert len(calls) == 2 * after_prompt > 0
        assert handle.stats is not None
    calls.clear()
    model.generate(**inputs, max_new_tokens=1, do_sample=False)
    assert not calls


@pytest.mark.parametrize(
    ("name", "method", "message"),
    [
        ("llava", ["fastv(keep=0.5)", "uniform(keep=0.5)"], "uniform acts before fastv: give it first"),
        ("llava", ["fastv(keep=0.5)", "test-progressive(keep=0.5)"], "both remove tokens inside the LLM"),
        ("llava", ["todre(keep=0.5)", "fastv(keep=0.5)"], r"fastv acts too; give todre\(parts=first\) beside it"),
        ("llava", "todre-stage2(keep=0.5)", "todre-stage2 takes no keep="),
        ("llava", "todre-stage2(threshold=2)", "threshold=2 must be a share"),
        ("llava", "fastv", "fastv needs keep="),
        ("llava", "uniform(keep_avg=0.5)", "uniform removes no tokens inside the LLM.*give keep="),
        ("llava", "todre(keep_avg=0.5)", "todre removes no tokens inside the LLM.*give keep="),
        ("llava", "fastv(keep_avg=0.4)", "fastv cannot leave 40.0%.*50.0% at the least"),
        ("llava", "fastv(keep=0.4, keep_avg=0.4)", "not both"),
        ("llava", "fastv(keep=0.5, layer=0)", "layer=0 must be at least 1"),
        ("llava", "fastv(keep=0.5, layer=4)", "layer 4, but the LLM has layers 0..3"),
        ("qwen3_vl", "fastv(keep=0.5, layer=1)", "DeepStack"),
    ],
)
def test_what_cannot_be_is_refused_and_leaves_nothing(name: str, method: typing.Any, message: str) -> None:
    model = FAMILIES[name].build("sdpa")
    with pytest.raises((SpecError, UnsupportedError), match=message):
        mmcompress.wrap(model, method)
    mmcompress.wrap(model, "uniform", keep=0.5).unwrap()


def test_checkpointed_gradients_are_refused_before_anything_ran() -> None:
    family = FAMILIES["llava"]
    model = family.build("sdpa").train()
    model.gradient_checkpointing_enable()
    inputs = family.inputs(model, family.kinds[0])
    with mmcompress.wrap(model, "fastv", keep=0.5), pytest.raises(UnsupportedError, match="gradient checkpointing"):
        model(**inputs, use_cache=False)
