"""SparseVLM: its counts, raters, scores and clusters by hand, and models that lose tokens by it, recomputed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hf.families import FAMILIES
from hf.oracle import _prompt, reference_items
from torch import Tensor
from transformers import PreTrainedModel

import mmcompress
from mmcompress.llm_method import LLMFacts, PromptRow, RowAttention
from mmcompress.methods._dpc_knn import distances, peak_scores
from mmcompress.methods.sparsevlm import TABLES, SparseVLM
from mmcompress.registry import METHODS

LLM = LLMFacts(32, 32)
STEPS, KEEP = 4, 0.25
VERSIONS = ("1.5", "2.0")
DIM, THETA = 8, 10000.0


def rotary(ids: Tensor) -> tuple[Tensor, Tensor]:
    angles = ids[:, None] * THETA ** -(torch.arange(0, DIM, 2) / DIM)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def make_row(seed: int, visual: str, heads: int = 4) -> PromptRow:
    """A prompt written as one letter per token: v is visual, t is text, n a newline of the image."""
    generator = torch.Generator().manual_seed(seed)
    tokens = len(visual)
    query, key = torch.randn(2, heads, tokens, DIM, generator=generator)
    return PromptRow(
        layer=3,
        total=visual.count("v"),
        visual=torch.tensor([letter == "v" for letter in visual]),
        text=torch.tensor([letter == "t" for letter in visual]),
        hidden=torch.randn(tokens, DIM, generator=generator),
        source=torch.arange(tokens),
        previous=RowAttention(query, key[: heads // 2], DIM**-0.5),
        inputs=torch.randn(tokens, DIM, generator=generator),
        rotary=rotary(torch.arange(tokens) + 5),
    )


PROMPT = "tt" + "v" * 20 + "t" * 9


# --- counts


@pytest.mark.parametrize("version", VERSIONS)
def test_counts_are_the_published_ones(version: Any) -> None:
    method = SparseVLM(version)
    published = {
        "1.5": [[300, 200, 110], [303, 110, 36], [238, 48, 26], [66, 30, 17]],
        "2.0": [[300, 200, 118], [238, 108, 60], [246, 54, 28], [66, 34, 20]],
    }[version]
    for row in published:
        assert method.plan(576, row[-1], row[-1] / 576, LLM) == row
        double = method.plan(1152, 2 * row[-1], row[-1] / 576, LLM)
        assert double == [2 * count for count in row]
    assert method.plan(576, 576, 1.0, LLM) == [576] * 3
    last = TABLES[version][-1]
    between = (last[-1] + 576) // 2  # half way to all tokens
    assert method.plan(576, between, between / 576, LLM)[:2] == [(last[0] + 576) // 2, (last[1] + 576) // 2]
    first = TABLES[version][0]
    assert method.plan(5760, first[-1], 0.0, LLM)[:2] == [first[0], first[1]]  # a tenth of the smallest


@pytest.mark.parametrize("version", VERSIONS)
def test_every_count_is_a_schedule(version: Any) -> None:
    for tokens in (1, 2, 5, 16, 37, 100, 577):
        for keep in range(1, tokens + 1):
            assert SparseVLM(version).plan(tokens, keep, keep / tokens, LLM)[-1] == keep


def test_layers_are_scaled() -> None:
    assert SparseVLM().layers(LLM) == (3, 7, 16)
    assert SparseVLM().layers(LLMFacts(28, 28)) == (3, 6, 14)
    assert SparseVLM().layers(LLMFacts(4, 4)) == (1, 2, 3)


# --- raters


def test_raters_are_closer_to_the_image_than_the_mean() -> None:
    row = make_row(0, PROMPT)
    assert row.inputs is not None
    image, question = row.inputs[2:22], row.inputs[22:]
    relevance = [0.0] * len(question)
    for token in image:
        products = [math.exp(float(token @ word)) for word in question]
        relevance = [seen + one / sum(products) for seen, one in zip(relevance, products, strict=True)]
    expected = [22 + n for n, value in enumerate(relevance) if value > sum(relevance) / len(relevance)]
    assert SparseVLM().raters(row).tolist() == expected
    assert 0 < len(expected) < len(question)


def test_raters_stay_the_same_after_tokens_were_removed() -> None:
    for seed in range(10):
        row = make_row(seed, "ttvvvnvvvntvvvttttttt")
        left = torch.tensor([0, 1, 4, 2, 5, 9, 10, 12, *range(14, 21)])  # 4 in front of 2: the order may have changed
        parts = {"visual": row.visual[left], "text": row.text[left], "hidden": row.hidden[left]}
        later = replace(row, **parts, source=left)
        assert left[SparseVLM().raters(later)].tolist() == SparseVLM().raters(row).tolist()


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("prompt", ["vvvvvvt", "tvvvvvv", "tvvvvvvttt"])
def test_without_a_better_word_all_of_the_question_rates(version: Any, prompt: str) -> None:
    row = make_row(2, prompt)
    assert row.inputs is not None
    row.inputs[7:] = row.inputs[-1]
    raters = SparseVLM(version).raters(row)
    assert raters.tolist() == row.question.tolist()
    assert len(SparseVLM("2.0").reduce(row, 3)) == 3


# --- scores


def explicit_attention(row: PromptRow) -> Tensor:
    """`[heads, tokens, tokens]`."""
    assert row.previous is not None
    query, key, scaling = row.previous
    logits = query @ key.repeat_interleave(2, 0).transpose(-1, -2) * scaling
    return logits.masked_fill(torch.ones_like(logits[0], dtype=torch.bool).triu(1), -torch.inf).softmax(-1)


def test_scores_of_version_1_5() -> None:
    row = make_row(3, PROMPT)
    raters = SparseVLM().raters(row)
    expected = torch.stack([explicit_attention(row)[:, rater, 2:22].mean(0) for rater in raters]).mean(0)
    torch.testing.assert_close(SparseVLM().scores(row), expected)


@pytest.mark.parametrize("heads", [4, 14, 20])
def test_scores_of_version_2_0(heads: int) -> None:
    row = make_row(4, PROMPT, heads)
    attention, method = explicit_attention(row), SparseVLM("2.0")
    raters = method.raters(row).tolist()
    by_head = torch.zeros(heads, 20)
    for rater in raters:
        for token in range(2, 22):
            waves = [math.cos((rater - token) * THETA ** -(f / DIM)) for f in range(0, DIM, 2)]
            by_head[:, token - 2] += attention[:, rater, token] / (2 * sum(waves) / DIM**0.5) / len(raters)
    best = sorted(range(heads), key=lambda head: -float(by_head[head].sum()))[:14]
    torch.testing.assert_close(method.scores(row), by_head[best].mean(0), rtol=1e-3, atol=1e-5)


def test_bias_of_three_axes() -> None:
    decoder: Any = FAMILIES["qwen2_5_vl"].build("sdpa").base_model.get_decoder()
    ids = torch.tensor([[0, 3, 3, 3, 3, 3, 3, 6], [0, 3, 3, 3, 4, 4, 4, 6], [0, 3, 4, 5, 3, 4, 5, 6]])
    cosines, sines = (part[0] for part in decoder.rotary_emb(torch.zeros(1, 8, 4), ids[:, None]))
    row = make_row(5, "tvvvvvvt")
    assert row.previous is not None
    even = replace(row, previous=row.previous._replace(key=torch.zeros_like(row.previous.key)))  # attention is 1 / 8
    scores = SparseVLM("2.0").scores(replace(even, rotary=(cosines, sines)))
    axes = [0, 0, 1, 1, 1, 2, 2, 2]  # of each frequency, by the sections 2, 3, 3
    for token in range(1, 7):
        waves = [math.cos((6 - int(ids[axis, token])) * THETA ** -(f / 8)) for f, axis in enumerate(axes)]
        assert float(scores[token - 1]) == pytest.approx(1 / 8 / (2 * sum(waves) / 16**0.5), rel=1e-4)


@pytest.mark.parametrize("version", VERSIONS)
def test_many_raters_are_taken_in_turns(version: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    row = make_row(5, "v" * 10 + "t" * 30)
    at_once = SparseVLM(version).scores(row)
    for module in ("llm_method", "methods.sparsevlm"):
        monkeypatch.setattr(f"mmcompress.{module}.ROWS_AT_ONCE", 2)
    assert len(SparseVLM(version).raters(row)) > 4
    torch.testing.assert_close(at_once, SparseVLM(version).scores(row))


# --- clusters


def test_peaks_by_hand() -> None:
    tokens = torch.tensor([[0.0], [1.0], [3.0], [10.0], [10.5]])
    distance = distances(tokens)
    assert torch.equal(distance, (tokens - tokens.T).abs())
    # Squared distances of the two nearest, oneself among them: 0.5, 0.5, 2, 0.125, 0.125.
    density = [math.exp(-part) for part in (0.5, 0.5, 2.0, 0.125, 0.125)]
    denser = [10.0, 9.0, 2.0, 10.5, 10.5]  # the densest take the largest distance
    expected = torch.tensor([one * other for one, other in zip(density, denser, strict=True)])
    torch.testing.assert_close(peak_scores(distance, 2), expected)


def test_dropped_tokens_are_pooled_behind_the_kept_ones() -> None:
    row = make_row(6, "tt" + "v" * 60 + "t" * 9)
    method = SparseVLM()
    selection = method.reduce(row, 8)
    scores = method.scores(row)
    ranked = scores.argsort(descending=True).tolist()
    pooled = ranked[8 : 8 + int(0.3 * 52) + 1]
    assert selection.anchor[:8].tolist() == sorted(ranked[:8])
    assert len(selection) == 8 + len(pooled) // 10 + 1 == 10
    assert set(selection.anchor[8:].tolist()) < set(pooled)
    hidden = row.hidden[2:62]
    clusters: dict[int, list[int]] = {int(centre): [] for centre in selection.anchor[8:]}
    for token in pooled:
        own = {centre: float((hidden[token] - hidden[centre]).norm()) for centre in clusters}
        clusters[min(own, key=lambda centre: own[centre])].append(token)
    expected = [*hidden[selection.anchor[:8]], *(hidden[members].mean(0) for members in clusters.values())]
    torch.testing.assert_close(selection.apply(hidden), torch.stack(expected))


def test_pooled_tokens_stay_behind_their_own_image() -> None:
    row = make_row(7, "v" * 30 + "tt" + "v" * 60 + "t" * 9)
    anchor = SparseVLM().reduce(row, 12).anchor
    image = (anchor >= 30).long()
    assert image.tolist() == sorted(image.tolist())
    alone = make_row(7, "v" * 90 + "t" * 11)
    kept = SparseVLM().reduce(alone, 12).anchor[:12]
    assert kept.tolist() == sorted(kept.tolist())


@pytest.mark.parametrize("version", VERSIONS)
def test_a_prompt_of_equal_tokens(version: Any) -> None:
    row = make_row(8, PROMPT)
    alike = replace(row, hidden=torch.ones_like(row.hidden))
    for left in range(1, 20):
        selection = SparseVLM(version).reduce(alike, left)
        assert (len(selection) > left) == (version == "1.5")
        torch.testing.assert_close(selection.apply(alike.hidden[2:22]), alike.hidden[: len(selection)])


# --- in models


def read_by(layer: Any, hidden: Tensor, cosines: Tensor, sines: Tensor) -> RowAttention:
    """Rotated queries and keys of a decoder layer that `hidden` `[tokens, width]` enters."""
    attention, states = layer.self_attn, layer.input_layernorm(hidden)
    half = attention.head_dim // 2
    parts = []
    for projection in (attention.q_proj, attention.k_proj):
        part = projection(states).unflatten(-1, (-1, attention.head_dim)).transpose(0, 1)
        turned = torch.cat([-part[..., half:], part[..., :half]], dim=-1)
        parts.append(part * cosines + turned * sines)
    return RowAttention(parts[0], parts[1], attention.head_dim**-0.5)


@torch.no_grad()
def answer(
    model: PreTrainedModel, method: SparseVLM, prompt: Any, items: Sequence[Tensor], renumbers: bool
) -> tuple[Tensor, list[int]]:
    """The logits `[steps, vocabulary]` of a row alone, without cache, and its prompt's length in every layer.

    Args:
        prompt: the row, unpadded.
        items: columns of the visual tokens of each of its images or clips.
    """
    decoder: Any = model.base_model.get_decoder()
    llm = LLMFacts(len(decoder.layers), 4)
    candidate = torch.zeros_like(prompt.visual)
    candidate[torch.cat([candidate.new_empty(0, dtype=torch.long), *items])] = True
    total = int(candidate.sum())
    plan = method.plan(total, sum(int(KEEP * len(item)) for item in items), KEEP, llm) if items else []
    lefts = dict(zip(method.layers(llm), plan, strict=False))
    logits = torch.empty(0, model.config.get_text_config().vocab_size)
    for step in range(STEPS):
        following = torch.arange(prompt.following, prompt.following + step)
        ids = torch.cat([prompt.positions, following.expand(*prompt.positions.shape[:-1], -1)], -1)
        hidden = torch.cat([prompt.embeddings, model.get_input_embeddings()(logits.argmax(-1))])
        source = torch.arange(len(hidden))
        cosines, sines = (part[0] for part in decoder.rotary_emb(hidden, ids[..., None, :]))
        lengths, previous = [], None
        for layer, block in enumerate(decoder.layers):
            old = len(hidden) - step
            visual = candidate[source[:old]]
            if layer in lefts:
                text = ~prompt.visual[source[:old]]
                states, turns = hidden[:old], (cosines[:old], sines[:old])
                inputs = prompt.embeddings
                row = PromptRow(layer, total, visual, text, states, source[:old], previous, inputs=inputs, rotary=turns)
                selection = method.select(row, lefts[layer])
                away = len(row.images) - lefts[layer]
                pooled = (int(0.3 * away) + 1) // 10 + 1 if method.version == "1.5" else 0
                assert len(selection) == lefts[layer] + pooled
                anchors = row.images[selection.anchor]
                slots = anchors.sort().values
                hidden[slots], source[slots] = selection.apply(states[row.images]), source[anchors]
                stays = torch.ones(len(hidden), dtype=torch.bool)
                stays[row.images] = False
                stays[slots] = True
                hidden, source = hidden[stays], source[stays]
                now = torch.arange(len(hidden)) if renumbers else ids[..., source]
                cosines, sines = (part[0] for part in decoder.rotary_emb(hidden, now[..., None, :]))
            lengths.append(len(hidden) - step)
            previous = read_by(block, hidden[: lengths[-1]], cosines[: lengths[-1]], sines[: lengths[-1]])
            mask = torch.full((len(hidden), len(hidden)), -torch.inf).triu(1)[None, None]
            rotation = cosines[None], sines[None]
            hidden = block(hidden[None], attention_mask=mask, position_embeddings=rotation, position_ids=None)[0]
        logits = torch.cat([logits, model.get_output_embeddings()(decoder.norm(hidden[-1:]))])
    return logits, lengths


def alone(model: PreTrainedModel, name: str, inputs: Mapping[str, Any]) -> Iterator[tuple[Any, list[Tensor]]]:
    """Every row without padding, and the columns of its items."""
    items = reference_items(model, name, inputs)
    for number, row in enumerate(_prompt(model, name, inputs)):
        valid = inputs["attention_mask"][number].bool()
        padding = int((~valid).sum())
        shorter = replace(
            row, embeddings=row.embeddings[valid], positions=row.positions[..., valid], visual=row.visual[valid]
        )
        yield shorter, [item.positions - padding for item in items if item.row == number]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen2_5_vl"])
def test_generation_equals_a_recomputation_row_by_row(name: str, version: Any) -> None:
    family = FAMILIES[name]
    model = family.build("sdpa")
    model.generation_config.eos_token_id = None
    inputs: Mapping[str, Any] = family.inputs(model, "mixed")
    options = {"max_new_tokens": STEPS, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    with mmcompress.wrap(model, "sparsevlm", keep=KEEP, version=version) as handle:
        output = model.generate(**inputs, **options)
        stats = handle.stats
    whole = torch.stack(model.generate(**inputs, **options).logits, 1)
    method, renumbers = SparseVLM(version), version == "1.5" and name != "qwen2_5_vl"
    rows = [answer(model, method, row, items, renumbers) for row, items in alone(model, name, inputs)]
    expected = torch.stack([logits for logits, _ in rows])
    torch.testing.assert_close(torch.stack(output.logits, 1), expected, atol=1e-5, rtol=0)
    assert (whole - expected).abs().max() > 1e-3, "the pruned run must differ, or the test shows nothing"
    by_layer = [list(lengths) for lengths in zip(*(lengths for _, lengths in rows), strict=True)]
    assert [list(lengths) for lengths in stats.rows_by_layer] == by_layer
    held = [layer.keys.shape[-2] for layer in output.past_key_values.layers]
    assert held == [max(lengths) + STEPS - 1 for lengths in by_layer]
    assert sorted(held, reverse=True) == held and len(set(held)) == 4


def test_versions_are_words() -> None:
    assert METHODS.choices("sparsevlm") == {"version": ("1.5", "2.0")}
    spec = mmcompress.CompressionConfig.create('sparsevlm(keep=0.2, version="2.0")').methods[0]
    assert METHODS.build(spec.name, spec.options) == SparseVLM("2.0")
