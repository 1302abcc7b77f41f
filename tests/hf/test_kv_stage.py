"""KV policies are exact: generation equals full attention with the evicted entries masked by hand."""

from __future__ import annotations

import typing

import pytest
import torch
from hf.fake_devices import HERE, PretendedDevices, put_there
from hf.families import FAMILIES
from hf.generating import generating
from hf.oracle import Entering, prompts, reference_items, whole_prompts
from torch import Tensor
from transformers import PreTrainedModel

import mmcompress
from mmcompress.budget import Budget
from mmcompress.errors import SpecError, UnsupportedError
from mmcompress.integrations.hf.cache import Held
from mmcompress.integrations.hf.kv_stage import KVStage
from mmcompress.kv_policy import Evictor, KVRow
from mmcompress.policies.expected_attention import ExpectedAttention
from mmcompress.policies.tgv_kv import TGVKV
from mmcompress.registry import METHODS, POLICIES
from mmcompress.spec import Spec

STEPS, KEEP, TOLERANCE = 6, 10, 1e-5
generate = generating(STEPS)
# A mask cannot show what merges.
OPTIONS = {
    "snapkv": "window=4",
    "adakv": "window=4",
    "pyramidkv": "window=4",
    "ems": "window=4, merged=0",
    "lookm": "merge=none",
}
Snapshots = list[dict[int, Held]]


def applied() -> list[str]:
    """Every policy that this engine applies, with a budget."""
    specs = []
    for name in POLICIES.names():
        policy: typing.Any = POLICIES.build(name, {})
        if isinstance(policy, Evictor) and not policy.info.requires:
            specs.append(f"{name}({', '.join(filter(None, (f'keep={KEEP}', OPTIONS.get(name))))})")
    return specs


@pytest.fixture
def snapshots(monkeypatch: pytest.MonkeyPatch) -> Snapshots:
    """What every layer held behind every pass."""
    seen: Snapshots = []
    begin, finish = KVStage.begin, KVStage.finish

    def begun(stage: KVStage, run: typing.Any) -> None:
        seen.append({})
        begin(stage, run)

    def noted(stage: KVStage) -> None:
        run = stage._local.run
        finish(stage)
        assert run is not None
        seen[-1].update({layer: held.complete() for layer, held in run.state.held.items()})

    monkeypatch.setattr(KVStage, "begin", begun)
    monkeypatch.setattr(KVStage, "finish", noted)
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
                    groups[head][:, held.place[number, head][held.valid[number, head]]] = 0
            hidden = block(hidden, attention_mask=mask[None], position_embeddings=rotary, position_ids=None)
            if prompt.deepstack is not None and layer < len(prompt.deepstack):
                hidden[0, :length] += prompt.deepstack[layer]
        logits.append(model.get_output_embeddings()(decoder.norm(hidden[0, length - 1 :])))
    return torch.stack(logits)


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


@pytest.mark.parametrize("spec", [*applied(), f"h2o(keep={KEEP}, every=8)", f"keydiff(keep={KEEP}, schedule=step)"])
def test_eager_attention_and_long_answers(spec: str, snapshots: Snapshots) -> None:
    model = FAMILIES["llava"].build("eager")
    inputs = FAMILIES["llava"].inputs(model, "images")
    steps, policy = 200, POLICIES.build(Spec.parse(spec).name, Spec.parse(spec).options)
    with mmcompress.wrap(model, kv=spec):
        output = generate(model, inputs, steps)
    expected = masked(model, whole_prompts(model, "llava", inputs), output.sequences[:, -steps:], snapshots)
    torch.testing.assert_close(torch.stack(output.logits, 1), expected, atol=TOLERANCE, rtol=0)
    if policy.schedule == "step":
        held = [sum(layer.valid[0].sum(1).float().mean() for layer in snapshot.values()) for snapshot in snapshots]
        slack = policy.every - 1
        assert {float(count) for count in held} == {(KEEP + extra) * 4.0 for extra in range(slack + 1)}


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


def counted() -> tuple[PreTrainedModel, dict[str, Tensor], Tensor, Tensor]:
    """A model, a mixed batch, and how many of each row's tokens are visual and how many are not."""
    model = FAMILIES["llava"].build("sdpa")
    inputs = FAMILIES["llava"].inputs(model, "mixed")
    visual = (inputs["input_ids"] == model.config.image_token_id).sum(1)
    return model, inputs, visual, inputs["attention_mask"].sum(1) - visual


@pytest.mark.parametrize("scope", ["visual", "text"])
def test_what_is_out_of_scope_stays(scope: str, snapshots: Snapshots) -> None:
    model, inputs, visual, text = counted()
    with mmcompress.wrap(model, kv=f"keydiff(keep=2, scope={scope})"):
        generate(model, inputs, 1)
    scoped, others = (visual, text) if scope == "visual" else (text, visual)
    for held in snapshots[0].values():
        assert held.valid[:, 0].sum(1).tolist() == (others + scoped.clamp(max=2)).tolist()
        kept = (held.visual & held.valid).sum(2)
        wanted = visual.clamp(max=2) if scope == "visual" else visual
        assert (kept == wanted[:, None]).all()


@pytest.mark.parametrize("spec", ["h2o(keep=4, scope=visual)", "keydiff(keep=4, scope=visual, schedule=step)"])
def test_what_is_generated_is_text_on_top_of_a_visual_budget(spec: str, snapshots: Snapshots) -> None:
    model, inputs, visual, text = counted()
    with mmcompress.wrap(model, kv=spec):
        said = generate(model, inputs, 20).sequences.shape[1] - inputs["input_ids"].shape[1]
    for held in snapshots[-1].values():
        assert (held.visual & held.valid).sum(2).tolist() == visual.clamp(max=4)[:, None].expand(-1, 2).tolist()
        assert held.valid[:, 0].sum(1).tolist() == (text + visual.clamp(max=4) + said - 1).tolist()


@pytest.mark.parametrize("spec", ["keydiff(keep=8)", "adakv(keep=8, window=4)", "tgv-kv(keep=8)", "h2o(keep=8)"])
def test_later_turns_count_on_and_cannot_go_on_without_a_policy(spec: str, snapshots: Snapshots) -> None:
    """The second turn sees what the first left, and its own tokens; then entries go again."""
    model = FAMILIES["llava"].build("sdpa")
    inputs = FAMILIES["llava"].inputs(model, "single")
    row = {name: value[:1] for name, value in inputs.items()}
    row["input_ids"] = row["input_ids"][:, row["attention_mask"][0].bool()]
    row["attention_mask"] = torch.ones_like(row["input_ids"])
    with mmcompress.wrap(model, kv=spec):
        first = generate(model, row, 3)
        ids = torch.cat([first.sequences, torch.tensor([[5, 6, 7, 8]])], dim=1)
        again = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        second = model(
            input_ids=ids[:, -5:], past_key_values=first.past_key_values, attention_mask=again["attention_mask"]
        )
    grows = 0 if "h2o" in spec or "tgv" in spec else 2
    for held, most in ((snapshots[2], 8 + grows), (snapshots[3], 8)):
        assert sum(int(layer.valid.sum()) for layer in held.values()) == sum(
            most * layer.valid.shape[1] for layer in held.values()
        )
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
                    row_mask[:, before.place[0, head][before.valid[0, head]]] = 0
            hidden = block(hidden, attention_mask=mask[None], position_embeddings=rotary, position_ids=None)
        expected = model.get_output_embeddings()(decoder.norm(hidden[0, -5:]))
    torch.testing.assert_close(second.logits[0], expected, atol=TOLERANCE, rtol=0)
    with mmcompress.wrap(model, "uniform", keep=0.5), pytest.raises(UnsupportedError, match="took entries out"):
        model(input_ids=ids[:, -1:], past_key_values=first.past_key_values)


def test_assisted_decoding_is_refused() -> None:
    model = FAMILIES["llava"].build("sdpa")
    inputs = FAMILIES["llava"].inputs(model, "single")
    row = {name: value[:1] for name, value in inputs.items()}
    with mmcompress.wrap(model, kv="keydiff(keep=8)"), pytest.raises(UnsupportedError, match="leave prompt_lookup"):
        generate(model, row, prompt_lookup_num_tokens=2)


@pytest.mark.parametrize("spec", [f"h2o(keep={KEEP})", f"tgv-kv(keep={KEEP})", f"adakv(keep={KEEP}, window=4)"])
def test_beams_follow_their_rows(spec: str) -> None:
    model = FAMILIES["llava"].build("sdpa")
    inputs = FAMILIES["llava"].inputs(model, "mixed")
    plain = generate(model, inputs, num_beams=3)
    with mmcompress.wrap(model, kv=spec.replace(f"keep={KEEP}", "keep=1000")):
        assert torch.equal(generate(model, inputs, num_beams=3).sequences, plain.sequences)
    with mmcompress.wrap(model, kv=spec):
        together = generate(model, inputs, num_beams=3)
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
        ("adakv(keep=8)", "adakv: 32 entries always stay"),
        ("h2o(keep=8, every=0)", "must be at least 1"),
        ("snapkv(keep=64, every=4)", "behind the prompt only"),
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


@pytest.mark.parametrize("spec", [f"lookm(keep={KEEP})", f"ems(keep={KEEP}, window=4, threshold=0.1)"])
def test_merging_policies_merge_what_a_plain_cache_holds(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a prompt is read nothing has gone yet, so all layers compute what they compute without a policy."""
    policy: typing.Any = POLICIES.get(Spec.parse(spec).name)
    hold, merged = policy.hold, []

    def noted(self: typing.Any, view: KVRow, kept: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        merged.append((view, hold(self, view, kept)))
        return merged[-1][1]

    monkeypatch.setattr(policy, "hold", noted)
    model = FAMILIES["llava"].build("sdpa")
    inputs = FAMILIES["llava"].inputs(model, "mixed")
    with torch.no_grad():
        plain = model(**inputs).past_key_values
        with mmcompress.wrap(model, kv=spec):
            cache = model(**inputs).past_key_values
    rows, changed = inputs["attention_mask"].bool(), 0
    for number, (view, held) in enumerate(merged):
        layer, row = divmod(number, len(rows))
        for name, part, states in zip(("keys", "values"), held, (view.key, view.value), strict=True):
            whole = getattr(plain.layers[layer], name)[row][:, rows[row]]
            assert view.layer == layer and torch.equal(states, whole)
            assert torch.equal(getattr(cache.layers[layer], name)[row, :, -len(part[0]) :], torch.stack(part))
            changed += int((torch.stack(part)[:, :, None] != whole[:, None]).any(-1).all(-1).sum())
    assert len(merged) == 4 * len(rows) and changed > 10


@torch.no_grad()
def renumbered(model: PreTrainedModel, entering: Entering, said: Tensor, snapshots: Snapshots, number: int) -> Tensor:
    """Logits of what was said where keys are turned, at every step, to their place among what is held."""
    decoder: typing.Any = model.base_model.get_decoder()
    length, config = len(entering.row.embeddings), decoder.config
    hidden = torch.cat([entering.row.embeddings, model.get_input_embeddings()(said[:-1])])
    total, dim = len(hidden), config.hidden_size // config.num_attention_heads

    def turned(states: Tensor, places: Tensor) -> Tensor:
        cosine, sine = (part[0] for part in decoder.rotary_emb(hidden[None], places[None]))
        first, second = states.chunk(2, dim=-1)
        return states * cosine + torch.cat([-second, first], dim=-1) * sine

    for layer, block in enumerate(decoder.layers):
        attention, normed = block.self_attn, block.input_layernorm(hidden)
        query, key, value = (
            project(normed).view(total, -1, dim).transpose(0, 1)
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        group = len(query) // len(key)
        outputs = []
        for token in range(total):
            held = None if token < length else snapshots[token - length][layer]
            heads = []
            for head in range(len(query)):
                here = torch.arange(token)
                if held is not None:
                    here = held.place[number, head // group][held.valid[number, head // group]]
                here = torch.cat([here, torch.tensor([token])])
                places = torch.arange(len(here))
                keys = turned(key[head // group][here], places)
                logits = keys @ turned(query[head, token][None], places[-1:])[0] * dim**-0.5
                heads.append(logits.softmax(0) @ value[head // group][here])
            outputs.append(torch.cat(heads))
        hidden = hidden + attention.o_proj(torch.stack(outputs))
        hidden = hidden + block.mlp(block.post_attention_layernorm(hidden))
    return model.get_output_embeddings()(decoder.norm(hidden[length - 1 :]))


def test_positions_may_be_places_in_the_cache(snapshots: Snapshots) -> None:
    model = FAMILIES["llava"].build("sdpa")
    inputs = FAMILIES["llava"].inputs(model, "mixed")
    with mmcompress.wrap(model, kv=f"streamingllm(keep={KEEP}, sinks=2, compat=official)"):
        output = generate(model, inputs, 12)
    for number, entering in enumerate(whole_prompts(model, "llava", inputs)):
        expected = renumbered(model, entering, output.sequences[number, -12:], snapshots, number)
        torch.testing.assert_close(torch.stack(output.logits, 1)[number], expected, atol=TOLERANCE, rtol=0)


def test_what_positions_cannot_be_places_of_is_refused() -> None:
    kv = f"streamingllm(keep={KEEP}, compat=official)"
    with pytest.raises(UnsupportedError, match="M-RoPE"):
        mmcompress.wrap(FAMILIES["qwen2_5_vl"].build("sdpa"), kv=kv)
    for method, positions in (("fastv(keep=0.5)", None), ("uniform(keep=0.5)", "original")):
        model = FAMILIES["llava"].build("sdpa")
        with pytest.raises(SpecError, match="by its place"):
            mmcompress.wrap(model, method, kv=kv, positions=positions)
        mmcompress.wrap(model, "uniform", keep=0.5).unwrap()


def test_generated_tokens_can_be_cropped_while_nothing_behind_the_prompt_went() -> None:
    model = FAMILIES["llava"].build("sdpa")
    inputs = FAMILIES["llava"].inputs(model, "mixed")
    with mmcompress.wrap(model, kv=f"keydiff(keep={KEEP})"):
        cache = generate(model, inputs, 4).past_key_values
        short = generate(model, inputs, 2).past_key_values
        cache.crop(-2)
        next_token = {"input_ids": torch.tensor([[7]] * 3), "attention_mask": torch.ones(3, 99)}
        next_token["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones(3, 2)], dim=1)
        logits = [model(**next_token, past_key_values=part).logits for part in (cache, short)]
        torch.testing.assert_close(*logits, atol=TOLERANCE, rtol=0)
        with pytest.raises(UnsupportedError, match="cannot crop"):
            cache.crop(-10)
    with mmcompress.wrap(model, kv=f"h2o(keep={KEEP})"):
        cache = generate(model, inputs, 4).past_key_values
        with pytest.raises(UnsupportedError, match="cannot crop"):
            cache.crop(-1)


def test_a_cache_of_which_only_later_layers_lost_entries_cannot_be_cropped_into() -> None:
    model = FAMILIES["llava"].build("sdpa")
    inputs = FAMILIES["llava"].inputs(model, "mixed")
    with mmcompress.wrap(model, kv="pyramidkv(keep=24, window=4)"):
        cache = generate(model, inputs, 2).past_key_values
        lengths = [layer.keys.shape[2] for layer in cache.layers]
        assert lengths[0] == inputs["input_ids"].shape[1] + 1 > lengths[-1]
        with pytest.raises(UnsupportedError, match="cannot crop"):
            cache.crop(-5)


def test_queries_before_rotation_are_those_of_the_projection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the rotary embedding scales attention, as YaRN's does."""
    model = FAMILIES["llava"].build("sdpa")
    decoder = model.base_model.get_decoder()
    monkeypatch.setattr(decoder.rotary_emb, "attention_scaling", 1.25)
    unrotated, projected = [], []
    score = ExpectedAttention.score
    monkeypatch.setattr(ExpectedAttention, "score", lambda *args: unrotated.append(args[1].unrotated) or score(*args))
    decoder.layers[0].self_attn.q_proj.register_forward_hook(lambda *args: projected.append(args[2][0]))
    ids = torch.arange(5, 25)[None]
    with mmcompress.wrap(model, kv="expected-attention(keep=8)"):
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
    wanted = projected[0].unflatten(1, (len(unrotated[0]), -1)).transpose(0, 1)
    torch.testing.assert_close(unrotated[0], wanted, atol=TOLERANCE, rtol=0)


def test_a_short_turn_has_queries_to_expect_more_from(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    score = ExpectedAttention.score
    monkeypatch.setattr(ExpectedAttention, "score", lambda *args: found.append(score(*args)) or found[-1])
    model = FAMILIES["llava"].build("sdpa")
    inputs = FAMILIES["llava"].inputs(model, "mixed")
    with mmcompress.wrap(model, kv="expected-attention(keep=8)"):
        cache = generate(model, inputs, 1).past_key_values
        mask = torch.cat([inputs["attention_mask"], torch.ones(3, 3, dtype=torch.long)], dim=1)
        model(input_ids=torch.tensor([[5, 6, 7]] * 3), attention_mask=mask, past_key_values=cache)
    assert len(found) > 3 * len(cache.layers) and all(part.isfinite().all() for part in found)


def test_an_image_that_ends_the_prompt_leaves_one_token_to_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    mass = TGVKV.mass
    monkeypatch.setattr(TGVKV, "mass", lambda policy, row: asked.append(row.query.shape[1]) or mass(policy, row))
    model = FAMILIES["llava"].build("sdpa")
    inputs = FAMILIES["llava"].inputs(model, "single")
    last = int((inputs["input_ids"][0] == model.config.image_token_id).nonzero().max())
    cut = {**inputs, **{name: inputs[name][:, : last + 1] for name in ("input_ids", "attention_mask")}}
    with mmcompress.wrap(model, kv="tgv-kv(keep=8)"):
        generate(model, {name: value[:1] for name, value in cut.items()}, 1)
    assert set(asked) == {1}


def test_heads_of_their_own_need_attention_that_takes_a_mask_per_head(monkeypatch: pytest.MonkeyPatch) -> None:
    model = FAMILIES["llava"].build("sdpa")
    config: typing.Any = model.base_model.get_decoder().config
    monkeypatch.setattr(config, "_attn_implementation_internal", "flash_attention_2")
    with pytest.raises(UnsupportedError, match="one mask for all heads"):
        mmcompress.wrap(model, kv=f"adakv(keep={KEEP}, window=4)")


def test_a_policy_without_a_cache_is_no_silent_nothing() -> None:
    model = FAMILIES["llava"].build("sdpa")
    inputs = FAMILIES["llava"].inputs(model, "single")
    with mmcompress.wrap(model, kv=f"keydiff(keep={KEEP})"):
        with pytest.raises(UnsupportedError, match="use_cache=False"):
            generate(model, inputs, use_cache=False)
        generate(model, inputs, 2)
    model.generation_config.cache_implementation = "static"
    with pytest.raises(UnsupportedError, match="generation_config asks for"):
        mmcompress.wrap(model, kv=f"keydiff(keep={KEEP})")


@pytest.mark.parametrize("spec", applied())
def test_layers_on_two_devices(spec: str) -> None:
    model = FAMILIES["llava"].build("sdpa")
    inputs = FAMILIES["llava"].inputs(model, "mixed")
    decoder: typing.Any = model.base_model.get_decoder()
    with mmcompress.wrap(model, kv=spec):
        expected = generate(model, inputs)
        for module in (*decoder.layers[2:], decoder.norm, model.lm_head):
            put_there(module)
        model.lm_head.register_forward_hook(lambda module, args, output: output.to(HERE))
        with PretendedDevices():
            output = generate(model, inputs)
    torch.testing.assert_close(torch.stack(output.logits), torch.stack(expected.logits), atol=TOLERANCE, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "slack"),
    [
        ("streamingllm(keep=256)", 0),
        ("h2o(keep=256, every=32)", 31),
        ("tgv-kv(keep=256)", 0),
        ("keydiff(keep=256, schedule=step, every=64)", 63),
    ],
)
def test_two_thousand_tokens_within_a_budget(spec: str, slack: int, snapshots: Snapshots) -> None:
    """One policy for each kind of schedule: on overflow, every so many steps, behind all layers, in blocks."""
    model = FAMILIES["llava"].build("sdpa")
    inputs = FAMILIES["llava"].inputs(model, "mixed")
    with mmcompress.wrap(model, kv=spec) as handle:
        cache = generate(model, inputs, 2000).past_key_values
        held = handle.stats.kv_held
    full = [snapshot for snapshot in snapshots if int(next(iter(snapshot.values())).seen.min()) > 256 + slack]
    assert len(full) > 1500
    for snapshot in full:
        entries = [layer.valid.sum(2).float().mean() for layer in snapshot.values()]
        assert 256 <= sum(entries) / len(entries) <= 256 + slack
    assert held == sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    rows, heads, _, dim = cache.layers[0].keys.shape
    assert held <= 2 * 4 * rows * heads * dim * sum(int(layer.valid.shape[2]) for layer in snapshots[-1].values())
