"""Sparse reading is exact: decoding equals full attention with the entries that are not read masked by hand."""

from __future__ import annotations

import typing
from collections.abc import Sequence

import pytest
import torch
from hf.fake_devices import HERE, THERE, PretendedDevices, put_there
from hf.fake_flash import fake_flash_attention
from hf.families import FAMILIES
from hf.oracle import Entering, prompts, reference_items, whole_prompts
from hf.test_exactness import generate
from torch import Tensor
from transformers import CompileConfig, PreTrainedModel

import mmcompress
from mmcompress.budget import Budget
from mmcompress.errors import SpecError, UnsupportedError
from mmcompress.integrations.hf.sparse_stage import SparseStage
from mmcompress.registry import METHODS, POLICIES
from mmcompress.sparse_reader import Entries, Reading, SparseReader

STEPS, KEEP, TOLERANCE = 8, 10, 1e-5
OPTIONS = {"quest": "page=4, dense_layers=1"}
Choices = list[dict[int, tuple[Entries, Reading | None]]]


def readers(keep: int | float = KEEP, *more: str) -> list[str]:
    """Every policy that reads a part, with a budget."""
    names = [name for name in POLICIES.names() if issubclass(POLICIES.get(name), SparseReader)]
    return [f"{name}({', '.join(filter(None, (f'keep={keep}', OPTIONS.get(name), *more)))})" for name in names]


@pytest.fixture
def choices(monkeypatch: pytest.MonkeyPatch) -> Choices:
    """What every layer read in every pass; nothing of those that read everything."""
    seen: Choices = []
    begin, reading = SparseStage.begin, SparseStage._reading

    def begun(stage: SparseStage, run: typing.Any) -> None:
        seen.append({})
        begin(stage, run)

    def noted(
        stage: SparseStage, step: typing.Any, layer: int, query: Tensor, key: Tensor, entries: Entries
    ) -> typing.Any:
        chosen = reading(stage, step, layer, query, key, entries)
        seen[-1][layer] = entries, chosen
        return chosen

    monkeypatch.setattr(SparseStage, "begin", begun)
    monkeypatch.setattr(SparseStage, "_reading", noted)
    return seen


@torch.no_grad()
def masked(
    model: PreTrainedModel, rows: Sequence[Entering], said: Sequence[Tensor], choices: Choices, passes: Sequence[int]
) -> Tensor:
    """Logits `[rows, said, vocabulary]` of full attention that sees what was chosen in pass `passes[n]` for token n."""
    decoder: typing.Any = model.base_model.get_decoder()
    heads, logits = decoder.config.num_attention_heads, []
    for number, (entering, tokens) in enumerate(zip(rows, said, strict=True)):
        prompt, length = entering.row, len(entering.row.embeddings)
        hidden = torch.cat([prompt.embeddings, model.get_input_embeddings()(tokens)])[None]
        following = torch.arange(prompt.following, prompt.following + len(tokens))
        ids = torch.cat([prompt.positions, following.expand(*prompt.positions.shape[:-1], -1)], -1)
        rotary = decoder.rotary_emb(hidden, ids[..., None, :])
        total = hidden.shape[1]
        for layer, block in enumerate(decoder.layers):
            mask = torch.full((heads, total, total), -torch.inf).triu(1)
            for place, step in enumerate(passes, start=length):
                entries, reading = choices[step].get(layer, (None, None))
                if entries is None or reading is None:
                    continue
                assert int(entries.valid[number].sum()) == place + 1
                mask[:, place] = -torch.inf
                for head, group in enumerate(mask[:, place].unflatten(0, (reading.columns.shape[1], -1))):
                    columns = reading.columns[number, head][reading.valid[number, head]]
                    group[:, entries.number[number, columns]] = 0
            hidden = block(hidden, attention_mask=mask[None], position_embeddings=rotary, position_ids=None)
            if prompt.deepstack is not None and layer < len(prompt.deepstack):
                hidden[0, :length] += prompt.deepstack[layer]
        logits.append(model.get_output_embeddings()(decoder.norm(hidden[0, length - 1 :])))
    return torch.stack(logits)


def assert_reads(model: PreTrainedModel, rows: Sequence[Entering], output: typing.Any, choices: Choices) -> None:
    """What was generated is what full attention to the choices gives, step by step."""
    said = output.sequences[:, -STEPS:-1]
    expected = masked(model, rows, said, choices, range(1, STEPS))
    torch.testing.assert_close(torch.stack(output.logits, 1), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("spec", readers())
def test_every_reader_on_every_family(name: str, attention: str, spec: str, choices: Choices) -> None:
    model = FAMILIES[name].build(attention)
    inputs = FAMILIES[name].inputs(model, "mixed")
    plain = generate(model, inputs, STEPS)
    with mmcompress.wrap(model, kv=spec) as handle:
        output = generate(model, inputs, STEPS)
        stats = handle.stats
    assert_reads(model, whole_prompts(model, name, inputs), output, choices)
    differs = (torch.stack(output.logits) - torch.stack(plain.logits)).abs().max() > 1e-3
    assert differs, "the run must differ from one that reads everything, or the test shows nothing"
    assert not choices[0] and len(choices) == STEPS
    held = (inputs["attention_mask"].sum() + len(inputs["input_ids"]) * (STEPS - 1)) * 2
    for layer, count in enumerate(stats.kv_read):
        _, reading = choices[-1][layer]
        assert count == (held if reading is None else reading.valid.sum())
    assert min(stats.kv_read) <= len(inputs["input_ids"]) * 2 * KEEP < held


@pytest.mark.parametrize("spec", [*readers(0.3), *readers(KEEP, "compat=official")])
def test_shares_and_published_choices(spec: str, choices: Choices) -> None:
    model = FAMILIES["qwen2_5_vl"].build("sdpa")
    inputs = FAMILIES["qwen2_5_vl"].inputs(model, "mixed")
    with mmcompress.wrap(model, kv=spec):
        output = generate(model, inputs, STEPS)
    assert_reads(model, whole_prompts(model, "qwen2_5_vl", inputs), output, choices)
    _, reading = choices[-1][3]
    heads = model.base_model.get_decoder().config.num_attention_heads
    assert reading.columns.shape[1] == (heads if "official" in spec else heads // 2)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("options", ["quest(page=1, dense_layers=1", "tidaldecode(selection_layers=[1]"])
def test_choices_are_those_of_an_attention_map(name: str, options: str, choices: Choices) -> None:
    """In the first step layer 1 finds, for every query head, what the plain model's head attends to most."""
    model = FAMILIES[name].build("eager")
    inputs = FAMILIES[name].inputs(model, "mixed")
    attention = generate(model, inputs, 2, output_attentions=True).attentions[1][1][:, :, 0]
    with mmcompress.wrap(model, kv=f"{options}, keep=6, compat=official)"):
        generate(model, inputs, 2)
    reading = next(chosen for _, chosen in choices[1].values() if chosen is not None)
    assert torch.equal(reading.columns.sort().values, attention.topk(6).indices.sort().values)


@pytest.mark.parametrize("spec", readers(1000))
def test_a_budget_for_everything_changes_nothing(spec: str) -> None:
    model = FAMILIES["qwen2_5_vl"].build("sdpa")
    inputs = FAMILIES["qwen2_5_vl"].inputs(model, "mixed")
    plain = generate(model, inputs, STEPS)
    with mmcompress.wrap(model, kv=spec):
        output = generate(model, inputs, STEPS)
    assert torch.equal(torch.stack(output.logits), torch.stack(plain.logits))


@pytest.mark.parametrize("spec", readers())
def test_what_is_known_of_the_keys_grows_by_one_a_step(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And it is what would be known if it were made anew of the whole cache."""
    policy: typing.Any = POLICIES.get(spec.partition("(")[0])
    summarise, new = policy.summarise, []

    def noted(self: typing.Any, before: typing.Any, key: Tensor, entries: Entries) -> typing.Any:
        new.append(key.shape[2] - (0 if before is None else before.columns))
        return summarise(self, before, key, entries)

    model = FAMILIES["llava"].build("sdpa")
    inputs = FAMILIES["llava"].inputs(model, "mixed")
    with mmcompress.wrap(model, kv=spec) as handle:
        monkeypatch.setattr(policy, "summarise", noted)
        cache = generate(model, inputs, STEPS).past_key_values
    if summarise is SparseReader.summarise:
        assert not cache.state.reads
        return
    per_step = len(cache.state.reads)
    assert new == [inputs["input_ids"].shape[1] + 1] * per_step + [1] * per_step * (STEPS - 2)
    for layer, known in cache.state.reads.items():
        made = summarise(handle.policy, None, cache.layers[layer].keys, Entries(cache.state.mask))
        assert torch.equal(known.low, made.low) and torch.equal(known.high, made.high)


@pytest.mark.parametrize("spec", readers())
def test_later_turns_read_everything_at_once_and_then_a_part(spec: str, choices: Choices) -> None:
    """Rows of the second turn are padded in the middle."""
    model = FAMILIES["llava"].build("sdpa")
    inputs = FAMILIES["llava"].inputs(model, "mixed")
    more = torch.tensor([[9, 8, 7, 6], [0, 0, 5, 4], [0, 3, 2, 1]])
    real = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1], [0, 1, 1, 1]])
    last = torch.tensor([[11], [12], [13]])
    with mmcompress.wrap(model, kv=spec), torch.no_grad():
        first = generate(model, inputs, 3)
        mask = torch.cat([inputs["attention_mask"], torch.ones(3, 2, dtype=torch.long)], dim=1)
        turn = torch.cat([first.sequences[:, -1:], more], dim=1)
        logits = []
        for ids, valid in ((turn, torch.cat([torch.ones_like(last), real], dim=1)), (last, torch.ones_like(last))):
            mask = torch.cat([mask, valid], dim=1)
            positions = (mask.cumsum(dim=1) - 1)[:, -ids.shape[1] :]
            output = model(
                input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=first.past_key_values
            )
            logits.append(output.logits[:, -1])
    assert [len(seen) for seen in choices] == [0, 4, 4, 0, 4]
    for row, entering in enumerate(whole_prompts(model, "llava", inputs)):
        added = more[row][real[row].bool()]
        said = torch.cat([first.sequences[row, -3:], added, last[row]])
        passes = [1, 2, *[3] * (len(added) + 1), 4]
        alone: Choices = [
            {layer: (Entries(seen[0].valid[row : row + 1]), _row(seen[1], row)) for layer, seen in step.items()}
            for step in choices
        ]
        expected = masked(model, [entering], [said], alone, passes)
        torch.testing.assert_close(torch.stack(logits)[:, row], expected[0, -2:], atol=TOLERANCE, rtol=0)


def _row(reading: Reading | None, row: int) -> Reading | None:
    return None if reading is None else Reading(reading.columns[row : row + 1], reading.valid[row : row + 1])


@pytest.mark.parametrize("spec", readers())
def test_behind_compression_before_the_llm(spec: str, choices: Choices) -> None:
    model = FAMILIES["llava"].build("sdpa")
    inputs = FAMILIES["llava"].inputs(model, "mixed")
    with mmcompress.wrap(model, "uniform(keep=0.5)", kv=spec):
        output = generate(model, inputs, STEPS)
    uniform: typing.Any = METHODS.build("uniform", {})
    items = [item.item for item in reference_items(model, "llava", inputs)]
    selections = uniform.compress(items, Budget(0.5), mmcompress.types.Needs())
    assert_reads(model, prompts(model, "llava", inputs, selections, "renumber", "projected"), output, choices)


@pytest.mark.parametrize("spec", readers())
def test_behind_compression_inside_the_llm(spec: str, choices: Choices) -> None:
    """Layers behind a removal hold other entries; what was chosen before it says nothing there."""
    model = FAMILIES["llava"].build("sdpa")
    inputs = FAMILIES["llava"].inputs(model, "mixed")
    with mmcompress.wrap(model, "fastv(keep=0.5, layer=3)") as handle:
        plain = generate(model, inputs, STEPS)
    with mmcompress.wrap(model, "fastv(keep=0.5, layer=3)", kv=spec.replace(f"keep={KEEP}", "keep=1000")):
        assert torch.equal(torch.stack(generate(model, inputs, STEPS).logits), torch.stack(plain.logits))
    choices.clear()
    with mmcompress.wrap(model, "fastv(keep=0.5, layer=3)", kv=spec) as handle:
        output = generate(model, inputs, STEPS)
        left = handle.stats.rows_by_layer
    assert (torch.stack(output.logits) - torch.stack(plain.logits)).abs().max() > 1e-3
    for step, seen in enumerate(choices[1:], start=1):
        for layer, (entries, reading) in seen.items():
            assert entries.held == [count + step for count in left[layer]]
            if reading is not None:
                valid = entries.valid[:, None].expand(-1, reading.columns.shape[1], -1).gather(2, reading.columns)
                assert valid[reading.valid].all()
        assert seen[3][1] is not None and seen[3][1].columns.max() < seen[3][0].valid.shape[1]


def _alone(model: PreTrainedModel, inputs: dict, row: int) -> dict:
    """One row without its padding."""
    valid = inputs["attention_mask"][row].bool()
    single = {"input_ids": inputs["input_ids"][row : row + 1, valid]}
    single["attention_mask"] = torch.ones_like(single["input_ids"])
    images = (inputs["input_ids"] == model.config.image_token_id).sum(1) // 16
    first, count = int(images[:row].sum()), int(images[row])
    return single | ({"pixel_values": inputs["pixel_values"][first : first + count]} if count else {})


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("spec", [*readers(), *readers(0.3)])
def test_rows_and_beams_do_not_depend_on_their_neighbours(spec: str, beams: int) -> None:
    model = FAMILIES["llava"].build("sdpa")
    inputs = FAMILIES["llava"].inputs(model, "mixed")
    with mmcompress.wrap(model, kv=spec):
        together = generate(model, inputs, STEPS, num_beams=beams)
        for layer, known in together.past_key_values.state.reads.items():
            keys = together.past_key_values.layers[layer].keys
            assert known.low.shape[0] == len(keys) == 3 * beams
        for row in range(3):
            alone = generate(model, _alone(model, inputs, row), STEPS, num_beams=beams)
            assert alone.sequences[0, -STEPS:].tolist() == together.sequences[row, -STEPS:].tolist()
            if beams == 1:
                logits = torch.stack(alone.logits, 1)[0], torch.stack(together.logits, 1)[row]
                torch.testing.assert_close(*logits, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("spec", readers())
def test_what_is_known_follows_the_cache(spec: str) -> None:
    """Rows that are reordered, repeated or chosen, and tokens that are taken off again."""
    model = FAMILIES["llava"].build("sdpa")
    inputs = FAMILIES["llava"].inputs(model, "mixed")
    with mmcompress.wrap(model, kv=spec) as handle, torch.no_grad():
        cache = generate(model, inputs, STEPS).past_key_values
        cache.reorder_cache(torch.tensor([2, 0, 0]))
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([0, 2, 5]))
        rows = torch.tensor([2, 0, 0])
        for layer, known in cache.state.reads.items():
            made = handle.policy.summarise(None, cache.layers[layer].keys, Entries(cache.state.mask))
            pages = made.low.shape[2]
            assert torch.equal(known.low[:, :, :pages], made.low) and torch.equal(known.high[:, :, :pages], made.high)
        cache.crop(-4)
        short = generate(model, inputs, STEPS - 4).past_key_values
        short.reorder_cache(rows)
        mask = torch.cat([inputs["attention_mask"], torch.ones(3, STEPS - 4)], dim=1)[rows]
        token = torch.tensor([[7]] * 3)
        logits = [model(input_ids=token, attention_mask=mask, past_key_values=part).logits for part in (cache, short)]
    torch.testing.assert_close(*logits, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("spec", readers())
def test_static_caches_and_flash_attention(spec: str) -> None:
    model = FAMILIES["llava"].build("sdpa")
    inputs = FAMILIES["llava"].inputs(model, "mixed")
    with mmcompress.wrap(model, kv=spec):
        expected = torch.stack(generate(model, inputs, STEPS).logits)
        static = torch.stack(generate(model, inputs, STEPS, cache_implementation="static").logits)
    with fake_flash_attention(model), mmcompress.wrap(model, kv=spec):
        flash = torch.stack(generate(model, inputs, STEPS).logits)
    torch.testing.assert_close(static, expected, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(flash, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("spec", readers())
def test_compiled_steps(spec: str) -> None:
    """As `generate` compiles them with a static cache on a GPU."""
    model = FAMILIES["llava"].build("sdpa")
    inputs = FAMILIES["llava"].inputs(model, "mixed")
    compile_config = CompileConfig(fullgraph=False, backend="eager", mode=None)
    compile_config._compile_all_devices = True
    torch.compiler.reset()
    with mmcompress.wrap(model, kv=spec):
        expected = generate(model, inputs, STEPS)
        output = generate(model, inputs, STEPS, cache_implementation="static", compile_config=compile_config)
    torch.compiler.reset()
    torch.testing.assert_close(torch.stack(output.logits), torch.stack(expected.logits), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("method", [None, "fastv(keep=0.5, layer=3)"])
@pytest.mark.parametrize("spec", readers())
def test_layers_on_two_devices(spec: str, method: str | None) -> None:
    model = FAMILIES["llava"].build("sdpa")
    inputs = FAMILIES["llava"].inputs(model, "mixed")
    decoder: typing.Any = model.base_model.get_decoder()
    with mmcompress.wrap(model, method, kv=spec):
        expected = generate(model, inputs, STEPS)
        for module in (*decoder.layers[2:], decoder.norm, model.lm_head):
            put_there(module)
        model.lm_head.register_forward_hook(lambda module, args, output: output.to(HERE))
        with PretendedDevices():
            output = generate(model, inputs, STEPS)
            assert output.past_key_values.layers[2].keys.device == THERE
    torch.testing.assert_close(torch.stack(output.logits), torch.stack(expected.logits), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("spec", readers())
def test_the_prompt_is_read_in_full_and_unwrapping_gives_everything_back(spec: str) -> None:
    model = FAMILIES["llava"].build("sdpa")
    inputs = FAMILIES["llava"].inputs(model, "mixed")
    configs = [layer.self_attn.config for layer in model.model.language_model.layers]
    with torch.no_grad():
        plain = model(**inputs).logits
        with mmcompress.wrap(model, "fastv(keep=0.5)", kv=spec):
            generate(model, inputs, 2)
        with mmcompress.wrap(model, kv=spec):
            real = inputs["attention_mask"].bool()
            assert torch.equal(model(**inputs).logits[real], plain[real])
            with pytest.raises(UnsupportedError, match="use_cache=False"):
                model(**inputs, use_cache=False)
        layers = zip(model.model.language_model.layers, configs, strict=True)
        assert all(layer.self_attn.config is config for layer, config in layers)
        assert torch.equal(model(**inputs).logits, plain)


@pytest.mark.parametrize(
    ("kv", "message"),
    [
        ("quest", "quest needs keep="),
        ("quest(keep=64, dense_layers=4)", "leaves none of the LLM's 4 layers"),
        ("tidaldecode(keep=64, selection_layers=[1, 9])", "layers 0..3"),
        ("tidaldecode(keep=64, selection_layers=[3])", "no layer behind the last"),
    ],
)
def test_what_cannot_be_is_refused_and_leaves_nothing(kv: str, message: str) -> None:
    model = FAMILIES["llava"].build("sdpa")
    with pytest.raises(SpecError, match=message):
        mmcompress.wrap(model, "fastv(keep=0.5)", kv=kv)
    mmcompress.wrap(model, "uniform", keep=0.5).unwrap()


@pytest.mark.parametrize("spec", readers())
def test_other_attention_and_other_policies_caches_are_refused(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = FAMILIES["llava"].build("sdpa")
    inputs = FAMILIES["llava"].inputs(model, "mixed")
    with mmcompress.wrap(model, kv="keydiff(keep=10)"):
        cache = generate(model, inputs, 2).past_key_values
    with mmcompress.wrap(model, kv=spec), pytest.raises(UnsupportedError, match="took entries out of this cache"):
        model(input_ids=torch.tensor([[7]] * 3), past_key_values=cache)
    config: typing.Any = model.base_model.get_decoder().config
    monkeypatch.setattr(config, "_attn_implementation_internal", "flex_attention")
    with pytest.raises(UnsupportedError, match="not built for flex_attention"):
        mmcompress.wrap(model, kv=spec)
