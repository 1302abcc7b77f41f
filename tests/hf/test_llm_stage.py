"""Pruning inside the LLM is exact: generation equals an independent recomputation, layer by layer and without cache."""

from __future__ import annotations

import typing
from dataclasses import dataclass

import pytest
import torch
from hf.families import FAMILIES
from hf.oracle import _prompt, reference_items
from registered import variants
from torch import Tensor
from transformers import PreTrainedModel

import mmcompress
from mmcompress.errors import SpecError, UnsupportedError
from mmcompress.llm_method import LLMFacts, LLMMethod, LLMNeeds, PromptRow
from mmcompress.ranking import top_indices
from mmcompress.registry import METHODS, register
from mmcompress.types import Positions, Selection

STEPS, KEEP, TOLERANCE = 5, 0.4, 1e-5
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


@torch.no_grad()
def recompute(
    model: PreTrainedModel,
    name: str,
    inputs: dict,
    cuts: range,
    previous: bool,
    renumbers: bool,
) -> tuple[list[list[int]], Tensor, list[list[int]]]:
    """Tokens, logits `[rows, steps, vocabulary]`, and per row the prompt's length in every layer."""
    decoder: typing.Any = model.base_model.get_decoder()
    items = reference_items(model, name, inputs)
    tokens, logits, lengths = [], [], []
    for number, prompt in enumerate(_prompt(model, name, inputs)):
        valid = inputs["attention_mask"][number].bool()
        candidate = torch.zeros_like(valid)
        sizes = []
        for item in items:
            if item.row == number:
                candidate[item.positions] = True
                sizes.append(len(item.positions))
        candidate = candidate[valid]
        away = sum(sizes) - sum(int(KEEP * size + 1e-9) for size in sizes)
        lefts = {layer: sum(sizes) - away * (n + 1) // len(cuts) for n, layer in enumerate(cuts)} if sizes else {}
        kept: dict[int, Tensor] = {}
        chosen: list[int] = []
        steps = []
        for _ in range(STEPS):
            entered = torch.empty(0)
            added = torch.arange(prompt.following, prompt.following + len(chosen))
            ids = torch.cat([prompt.positions[..., valid], added.expand(*prompt.positions.shape[:-1], -1)], -1)
            extra = model.get_input_embeddings()(torch.tensor(chosen, dtype=torch.long))
            hidden = torch.cat([prompt.embeddings[valid], extra])[None]
            at = torch.arange(hidden.shape[1])
            rotary = decoder.rotary_emb(hidden, ids[..., None, :])
            length = []
            for layer, block in enumerate(decoder.layers):
                if layer in lefts:
                    if layer not in kept:
                        reader = decoder.layers[layer - 1] if previous else block
                        scores = last_row(reader, entered if previous else hidden, rotary)
                        visual = candidate[at].nonzero()[:, 0]
                        best = visual[scores[visual].argsort(descending=True)[: lefts[layer]]]
                        stays = ~candidate[at]
                        stays[best] = True
                        kept[layer] = at[stays]
                    places = torch.cat([kept[layer], at[at >= int(valid.sum())]])
                    here = torch.isin(at, places)
                    hidden, at = hidden[:, here], at[here]
                    now = torch.arange(len(at)) if renumbers else ids[..., at]
                    rotary = decoder.rotary_emb(hidden, now[..., None, :])
                length.append(int((at < int(valid.sum())).sum()))
                mask = torch.full((len(at), len(at)), -torch.inf).triu(1)[None, None]
                entered = hidden
                hidden = block(hidden, attention_mask=mask, position_embeddings=rotary, position_ids=None)
                if prompt.deepstack is not None and layer < len(prompt.deepstack):
                    hidden[0, : int(valid.sum())] += prompt.deepstack[layer][valid]
            out = model.get_output_embeddings()(decoder.norm(hidden[0, -1]))
            steps.append(out)
            forbidden = out.clone()
            forbidden[model.generation_config.eos_token_id] = -torch.inf
            chosen.append(int(forbidden.argmax()))
        tokens.append(chosen)
        logits.append(torch.stack(steps))
        lengths.append(length)
    return tokens, torch.stack(logits), lengths


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
        tokens, logits, lengths = recompute(model, name, inputs, cuts, previous, renumbers)
        options = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False}
        options |= {"return_dict_in_generate": True, "output_logits": True}
        with mmcompress.wrap(model, spec, keep=KEEP) as handle:
            output = model.generate(**inputs, **options)
            stats = handle.stats
        assert output.sequences[:, -STEPS:].tolist() == tokens
        torch.testing.assert_close(torch.stack(output.logits, 1), logits, atol=TOLERANCE, rtol=0)
        width = inputs["input_ids"].shape[1]
        for layer, held in enumerate(output.past_key_values.layers):
            longest = max(length[layer] for length in lengths)
            assert held.keys.shape[-2] == longest + STEPS - 1
            assert held.get_seq_length() == width + STEPS - 1
        by_layer = [sum(length[layer] for length in lengths) for layer in range(len(lengths[0]))]
        assert [sum(rows) for rows in stats.rows_by_layer] == by_layer
        whole = torch.stack(model.generate(**inputs, **options).logits, 1)
        assert (whole - logits).abs().max() > 1e-3, "the pruned run must differ, or the test shows nothing"


def test_every_method_is_recomputed_here() -> None:
    assert {spec.partition("(")[0] for spec in CUTS} == {str(spec) for spec in variants("in_llm")} | {
        "test-progressive"
    }


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
        ("llava", "fastv", "fastv needs keep="),
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
