"""What a draft model says decides what stays: recomputed by hand, from what it generates or attends to by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hf.families import FAMILIES, IMAGE, SIDE
from hf.oracle import Entering, reference_items, whole_prompts
from hf.test_exactness import TRANSFORMERS, Version, _second_turn
from hf.test_kv_stage import STEPS, TOLERANCE, Snapshots, generate, masked
from tiny_models import save_tiny_model
from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedModel

import mmcompress
from mmcompress.errors import SpecError, UnsupportedError
from mmcompress.evals.micro import saving
from mmcompress.evals.micro.vocabulary import SPECIAL_TOKENS, TOKENS
from mmcompress.integrations.hf.kv_stage import KVStage
from mmcompress.policies.speckv import SpecKV

KEEP, WINDOW, AHEAD, KERNEL = 10, 3, 5, 3
NAMES = ("llava", "qwen2_5_vl", "qwen3_vl")
EOS = 127


@pytest.fixture(scope="module", params=NAMES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, Any]:
    """A family, its model, and a draft that says other things; one of its answers ends early."""
    return built(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, Any]:
    return built("llava", tmp_path_factory.mktemp("llava"))


def built(name: str, folder: Path) -> tuple[str, Any, Any]:
    model, draft = (FAMILIES[name].build("sdpa") for _ in range(2))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in draft.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator) * weight.std().nan_to_num(0.0))
    inputs = FAMILIES[name].inputs(draft, "mixed")
    draft.generation_config.eos_token_id = int(spoken(draft, inputs)[1, 2])
    draft.save_pretrained(folder)
    return name, model, AutoModelForImageTextToText.from_pretrained(folder).eval()


def speckv(draft: Any, **options: Any) -> dict[str, Any]:
    settings = {"draft": draft.name_or_path, "window": WINDOW, "lookahead": AHEAD, "kernel": KERNEL, "keep": KEEP}
    return {"name": "speckv", **settings, **options}


def spoken(draft: Any, inputs: Mapping[str, Any]) -> Tensor:
    """What the draft itself generates `[rows, tokens]`."""
    prompt = inputs["input_ids"].shape[1]
    said: Tensor = draft.generate(**inputs, max_new_tokens=AHEAD, do_sample=False, pad_token_id=EOS)[:, prompt:]
    return said


def expected_answers(draft: Any, inputs: Mapping[str, Any]) -> list[Tensor]:
    """Row by row, up to the end of the answer."""
    ends = draft.generation_config.eos_token_id
    rows = []
    for row in spoken(draft, inputs):
        end = (row == ends).nonzero()
        rows.append(row if ends is None or not len(end) else row[: int(end[0]) + 1])
    return rows


def overheard(handle: mmcompress.Handle, name: str) -> list[Any]:
    """What a method of the draft is going to return."""
    draft: Any = handle._door.listener.draft  # type: ignore[union-attr]
    own, answers = getattr(draft, name), []

    def repeated(*given: Any) -> Any:
        answers.append(own(*given))
        return answers[-1]

    setattr(draft, name, repeated)
    return answers


@pytest.fixture
def snapshots(monkeypatch: pytest.MonkeyPatch) -> Snapshots:
    """What every layer held behind every pass that was not taken back."""
    seen: Snapshots = []
    finish = KVStage.finish

    def noted(stage: KVStage) -> None:
        run = stage._local.run
        finish(stage)
        assert run is not None
        seen.append({layer: held.complete() for layer, held in run.state.held.items()})

    monkeypatch.setattr(KVStage, "finish", noted)
    return seen


def rotated(states: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    first, second = states.chunk(2, dim=-1)
    return states * cosine + torch.cat([-second, first], dim=-1) * sine


def note(into: dict[str, Tensor], name: str, module: Any, args: Any, output: Tensor) -> None:
    into[name] = output


@torch.no_grad()
def attended(model: PreTrainedModel, entering: Entering, said: Tensor) -> list[Tensor]:
    """By layer, attention `[kv_heads, group, tokens, tokens]` of a prompt that goes on with `said`."""
    decoder: Any = model.base_model.get_decoder()
    prompt, length = entering.row, len(entering.row.embeddings)
    hidden = torch.cat([prompt.embeddings, model.get_input_embeddings()(said)])[None]
    total = hidden.shape[1]
    following = torch.arange(prompt.following, prompt.following + len(said))
    ids = torch.cat([prompt.positions, following.expand(*prompt.positions.shape[:-1], -1)], -1)
    rotary = decoder.rotary_emb(hidden, ids[..., None, :])
    mask = torch.full((total, total), -torch.inf).triu(1)
    layers = []
    for layer, block in enumerate(decoder.layers):
        attention = block.self_attn
        projected: dict[str, Tensor] = {}
        hooks = [
            getattr(attention, name).register_forward_hook(partial(note, projected, name))
            for name in ("q_proj", "k_proj")
        ]
        hidden = block(hidden, attention_mask=mask[None, None], position_embeddings=rotary, position_ids=None)
        for hook in hooks:
            hook.remove()
        states = {}
        for name, norm in (("q_proj", "q_norm"), ("k_proj", "k_norm")):
            heads = projected[name][0].unflatten(-1, (-1, attention.head_dim))
            states[name] = rotated(getattr(attention, norm, torch.nn.Identity())(heads).transpose(0, 1), *rotary)
        key = states["k_proj"]
        query = states["q_proj"].unflatten(0, (len(key), -1))
        layers.append((query @ key[:, None].transpose(-1, -2) * attention.head_dim**-0.5 + mask).softmax(-1))
        if prompt.deepstack is not None and layer < len(prompt.deepstack):
            hidden[0, :length] += prompt.deepstack[layer]
    return layers


def chosen(attention: Tensor, prompt: int, keep: int, reduction: str) -> list[set[int]]:
    """Per KV head the tokens of a prompt that stay in one layer."""
    last = prompt - WINDOW - 1
    kept = []
    for group in attention[:, :, last:]:
        rows = group.flatten(0, 1)
        plain = (rows.amax(0) if reduction == "max" else rows.mean(0))[:last].tolist()
        pooled = [max(plain[max(0, n - KERNEL // 2) : n + KERNEL // 2 + 1]) for n in range(last)]
        best = sorted(range(last), key=lambda n: (-pooled[n], n))[: max(0, keep - WINDOW - 1)]
        kept.append({*best, *range(max(last, 0), prompt)})
    return kept


@pytest.mark.parametrize("reduction", ["max", "mean"])
def test_what_stays_is_what_the_window_and_the_draft_attend_to(
    pair: tuple[str, Any, Any], reduction: str, snapshots: Snapshots
) -> None:
    name, model, draft = pair
    inputs = FAMILIES[name].inputs(model, "mixed")
    answers = expected_answers(draft, inputs)
    assert [len(answer) for answer in answers][1] <= 3 and max(map(len, answers)) == AHEAD
    assert answers[0].tolist() != spoken(model, inputs)[0].tolist(), "it must say something of its own"
    with mmcompress.wrap(model, kv=speckv(draft, reduction=reduction)):
        output = generate(model, inputs)
    rows = whole_prompts(model, name, inputs)
    for number, (entering, said) in enumerate(zip(rows, answers, strict=True)):
        for layer, attention in enumerate(attended(model, entering, said)):
            wanted = chosen(attention, len(entering.row.embeddings), KEEP, reduction)
            held = snapshots[0][layer]
            places = [set(p[v].tolist()) for p, v in zip(held.place[number], held.valid[number], strict=True)]
            assert places == wanted
            assert int(held.generated[number]) == 0 and int(held.seen[number]) == len(entering.row.embeddings)
    logits = masked(model, rows, output.sequences[:, -STEPS:], snapshots)
    torch.testing.assert_close(torch.stack(output.logits, 1), logits, atol=TOLERANCE, rtol=0)
    assert {layer.get_seq_length() for layer in output.past_key_values.layers} == {
        inputs["input_ids"].shape[1] + STEPS - 1
    }


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_looks_ahead(name: str, tmp_path: Path, snapshots: Snapshots) -> None:
    """As its own draft, a model expects what it then says."""
    model = FAMILIES[name].build("sdpa")
    model.save_pretrained(tmp_path)
    for kind in FAMILIES[name].kinds:
        inputs = FAMILIES[name].inputs(model, kind)
        plain = generate(model, inputs)
        with mmcompress.wrap(model, kv=f"speckv(keep=1000, draft={tmp_path}, lookahead={AHEAD})") as handle:
            expected = overheard(handle, "expect")
            output = generate(model, inputs)
        assert torch.equal(torch.stack(output.logits), torch.stack(plain.logits)), "looking ahead leaves no trace"
        for row, said in zip(plain.sequences[:, -STEPS:], expected[0].ids, strict=True):
            assert said.tolist() == row[:AHEAD].tolist()


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_prompts_may_end_with_a_picture(name: str, tmp_path: Path) -> None:
    model = FAMILIES[name].build("sdpa")
    model.save_pretrained(tmp_path)
    inputs = FAMILIES[name].inputs(model, "single")
    end = int((inputs["input_ids"][0] == IMAGE).nonzero().max()) + 1
    inputs |= {key: inputs[key][:, :end] for key in ("input_ids", "attention_mask", "mm_token_type_ids")}
    plain = generate(model, inputs, AHEAD).sequences[:, -AHEAD:]
    with mmcompress.wrap(model, kv=f"speckv(keep=1000, draft={tmp_path}, lookahead={AHEAD})") as handle:
        told = overheard(handle, "expect")
        generate(model, inputs, 1)
    assert told[0].ids.tolist() == plain.tolist()


def test_beams_share_what_their_prompt_expects(llava: tuple[str, Any, Any], snapshots: Snapshots) -> None:
    name, model, draft = llava
    inputs = FAMILIES[name].inputs(model, "images" if Version("5.19") <= TRANSFORMERS else "single")
    with mmcompress.wrap(model, kv=speckv(draft)):
        generate(model, inputs, 2)
        generate(model, inputs, num_beams=3)
    alone, together = snapshots[0], snapshots[2]
    for layer, held in together.items():
        for part in ("place", "valid"):
            assert torch.equal(getattr(held, part), getattr(alone[layer], part).repeat_interleave(3, dim=0))


def test_later_turns_tell_the_draft_what_it_missed(llava: tuple[str, Any, Any], snapshots: Snapshots) -> None:
    """It reads what was said since its last look ahead, by itself, and looks ahead from there."""
    name, model, draft = llava
    inputs = FAMILIES[name].inputs(model, "mixed")
    rows, copies = len(inputs["input_ids"]), 2
    turn = torch.randint(20, 100, (rows, 5), generator=torch.Generator().manual_seed(2))
    with mmcompress.wrap(model, kv=speckv(draft, keep=14)) as handle:
        first = generate(model, inputs, 3)
        told = overheard(handle, "expect")
        ids = torch.cat([first.sequences, turn], dim=1)
        mask = torch.cat([inputs["attention_mask"], torch.ones(rows, 8, dtype=torch.long)], dim=1)
        first.past_key_values.batch_repeat_interleave(copies)
        again = {"input_ids": ids.repeat_interleave(copies, 0), "attention_mask": mask.repeat_interleave(copies, 0)}
        generate(model, again, 3, past_key_values=first.past_key_values)
    whole = {**inputs, "input_ids": ids, "attention_mask": mask}
    answers = expected_answers(draft, whole)
    for row, (ids, valid) in enumerate(zip(told[0].ids, told[0].valid, strict=True)):
        assert ids[valid].tolist() == answers[row // copies].tolist()
    later = snapshots[3]
    for held in later.values():
        assert held.valid.sum(dim=2).unique().tolist() == [14]
        last = held.place[..., -WINDOW - 1 :] - held.seen[:, None, None]
        assert (last == torch.arange(-WINDOW - 1, 0)).all()


def test_a_second_turn_with_another_picture(llava: tuple[str, Any, Any]) -> None:
    name, model, draft = llava
    inputs = FAMILIES[name].inputs(model, "images")
    picture = torch.tensor([[60, *[IMAGE] * 16, 61, 62]]).expand(2, -1)
    pixels = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(4))
    one, others = inputs["pixel_values"].split([1, 2])
    for wrapped in (
        {"kv": speckv(draft)},
        {"method": f"specpc(keep=6, kernel=1, window=5, draft={draft.name_or_path})"},
    ):
        with mmcompress.wrap(model, **wrapped) as handle:
            first = generate(model, inputs, 3)
            read = overheard(handle, "read")
            second = _second_turn(first, inputs, picture)
            generate(model, {**second, "pixel_values": pixels}, 3)
            trace = handle.trace
        whole = {**second, "pixel_values": torch.cat([one, pixels[:1], others, pixels[1:]])}
        expected = generate(draft, {**whole, "past_key_values": None}, 1).logits[0]
        torch.testing.assert_close(read[-1].logits, expected, atol=TOLERANCE, rtol=0)
    scores, padding = drafted(draft, name, whole, 5), (whole["attention_mask"] == 0).sum(dim=1).tolist()
    lasts = {item.row: item.positions for item in reference_items(model, name, whole)}  # the new picture of each row
    for kept, (row, positions) in zip(trace, lasts.items(), strict=True):
        best = scores[row].amax(0)[positions - padding[row]].topk(6).indices
        assert kept.selection.anchor.tolist() == sorted(best.tolist())


def test_behind_compression_the_draft_sees_all(llava: tuple[str, Any, Any], snapshots: Snapshots) -> None:
    name, model, draft = llava
    inputs = FAMILIES[name].inputs(model, "mixed")
    for method in ("uniform(keep=0.5)", "fastv(keep=0.5)"):
        with mmcompress.wrap(model, method, kv=speckv(draft)) as handle:
            told = overheard(handle, "expect")
            output = generate(model, inputs)
            plain = {layer.keys.shape[2] for layer in output.past_key_values.layers}
        for row, answer in enumerate(expected_answers(draft, inputs)):
            assert told[0].ids[row][told[0].valid[row]].tolist() == answer.tolist()
        assert plain == {KEEP + STEPS - 1}


# --- specpc


@torch.no_grad()
def drafted(draft: PreTrainedModel, name: str, inputs: Mapping[str, Any], window: int) -> list[Tensor]:
    """Row by row, what the window of a prompt attends to in the upper half of a draft's layers `[layers, tokens]`."""
    rows = []
    for entering in whole_prompts(draft, name, inputs):
        attention = attended(draft, entering, torch.zeros(0, dtype=torch.long))
        upper = attention[len(attention) // 2 :]
        weight = torch.linspace(0, 1, min(window, attention[0].shape[-1]))
        rows.append(torch.stack([(part[:, :, -window:] * weight[:, None]).amax((0, 1, 2)) for part in upper]))
    return rows


def test_specpc_keeps_what_the_draft_attends_to(pair: tuple[str, Any, Any]) -> None:
    name, model, draft = pair
    inputs = FAMILIES[name].inputs(model, "mixed")
    window, kernel, neighbours, keep = 6, 2, 3, 5
    options = {"draft": draft.name_or_path, "window": window, "kernel": kernel, "neighbours": neighbours}
    with mmcompress.wrap(model, "specpc", keep=keep, **options) as handle:
        generate(model, inputs, 2)
        trace = handle.trace
    scores = drafted(draft, name, inputs, window)
    padding = (inputs["attention_mask"] == 0).sum(dim=1).tolist()
    items = reference_items(model, name, inputs)
    for kept, item in zip(trace, items, strict=True):
        plain = scores[item.row].amax(0)[item.positions - padding[item.row]].tolist()
        pooled = [max(plain[n : n + kernel]) for n in range(len(plain))]
        order = torch.tensor(pooled).topk(keep).indices.tolist()
        taken: list[int] = []
        for token in order:
            near = [min(max(token + offset, 0), len(plain) - 1) for offset in (0, -1, 1)]
            taken += [other for other in dict.fromkeys(near) if other not in taken]
        assert kept.selection.anchor.tolist() == sorted(taken[:keep])


def test_specpc_and_speckv_share_a_draft(llava: tuple[str, Any, Any], tmp_path: Path) -> None:
    name, model, draft = llava
    inputs = FAMILIES[name].inputs(model, "mixed")
    method = f"specpc(keep=6, draft={draft.name_or_path})"
    with mmcompress.wrap(model, method, kv=speckv(draft)) as handle:
        read = overheard(handle, "read")
        generate(model, inputs)
    assert len(read) == 1, "what is read once serves both"
    draft.save_pretrained(tmp_path)
    with pytest.raises(SpecError, match="one draft reads first"):
        mmcompress.wrap(model, method, kv=f"speckv(keep=40, draft={tmp_path})")


def test_specpc_without_a_cache_keeps_the_same(llava: tuple[str, Any, Any]) -> None:
    name, model, draft = llava
    inputs = FAMILIES[name].inputs(model, "mixed")
    with mmcompress.wrap(model, "specpc", keep=6, draft=draft.name_or_path):
        with_cache, without = generate(model, inputs), generate(model, inputs, use_cache=False)
    torch.testing.assert_close(torch.stack(without.logits), torch.stack(with_cache.logits), atol=TOLERANCE, rtol=0)


# --- refusals


def refused(model: Any, message: str, kv: str | dict[str, Any]) -> None:
    with pytest.raises((SpecError, UnsupportedError), match=message):
        mmcompress.wrap(model, kv=kv)
    mmcompress.wrap(model, "uniform", keep=0.5).unwrap()  # a refusal leaves nothing behind


def test_drafts_that_do_not_fit_are_refused(llava: tuple[str, Any, Any], tmp_path: Path) -> None:
    _, model, draft = llava
    other = FAMILIES["qwen2_5_vl"].build("sdpa")
    other.save_pretrained(tmp_path / "other")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{}")
    for folder, message in (
        (tmp_path / "nowhere", "there is no such folder"),
        (tmp_path / "other", "holds a model of type 'qwen2_5_vl'; a smaller 'llava' is needed"),
        (broken, "cannot be loaded"),
    ):
        refused(model, message, f"speckv(keep=40, draft={folder})")
    for change, message in (
        ({"image_token_id": 9}, "placeholder tokens are"),
        ({"vision_config": {"patch_size": 28}}, r"vision_config\.patch_size is 28 and that of the model 14"),
        ({"text_config": {"vocab_size": 130}}, "it knows 130 tokens, the model 128"),
    ):
        config = draft.config.to_dict()
        for part, value in change.items():
            config[part] = {**config[part], **value} if isinstance(value, dict) else value
        changed = type(draft)(type(draft.config).from_dict(config))
        changed.save_pretrained(tmp_path / "changed")
        refused(model, message, f"speckv(keep=40, draft={tmp_path / 'changed'})")
    refused(model, "speckv needs draft=", "speckv(keep=40)")
    refused(model, "33 entries always stay", f"speckv(keep=8, draft={draft.name_or_path})")
    with pytest.raises(SpecError, match="specpc needs draft="):
        mmcompress.wrap(model, "specpc", keep=3)


def test_a_draft_with_another_tokenizer_is_refused(tmp_path: Path) -> None:
    save_tiny_model("llava", tmp_path / "model")
    small = save_tiny_model("llava", tmp_path / "draft")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "model").eval()
    mmcompress.wrap(model, kv=f"speckv(keep=40, draft={tmp_path / 'draft'})").unwrap()
    words = (*SPECIAL_TOKENS, *reversed(TOKENS[len(SPECIAL_TOKENS) :]))
    saving.build_tokenizer(words).save_pretrained(tmp_path / "draft")
    assert small.config.text_config.vocab_size == model.config.text_config.vocab_size
    refused(model, "its tokenizer has other tokens", f"speckv(keep=40, draft={tmp_path / 'draft'})")


def test_what_a_draft_cannot_read_is_refused(llava: tuple[str, Any, Any]) -> None:
    name, model, draft = llava
    inputs: dict[str, Any] = FAMILIES[name].inputs(model, "mixed")
    begun = generate(model, inputs, 2)
    with mmcompress.wrap(model, kv=speckv(draft)):
        with pytest.raises(UnsupportedError, match="has not read what this cache holds"), torch.no_grad():
            model(input_ids=begun.sequences[:, -4:], past_key_values=begun.past_key_values)
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        without = {key: value for key, value in inputs.items() if key != "input_ids"}
        with pytest.raises(UnsupportedError, match="pass input_ids, not inputs_embeds"), torch.no_grad():
            model(inputs_embeds=embeds, **without)
        generate(model, inputs, 2)


def test_options_are_checked() -> None:
    cases: Sequence[dict[str, Any]] = ({"lookahead": 0}, {"window": -1}, {"kernel": 4})
    for options in cases:
        with pytest.raises(SpecError, match=f"{next(iter(options))}="):
            SpecKV(**options)
