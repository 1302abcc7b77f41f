"""KV policies are exact: generation equals full attention with the evicted entries masked by hand."""

from __future__ import annotations

import typing

import pytest
import torch
from hf.families import FAMILIES
from hf.oracle import Entering, prompts, reference_items, whole_prompts
from torch import Tensor
from transformers import PreTrainedModel

import mmcompress
from mmcompress.budget import Budget
from mmcompress.errors import SpecError, UnsupportedError
from mmcompress.integrations.hf.cache import Held
from mmcompress.integrations.hf.kv_stage import KVStage
from mmcompress.kv_policy import Evictor
from mmcompress.registry import METHODS, POLICIES

STEPS, KEEP, TOLERANCE = 6, 10, 1e-5
# A mask cannot show what merges.
OPTIONS = {"snapkv": "window=4", "pyramidkv": "window=4", "ems": "window=4, merged=0", "lookm": "merge=none"}
Snapshots = list[dict[int, Held]]


def applied() -> list[str]:
    """Every policy that this engine applies, with a budget."""
    specs = []
    for name in POLICIES.names():
        policy: typing.Any = POLICIES.build(name, {})
        if not isinstance(policy, Evictor) or policy.needs().masses:
            continue
        if type(policy).head_budgets is Evictor.head_budgets and policy.positions == "original":
            specs.append(f"{name}({', '.join(filter(None, (f'keep={KEEP}', OPTIONS.get(name))))})")
    return specs


@pytest.fixture
def snapshots(monkeypatch: pytest.MonkeyPatch) -> Snapshots:
    """What every layer held behind every pass."""
    seen: Snapshots = []
    begin, after = KVStage.begin, KVStage._after_attention

    def begun(stage: KVStage, run: typing.Any) -> None:
        seen.append({})
        begin(stage, run)

    def noted(stage: KVStage, layer: int, *args: typing.Any) -> None:
        run = stage._local.run
        after(stage, layer, *args)
        if run is not None:
            seen[-1][layer] = run.state.held[layer]

    monkeypatch.setattr(KVStage, "begin", begun)
    monkeypatch.setattr(KVStage, "_after_attention", noted)
    return seen


@torch.no_grad()
def masked(model: PreTrainedModel, rows: list[Entering], sequences: Tensor, snapshots: Snapshots) -> Tensor:
    """Logits `[rows, steps, vocabulary]` of what was said, each row by itself, where nothing is ever evicted."""
    decoder: typing.Any = model.base_model.get_decoder()
    heads, logits = decoder.config.num_attention_heads, []
    for number, (entering, said) in enumerate(zip(rows, sequences, strict=True)):
        prompt, length = entering.row, len(entering.row.embeddings)
        hidden = torch.cat([prompt.embeddings, model.get_input_embeddings()(said[:-1])])[None]
        following = torch.arange(prompt.following, prompt.following + len(said) - 1)
        ids = torch.cat([prompt.positions, following.expand(*prompt.positions.shape[:-1], -1)], -1)
        rotary = decoder.rotary_emb(hidden, ids[..., None, :])
        total = hidden.shape[1]
        for layer, block in enumerate(decoder.layers):
            mask = torch.full((heads, total, total), -torch.inf).triu(1)
            for step in range(len(said) - 1):
                held = snapshots[step][layer]
                row = mask[:, length + step]
                row[:] = -torch.inf
                row[:, length + step] = 0
                groups = row.unflatten(0, (held.place.shape[1], -1))
                for head in range(len(groups)):
                    groups[head][:, held.place[number, head][held.valid[number]]] = 0
            hidden = block(hidden, attention_mask=mask[None], position_embeddings=rotary, position_ids=None)
            if prompt.deepstack is not None and layer < len(prompt.deepstack):
                hidden[0, :length] += prompt.deepstack[layer]
        logits.append(model.get_output_embeddings()(decoder.norm(hidden[0, length - 1 :])))
    return torch.stack(logits)


def generate(model: PreTrainedModel, inputs: dict, steps: int = STEPS, **options: typing.Any) -> typing.Any:
    options = {"max_new_tokens": steps, "min_new_tokens": steps, "do_sample": False, **options}
    return model.generate(**inputs, **options, return_dict_in_generate=True, output_logits=True)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("spec", applied())
def test_every_policy_on_every_family(name: str, spec: str, snapshots: Snapshots) -> None:
    family = FAMILIES[name]
    model = family.build("sdpa")
    inputs = family.inputs(model, "mixed")
    with mmcompress.wrap(model, kv=spec) as handle:
        output = generate(model, inputs)
        stats = handle.stats
    logits = torch.stack(output.logits, 1)
    expected = masked(model, whole_prompts(model, name, inputs), output.sequences[:, -STEPS:], snapshots)
    torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0)
    layers = output.past_key_values.layers
    assert {layer.get_seq_length() for layer in layers} == {inputs["input_ids"].shape[1] + STEPS - 1}
    assert sum(layer.keys.nbytes + layer.values.nbytes for layer in layers) == stats.kv_held
    differs = (torch.stack(generate(model, inputs).logits, 1) - logits).abs().max() > 1e-3
    assert differs, "the run must differ from one that evicts nothing, or the test shows nothing"


@pytest.mark.parametrize("spec", applied())
def test_eager_attention_and_long_answers(spec: str, snapshots: Snapshots) -> None:
    model = FAMILIES["llava"].build("eager")
    inputs = FAMILIES["llava"].inputs(model, "images")
    steps, policy = 60, POLICIES.build(spec.partition("(")[0], {})
    with mmcompress.wrap(model, kv=spec):
        output = generate(model, inputs, steps)
    expected = masked(model, whole_prompts(model, "llava", inputs), output.sequences[:, -steps:], snapshots)
    torch.testing.assert_close(torch.stack(output.logits, 1), expected, atol=TOLERANCE, rtol=0)
    if policy.schedule == "step":
        held = {snapshot[layer].valid.shape[1] for snapshot in snapshots for layer in snapshot}
        assert held == {KEEP}


@pytest.mark.parametrize("spec", applied())
def test_a_budget_for_everything_changes_nothing(spec: str) -> None:
    model = FAMILIES["qwen2_5_vl"].build("sdpa")
    inputs = FAMILIES["qwen2_5_vl"].inputs(model, "mixed")
    plain = generate(model, inputs)
    with mmcompress.wrap(model, kv=spec.replace(f"keep={KEEP}", "keep=1000")):
        output = generate(model, inputs)
    assert torch.equal(torch.stack(output.logits), torch.stack(plain.logits))


@pytest.mark.parametrize("method", ["uniform(keep=0.5)", "fastv(keep=0.5)"])
def test_behind_visual_compression(method: str, snapshots: Snapshots) -> None:
    family = FAMILIES["llava"]
    model = family.build("sdpa")
    inputs = family.inputs(model, "mixed")
    with mmcompress.wrap(model, method, kv="keydiff(keep=0.5)") as handle:
        output = generate(model, inputs)
        left = [layer.keys.shape[2] for layer in output.past_key_values.layers]
        entered = max(handle.stats.row_kept)
        later = max(handle.stats.rows_by_layer[-1])
    assert left[0] == entered // 2 + STEPS - 1 and left[-1] == later // 2 + STEPS - 1
    if "uniform" in method:
        items = [item.item for item in reference_items(model, "llava", inputs)]
        uniform: typing.Any = METHODS.build("uniform", {})
        selections = uniform.compress(items, Budget(0.5), mmcompress.types.Needs())
        rows = prompts(model, "llava", inputs, selections, "renumber", "projected")
        expected = masked(model, rows, output.sequences[:, -STEPS:], snapshots)
        torch.testing.assert_close(torch.stack(output.logits, 1), expected, atol=TOLERANCE, rtol=0)


def test_unwrapping_gives_layers_back_that_two_stages_read() -> None:
    model = FAMILIES["llava"].build("eager")
    configs = [layer.self_attn.config for layer in model.model.language_model.layers]
    inputs = FAMILIES["llava"].inputs(model, "mixed")
    with mmcompress.wrap(model, "fastv(keep=0.5)", kv="snapkv(keep=8, window=4)"):
        generate(model, inputs, 2)
    assert all(
        layer.self_attn.config is config
        for layer, config in zip(model.model.language_model.layers, configs, strict=True)
    )


@pytest.mark.parametrize("scope", ["visual", "text"])
def test_what_is_out_of_scope_stays(scope: str, snapshots: Snapshots) -> None:
    family = FAMILIES["llava"]
    model = family.build("sdpa")
    inputs = family.inputs(model, "mixed")
    visual = (inputs["input_ids"] == model.config.image_token_id).sum(1)
    text = inputs["attention_mask"].sum(1) - visual
    with mmcompress.wrap(model, kv=f"keydiff(keep=2, scope={scope})"):
        generate(model, inputs, 1)
    scoped, others = (visual, text) if scope == "visual" else (text, visual)
    for held in snapshots[0].values():
        assert held.valid.sum(1).tolist() == (others + scoped.clamp(max=2)).tolist()
        kept = (held.visual & held.valid[:, None]).sum(2)
        wanted = visual.clamp(max=2) if scope == "visual" else visual
        assert (kept == wanted[:, None]).all()


def test_later_turns_count_on_and_cannot_go_on_without_a_policy(snapshots: Snapshots) -> None:
    """The second turn sees what the first left, and its own tokens; then entries go again."""
    model = FAMILIES["llava"].build("sdpa")
    inputs = FAMILIES["llava"].inputs(model, "single")
    row = {name: value[:1] for name, value in inputs.items()}
    row["input_ids"] = row["input_ids"][:, row["attention_mask"][0].bool()]
    row["attention_mask"] = torch.ones_like(row["input_ids"])
    with mmcompress.wrap(model, kv="keydiff(keep=8)"):
        first = generate(model, row, 3)
        ids = torch.cat([first.sequences, torch.tensor([[5, 6, 7, 8]])], dim=1)
        held = [layer.keys.shape[2] for layer in first.past_key_values.layers]
        again = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        second = model(
            input_ids=ids[:, -5:], past_key_values=first.past_key_values, attention_mask=again["attention_mask"]
        )
        assert held == [8 + 2] * 4 and {layer.keys.shape[2] for layer in first.past_key_values.layers} == {8}
    decoder: typing.Any = model.base_model.get_decoder()
    (entering,) = whole_prompts(model, "llava", row)
    length = len(entering.row.embeddings)
    said = torch.cat([first.sequences[0, -3:], torch.tensor([5, 6, 7, 8])])
    hidden = torch.cat([entering.row.embeddings, model.get_input_embeddings()(said)])[None]
    rotary = decoder.rotary_emb(hidden, torch.arange(hidden.shape[1])[None])
    heads, total = decoder.config.num_attention_heads, hidden.shape[1]
    with torch.no_grad():
        for layer, block in enumerate(decoder.layers):
            mask = torch.full((heads, total, total), -torch.inf).triu(1)
            for query in range(length, total):
                before = snapshots[min(query - length, 2)][layer]
                own = length + min(query - length, 2)
                mask[:, query, :own] = -torch.inf
                for head, row_mask in enumerate(mask[:, query].unflatten(0, (before.place.shape[1], -1))):
                    row_mask[:, before.place[0, head][before.valid[0]]] = 0
            hidden = block(hidden, attention_mask=mask[None], position_embeddings=rotary, position_ids=None)
        expected = model.get_output_embeddings()(decoder.norm(hidden[0, -5:]))
    torch.testing.assert_close(second.logits[0], expected, atol=TOLERANCE, rtol=0)
    with mmcompress.wrap(model, "uniform", keep=0.5), pytest.raises(UnsupportedError, match="took entries out"):
        model(input_ids=ids[:, -1:], past_key_values=first.past_key_values)


def test_assisted_decoding_is_refused() -> None:
    model = FAMILIES["llava"].build("sdpa")
    inputs = FAMILIES["llava"].inputs(model, "single")
    row = {name: value[:1] for name, value in inputs.items()}
    with mmcompress.wrap(model, kv="keydiff(keep=8)"), pytest.raises(UnsupportedError, match="cannot be cropped"):
        generate(model, row, prompt_lookup_num_tokens=2)


def test_beams_follow_their_rows() -> None:
    model = FAMILIES["llava"].build("sdpa")
    inputs = FAMILIES["llava"].inputs(model, "mixed")
    plain = generate(model, inputs, num_beams=3)
    with mmcompress.wrap(model, kv="h2o(keep=1000)"):
        assert torch.equal(generate(model, inputs, num_beams=3).sequences, plain.sequences)
    with mmcompress.wrap(model, kv=f"h2o(keep={KEEP})"):
        together = generate(model, inputs, num_beams=3)
        assert {layer.keys.shape[2] for layer in together.past_key_values.layers} == {KEEP}
        for row in range(3):
            valid = inputs["attention_mask"][row].bool()
            single = {"input_ids": inputs["input_ids"][row : row + 1, valid]}
            count = int((single["input_ids"] == model.config.image_token_id).sum()) // 16
            first = int((inputs["input_ids"][:row] == model.config.image_token_id).sum()) // 16
            if count:
                single["pixel_values"] = inputs["pixel_values"][first : first + count]
            single["attention_mask"] = torch.ones_like(single["input_ids"])
            alone = generate(model, single, num_beams=3)
            assert alone.sequences[0, -STEPS:].tolist() == together.sequences[row, -STEPS:].tolist()


@pytest.mark.parametrize(
    ("kv", "message"),
    [
        ("snapkv", "snapkv needs keep="),
        ("adakv(keep=8)", "heads hold different numbers"),
        ("streamingllm(keep=8, compat=official)", "numbers entries anew"),
        ("snapvk(keep=8)", "Did you mean 'snapkv'"),
        ("snapkv(keep=0.5, windw=3)", "windw"),
    ],
)
def test_what_cannot_be_is_refused_and_leaves_nothing(kv: str, message: str) -> None:
    model = FAMILIES["llava"].build("sdpa")
    with pytest.raises((SpecError, UnsupportedError), match=message):
        mmcompress.wrap(model, kv=kv)
    mmcompress.wrap(model, "uniform", keep=0.5).unwrap()


def test_static_caches_and_budgets_in_force_are_refused() -> None:
    model = FAMILIES["llava"].build("sdpa")
    inputs = FAMILIES["llava"].inputs(model, "single")
    with mmcompress.wrap(model, kv="keydiff(keep=5)") as handle:
        with pytest.raises(UnsupportedError, match="static ones"):
            generate(model, inputs, cache_implementation="static")
        with pytest.raises(SpecError, match="wrap it again"):
            handle.set(keep=3)
        generate(model, inputs)
