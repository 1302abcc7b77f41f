"""Quantised caches are exact: generation equals full attention over what is read of the blocks that were packed."""

from __future__ import annotations

import copy
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hf.fake_devices import HERE, THERE, PretendedDevices, put_there
from hf.families import FAMILIES
from hf.generating import generating
from hf.oracle import Entering, whole_prompts
from hf.test_draft import built as with_draft
from hf.test_draft import speckv
from safetensors.torch import save_file
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import mmcompress
from mmcompress.errors import SpecError, UnsupportedError
from mmcompress.integrations.hf.quant_stage import QuantStage
from mmcompress.integrations.hf.quantised import Arrival, QuantisedLayer, Row
from mmcompress.kv_policy import Block, Packed, Quantiser
from mmcompress.policies.int8 import Int8
from mmcompress.registry import POLICIES
from mmcompress.spec import Spec

STEPS, TOLERANCE = 12, 1e-5
generate = generating(STEPS)
HEADS, DIM = 2, 16
# Heads of the tiny models have 16 channels, and answers are short.
OPTIONS = {"kivi": "group=4, residual=8", "zipcache": "block=4", "kvquant": "calibration={calibration}"}
QUANTISERS = [name for name in POLICIES.names() if issubclass(POLICIES.get(name), Quantiser)]
EVICTORS = ["keydiff(keep=10)", "snapkv(keep=10, window=4)", "pyramidkv(keep=10, window=4)"]


@pytest.fixture
def spec(tmp_path: Path) -> Callable[[str, PreTrainedModel], str]:
    """Name of a quantiser and model -> spec that fits it."""

    def spec(name: str, model: PreTrainedModel) -> str:
        path = tmp_path / "calibration.safetensors"
        if name == "kvquant":
            layers = model.base_model.get_decoder().config.num_hidden_layers
            bounds = torch.full((layers, HEADS * DIM), 2.0)
            centroids = torch.linspace(-0.9, 0.9, 8).repeat(layers, 1)
            tables = {"key_lower": -bounds, "key_upper": bounds}
            save_file({**tables, "key_centroids": centroids, "value_centroids": centroids.clone()}, path)
        options = OPTIONS.get(name, "").format(calibration=path)
        return f"{name}({options})" if options else name

    return spec


@dataclass
class Snapshot:
    """What is held behind a pass: by layer its rows, and which tokens these are if a policy took others out."""

    rows: list[tuple[Row, ...]]
    places: list[list[Tensor]] | None


@pytest.fixture
def snapshots(monkeypatch: pytest.MonkeyPatch) -> list[Snapshot]:
    """What every layer held behind every pass."""
    seen: list[Snapshot] = []
    finish = QuantStage.finish

    def noted(stage: QuantStage) -> None:
        following = stage._local.pass_
        finish(stage)
        assert following is not None
        layers: typing.Any = following.run.cache.layers
        held = following.run.state.held
        places = None
        if held:
            places = [
                [place[here].unflatten(0, (len(here), -1)) for place, here in zip(part.place, part.valid, strict=True)]
                for part in (held[layer].complete() for layer in range(len(layers)))
            ]
        seen.append(Snapshot([layer.rows for layer in layers], places))

    monkeypatch.setattr(QuantStage, "finish", noted)
    return seen


class Reads:
    """Stands for a layer's cache: attention reads what it is given, and what it stores is noted."""

    def __init__(self) -> None:
        self.before: tuple[Tensor, Tensor] | None = None
        self.own: list[tuple[Tensor, Tensor]] = []

    def update(self, keys: Tensor, values: Tensor, *args: typing.Any, **kwargs: typing.Any) -> tuple[Tensor, Tensor]:
        self.own.append((keys[0], values[0]))
        if self.before is None:
            return keys, values
        return torch.cat([self.before[0][None], keys], dim=2), torch.cat([self.before[1][None], values], dim=2)


def turned(states: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    first, second = states.chunk(2, dim=-1)
    return states * cosine + torch.cat([-second, first], dim=-1) * sine


@dataclass
class Recomputed:
    """What a hand-written run computes: logits behind every token, and keys and values by layer as they were made."""

    logits: Tensor
    own: list[tuple[Tensor, Tensor]]
    rotary: tuple[Tensor, Tensor]


@torch.no_grad()
def recomputed(
    model: PreTrainedModel,
    policy: Quantiser,
    entering: Entering,
    said: Tensor,
    chunks: Sequence[int],
    snapshots: Sequence[Snapshot],
    number: int,
) -> Recomputed:
    """A row by itself, read in `chunks` of tokens; what it attends to of those before is what the row held then."""
    decoder: typing.Any = model.base_model.get_decoder()
    prompt, length = entering.row, len(entering.row.embeddings)
    hidden = torch.cat([prompt.embeddings, model.get_input_embeddings()(said)])[None]
    following = torch.arange(prompt.following, prompt.following + len(said))
    ids = torch.cat([prompt.positions, following.expand(*prompt.positions.shape[:-1], -1)], -1)
    cosine, sine = decoder.rotary_emb(hidden, ids[..., None, :])
    own = []
    for layer, block in enumerate(decoder.layers):
        reads, outputs, first = Reads(), [], 0
        for chunk, size in enumerate(chunks):
            if chunk:
                row, places = snapshots[chunk - 1].rows[layer][number], snapshots[chunk - 1].places
                place = torch.arange(first).expand(HEADS, -1) if places is None else places[layer][number]
                reads.before = as_read(policy, row, reads.own, place, (cosine[0], sine[0]))
            new = slice(first, first + size)
            before = 0 if reads.before is None else reads.before[0].shape[1]
            mask = torch.full((size, before + size), -torch.inf).triu(before + 1)[None, None]
            outputs.append(
                block(
                    hidden[:, new],
                    attention_mask=mask,
                    position_embeddings=(cosine[:, new], sine[:, new]),
                    position_ids=None,
                    past_key_values=reads,
                )
            )
            first += size
        hidden = torch.cat(outputs, dim=1)
        if prompt.deepstack is not None and layer < len(prompt.deepstack):
            hidden[0, :length] += prompt.deepstack[layer]
        keys, values = (torch.cat(part, dim=1) for part in zip(*reads.own, strict=True))
        own.append((keys, values))
    logits = model.get_output_embeddings()(decoder.norm(hidden[0, length - 1 :]))
    return Recomputed(logits, own, (cosine[0], sine[0]))


def as_read(
    policy: Quantiser, row: Row, own: Sequence[tuple[Tensor, Tensor]], place: Tensor, rotary: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Keys and values of the tokens at `place` `[kv_heads, held]`, those that `row` packed as they are read of it."""
    keys, values = (torch.cat(part, dim=1).take_along_dim(place[..., None], dim=1) for part in zip(*own, strict=True))
    unpacked_keys = [policy.unpack_keys(packed) for packed in row.keys.packed]
    for states, packed in (
        (keys, unpacked_keys),
        (values, [policy.unpack_values(packed) for packed in row.values.packed]),
    ):
        if packed:
            block = torch.cat(packed, dim=1)
            here = slice(policy.sinks, policy.sinks + block.shape[1])
            if states is keys and not policy.rotated:
                block = turned(block, *(part[place[:, here]] for part in rotary))
            states[:, here] = block
    return keys, values


def built(spec: str) -> Quantiser:
    parsed = Spec.parse(spec)
    policy: typing.Any = POLICIES.build(parsed.name, parsed.options)
    return policy


def bytes_held(policy: typing.Any, row: Row, tokens: int, ids: int) -> int:
    """What a row of `tokens` occupies in one layer, in float32, by the policy's formula."""
    total = 0
    for half, strand in enumerate((row.keys, row.values)):
        packed = sum(part.tokens for part in strand.packed)
        full = 4 * HEADS * DIM * (tokens - packed)
        name, channels = policy.info.name, HEADS * DIM
        if name in ("int8", "int4"):
            held = packed * (channels * policy.bits // 8 + HEADS * 2 * 4)
        elif name == "kivi":
            held = packed * channels * policy.bits // 8 + packed * channels // policy.group * 2 * 4
        elif name == "zipcache":
            held = 0
            for part in strand.packed:
                count, low = part.tokens, int(policy.low_ratio * part.tokens)
                codes = ((count - low) * policy.high_bits + low * policy.low_bits) * channels // 8
                marks = HEADS * ((count + 7) // 8)
                classes = (count > low) + (low > 0)
                ranges = count * 2 * 4 + channels * 4 if half else classes * channels * 2 * 4
                held += codes + marks + ranges
        else:
            outliers = sum(len(part.parts[1]) for part in strand.packed)
            held = packed * (channels * 3 // 8 + 2) + outliers * (4 + 2) + (packed * 2 * 4 if half else 0)
        total += full + held
    return total + (0 if policy.rotated else 4 * ids * tokens)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("quantiser", QUANTISERS)
def test_every_quantiser_on_every_family(
    name: str, quantiser: str, spec: typing.Any, snapshots: list[Snapshot]
) -> None:
    check(name, "sdpa", quantiser, spec, snapshots)


@pytest.mark.parametrize("quantiser", QUANTISERS)
def test_eager_attention(quantiser: str, spec: typing.Any, snapshots: list[Snapshot]) -> None:
    check("qwen2_5_vl", "eager", quantiser, spec, snapshots)


def check(name: str, attention: str, quantiser: str, spec: typing.Any, snapshots: list[Snapshot]) -> None:
    model = FAMILIES[name].build(attention)
    inputs = FAMILIES[name].inputs(model, "mixed")
    kv = spec(quantiser, model)
    policy = built(kv)
    with mmcompress.wrap(model, kv=kv) as handle:
        output = generate(model, inputs)
        stats = handle.stats
    logits = torch.stack(output.logits, 1)
    rows, held = whole_prompts(model, name, inputs), 0
    for number, (entering, said) in enumerate(zip(rows, output.sequences[:, -STEPS:-1], strict=True)):
        length = len(entering.row.embeddings)
        expected = recomputed(model, policy, entering, said, [length, *[1] * (STEPS - 1)], snapshots, number)
        torch.testing.assert_close(logits[number], expected.logits, atol=TOLERANCE, rtol=0)
        for layer, of_layer in enumerate(snapshots[-1].rows):
            row, tokens = of_layer[number], length + STEPS - 1
            assert row.keys.tokens == row.values.tokens == tokens
            bounded(policy, row, expected.own[layer], expected.rotary)
            held += bytes_held(policy, row, tokens, len(entering.row.positions.view(-1, length)))
    assert held == stats.kv_held == sum(now for now, _ in stats.kv_layers)
    layers = output.past_key_values.layers
    assert [layer.nbytes for layer in layers] == [now for now, _ in stats.kv_layers]
    assert {layer.get_seq_length() for layer in layers} == {inputs["input_ids"].shape[1] + STEPS - 1}
    in_full = layers[0].keys.nbytes + layers[0].values.nbytes
    columns = inputs["input_ids"].shape[1]
    # Of what is read in codes never more is in full than the prompt, and what comes before the first codes.
    most = in_full if policy.code_bits is None else in_full * columns // (columns + STEPS - 1)
    assert all(most <= peak <= in_full + now for now, peak in stats.kv_layers)
    plain = torch.stack(generate(model, inputs).logits, 1)
    torch.testing.assert_close(logits[:, 0], plain[:, 0], atol=TOLERANCE, rtol=0)
    assert (logits[:, 1] - plain[:, 1]).abs().max() > 1e-4, "nothing was packed, or the test shows nothing"


def bounded(policy: typing.Any, row: Row, own: tuple[Tensor, Tensor], rotary: tuple[Tensor, Tensor]) -> None:
    """What is read of packed entries is at most half a step off."""
    for half, (strand, states) in enumerate(zip((row.keys, row.values), own, strict=True)):
        first = policy.sinks
        for packed in strand.packed:
            here = slice(first, first + packed.tokens)
            true = states[:, here]
            if not half and not policy.rotated:
                true = turned(true, rotary[0][here], -rotary[1][here])
            read = policy.unpack_values(packed) if half else policy.unpack_keys(packed)
            error = (read - true).abs()
            assert (error <= most_error(policy, true, bool(half)) + 1e-5).all()
            first += packed.tokens


def most_error(policy: typing.Any, states: Tensor, values: bool) -> Tensor:
    """Half a step, for every one of `states` `[kv_heads, tokens, dim]`."""

    def half_step(of: Tensor, bits: int, dim: int | tuple[int, ...]) -> Tensor:
        return (of.amax(dim, keepdim=True) - of.amin(dim, keepdim=True)) / (2**bits - 1) / 2

    name = policy.info.name
    if name in ("int8", "int4"):
        return half_step(states, policy.bits, -1)
    if name == "kivi":
        dim = -1 if values else -2
        return (
            half_step(states.unflatten(dim, (-1, policy.group)), policy.bits, dim)
            .repeat_interleave(policy.group, dim)
            .flatten(dim - 1, dim)
        )
    if name == "zipcache":
        if not values:
            return half_step(states, policy.low_bits, -2)
        scale = states.abs().amax(-2, keepdim=True).sqrt()
        # A range is shared by as many tokens as there are heads, each of another head.
        return half_step(states / scale, policy.low_bits, (0, 1, 2)) * scale
    centroids = policy._calibration._tables["value_centroids" if values else "key_centroids"][0]
    gap = max(float(centroids.diff().max()) / 2, 1 - float(centroids.max()))
    reach = 2.0 if not values else (states.amax((0, 2), keepdim=True) - states.amin((0, 2), keepdim=True)) / 2
    return torch.as_tensor(gap * reach)


@pytest.mark.parametrize("evictor", EVICTORS)
@pytest.mark.parametrize("quantiser", QUANTISERS)
def test_what_a_policy_leaves_is_packed(
    evictor: str, quantiser: str, spec: typing.Any, snapshots: list[Snapshot]
) -> None:
    name = "qwen2_5_vl" if "keydiff" in evictor else "llava"
    model = FAMILIES[name].build("sdpa")
    inputs = FAMILIES[name].inputs(model, "mixed")
    kv = spec(quantiser, model)
    with mmcompress.wrap(model, kv=[evictor, kv]) as handle:
        output = generate(model, inputs)
        held = handle.stats.kv_held
    logits = torch.stack(output.logits, 1)
    for number, (entering, said) in enumerate(
        zip(whole_prompts(model, name, inputs), output.sequences[:, -STEPS:-1], strict=True)
    ):
        chunks = [len(entering.row.embeddings), *[1] * (STEPS - 1)]
        expected = recomputed(model, built(kv), entering, said, chunks, snapshots, number).logits
        torch.testing.assert_close(logits[number], expected, atol=TOLERANCE, rtol=0)
    with mmcompress.wrap(model, kv=evictor) as handle:
        alone = torch.stack(generate(model, inputs).logits, 1)
        assert held < handle.stats.kv_held
    assert (logits[:, 1] - alone[:, 1]).abs().max() > 1e-4


@pytest.mark.parametrize("quantiser", QUANTISERS)
def test_later_turns(quantiser: str, spec: typing.Any, snapshots: list[Snapshot]) -> None:
    """The second prompt sees what the first left, and its own tokens in full; then it is packed too."""
    model = FAMILIES["llava"].build("sdpa")
    inputs = FAMILIES["llava"].inputs(model, "mixed")
    kv, more = spec(quantiser, model), torch.arange(5, 20).view(3, 5)
    mask = torch.ones_like(more)
    mask[1, :3] = 0
    with mmcompress.wrap(model, kv=kv):
        first = generate(model, inputs, 3)
        columns = torch.cat([inputs["attention_mask"], torch.ones(3, 2, dtype=torch.long), mask], dim=1)
        cache = first.past_key_values
        second = model(input_ids=more, attention_mask=columns, past_key_values=cache, position_ids=places(columns, 5))
        columns = torch.cat([columns, torch.ones(3, 1, dtype=torch.long)], dim=1)
        ids = torch.tensor([[7], [8], [9]])
        last = model(input_ids=ids, attention_mask=columns, past_key_values=cache, position_ids=places(columns, 1))
    for number, (entering, said) in enumerate(
        zip(whole_prompts(model, "llava", inputs), first.sequences[:, -3:-1], strict=True)
    ):
        new = more[number][mask[number].bool()]
        tokens = torch.cat([said, new, ids[number]])
        chunks = [len(entering.row.embeddings), 1, 1, len(new), 1]
        expected = recomputed(model, built(kv), entering, tokens, chunks, snapshots, number).logits
        torch.testing.assert_close(
            second.logits[number, -len(new) :], expected[-1 - len(new) : -1], atol=TOLERANCE, rtol=0
        )
        torch.testing.assert_close(last.logits[number, 0], expected[-1], atol=TOLERANCE, rtol=0)


def places(columns: Tensor, new: int) -> Tensor:
    return (columns.cumsum(1) - 1).clamp(min=0)[:, -new:]


@pytest.fixture(params=["rotated", "unrotated"])
def lossless(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A policy that packs and loses nothing, so that all must be as without it."""

    def pack(self: Int8, block: Block) -> Packed:
        return Packed((block.states.clone(),), block.states.shape, block.states.dtype, block.layer, along=(-2,))

    def unpack(self: Int8, packed: Packed) -> Tensor:
        return packed.parts[0]

    for half in ("keys", "values"):
        monkeypatch.setattr(Int8, f"pack_{half}", pack)
        monkeypatch.setattr(Int8, f"unpack_{half}", unpack)
    monkeypatch.setattr(Int8, "rotated", request.param == "rotated")
    monkeypatch.setattr(Int8, "sinks", 2)
    monkeypatch.setattr(Int8, "block", 3)
    monkeypatch.setattr(Int8, "code_bits", None)
    yield


@pytest.mark.usefixtures("lossless")
@pytest.mark.parametrize(
    ("name", "method", "positions"),
    [
        ("llava", None, None),
        ("llava", "uniform(keep=0.5)", None),
        ("llava", "fastv(keep=0.5, layer=1)", None),
        ("llava", "fastv(keep=0.5, layer=1)", "renumber"),
        ("llava", "pyramiddrop(keep=0.4)", "renumber"),
        ("qwen2_5_vl", "uniform(keep=0.5)", None),
        ("qwen2_5_vl", "fastv(keep=0.5, layer=1)", None),
        ("qwen3_vl", None, None),
    ],
)
@pytest.mark.parametrize("evictor", [None, "keydiff(keep=9)"])
def test_what_loses_nothing_changes_nothing(
    name: str, method: str | None, positions: typing.Any, evictor: str | None
) -> None:
    model = FAMILIES[name].build("sdpa")
    inputs = FAMILIES[name].inputs(model, "mixed")
    outputs = []
    for packs in (False, True):
        kv = [part for part in (evictor, "int8" if packs else None) if part]
        if method is None and not kv:
            outputs.append(generate(model, inputs))
            continue
        with mmcompress.wrap(model, method, kv=kv or None, positions=positions):
            outputs.append(generate(model, inputs))
    plain, packed = (torch.stack(output.logits, 1) for output in outputs)
    torch.testing.assert_close(packed, plain, atol=TOLERANCE, rtol=0)
    for one, other in zip(*(output.past_key_values.layers for output in outputs), strict=True):
        assert isinstance(other, QuantisedLayer) and other.rows[0].keys.packed
        assert one.keys.shape == other.keys.shape and one.get_seq_length() == other.get_seq_length()


@pytest.mark.usefixtures("lossless")
def test_policies_that_look_ahead_act_before_anything_is_packed(tmp_path: Path) -> None:
    _, model, draft = with_draft("llava", tmp_path)
    inputs = FAMILIES["llava"].inputs(model, "mixed")
    outputs = []
    for kv in (speckv(draft), [speckv(draft), "int8"]):
        with mmcompress.wrap(model, kv=kv):
            outputs.append(generate(model, inputs))
    evicted, packed = outputs
    torch.testing.assert_close(torch.stack(packed.logits), torch.stack(evicted.logits), atol=TOLERANCE, rtol=0)
    assert packed.past_key_values.layers[0].rows[0].keys.packed


@pytest.mark.usefixtures("lossless")
def test_beams_and_chosen_rows_follow() -> None:
    model = FAMILIES["qwen2_5_vl"].build("sdpa")
    inputs = FAMILIES["qwen2_5_vl"].inputs(model, "mixed")
    plain = generate(model, inputs, num_beams=3)
    with mmcompress.wrap(model, kv="int8"):
        beams = generate(model, inputs, num_beams=3)
        cache = generate(model, inputs).past_key_values
        layer: typing.Any = cache.layers[0]
        before, held = layer.keys, layer.nbytes
        cache.batch_repeat_interleave(2)
        assert torch.equal(layer.keys, before.repeat_interleave(2, dim=0)) and layer.nbytes == held
        cache.batch_select_indices(torch.tensor([5, 0]))
        assert torch.equal(layer.keys, before[[2, 0]]) and layer.nbytes < held
    assert torch.equal(beams.sequences, plain.sequences)


@pytest.mark.parametrize("quantiser", QUANTISERS)
def test_rows_do_not_know_each_other(quantiser: str, spec: typing.Any) -> None:
    """What is packed of a padded batch is bit for bit what is packed of each row alone."""
    model = FAMILIES["llava"].build("sdpa")
    policy = built(spec(quantiser, model))
    generator = torch.Generator().manual_seed(0)
    valid = torch.arange(20) >= torch.tensor([[0], [7], [13]])
    keys, values = torch.randn(2, 3, HEADS, 30, DIM, generator=generator)
    saliency = torch.rand(3, HEADS, 30, generator=generator)

    def filled(rows: slice, first: int) -> QuantisedLayer:
        layer = empty(policy, model)
        columns, waiting = [slice(first, 20), *(slice(step, step + 1) for step in range(20, 30))], 0
        for new in columns:
            layer.update(keys[rows, :, new], values[rows, :, new])
            here = valid[rows, new] if new.stop <= 20 else torch.ones(len(keys[rows]), 1, dtype=torch.bool)
            waiting = 0 if new.stop <= 20 else waiting + 1
            said = [saliency[rows][row, :, : layer.waiting(row, part)] for row, part in enumerate(here)]
            ids = None if policy.rotated else [torch.arange(100)[None, new][:, part] for part in here]
            layer.settle(Arrival(here, here.all(dim=1).tolist(), new.stop <= 20, ids, said))
        return layer

    together = filled(slice(0, 3), 0)
    for row, first in enumerate((0, 7, 13)):
        (alone,) = (apart := filled(slice(row, row + 1), first)).rows
        parts, others = list(together.rows[row].parts), list(alone.parts)
        assert len(parts) == len(others)
        if not policy.rotated:  # counted from another first column
            parts, others = parts[:-1], others[:-1]
        assert all(torch.equal(one, other) for one, other in zip(parts, others, strict=True))
        assert torch.equal(together.keys[row, :, first:], apart.keys[0])


def empty(policy: Quantiser, model: PreTrainedModel) -> QuantisedLayer:
    from mmcompress.integrations.hf.cache import PrunedDynamicLayer
    from mmcompress.integrations.hf.quantised import quantise

    return quantise(PrunedDynamicLayer(), 0, policy, model.base_model.get_decoder().rotary_emb)


@pytest.mark.parametrize("quantiser", QUANTISERS)
def test_layers_on_another_device(quantiser: str, spec: typing.Any) -> None:
    model = FAMILIES["llava"].build("sdpa")
    inputs = FAMILIES["llava"].inputs(model, "mixed")
    decoder: typing.Any = model.base_model.get_decoder()
    with mmcompress.wrap(model, kv=spec(quantiser, model)):
        expected = generate(model, inputs)
        for module in (*decoder.layers[2:], decoder.norm, model.lm_head):
            put_there(module)
        model.lm_head.register_forward_hook(lambda module, args, output: output.to(HERE))
        with PretendedDevices():
            output = generate(model, inputs)
            row = output.past_key_values.layers[2].rows[0]
            assert {part.device for part in row.parts} == {THERE}
    torch.testing.assert_close(torch.stack(output.logits), torch.stack(expected.logits), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("evictor", [None, "snapkv(keep=8, window=4)"])
def test_methods_that_probe_layers_ahead_of_their_time_do_not_disturb(evictor: str | None) -> None:
    model = FAMILIES["llava"].build("sdpa")
    inputs = FAMILIES["llava"].inputs(model, "mixed")
    with mmcompress.wrap(model, "pyramiddrop(keep=0.4)"):
        expected = model(**inputs).logits
    with mmcompress.wrap(model, "pyramiddrop(keep=0.4)", kv=[*filter(None, [evictor]), "zipcache(block=2)"]):
        torch.testing.assert_close(model(**inputs).logits, expected, atol=TOLERANCE, rtol=0)
        layers = generate(model, inputs, 5).past_key_values.layers
    assert all(row.keys.packed and len(row.keys.packed) == 3 for layer in layers for row in layer.rows)


def test_a_cache_can_be_copied_and_gone_on_with() -> None:
    model = FAMILIES["qwen2_5_vl"].build("sdpa")
    inputs = FAMILIES["qwen2_5_vl"].inputs(model, "mixed")
    with mmcompress.wrap(model, kv="int8"), torch.no_grad():
        cache = model(**inputs).past_key_values
        copied = copy.deepcopy(cache)
        ids = torch.tensor([[7]] * 3)
        mask = torch.cat([inputs["attention_mask"], torch.ones(3, 1, dtype=torch.long)], dim=1)
        step = {"input_ids": ids, "attention_mask": mask, "position_ids": places(mask, 1)[None].expand(3, -1, -1)}
        logits = [model(**step, past_key_values=part).logits for part in (cache, copied)]
        assert torch.equal(*logits)
        cache.reset()
        assert cache.get_seq_length() == 0 and cache.layers[0].nbytes == 0
        torch.testing.assert_close(
            model(**inputs, past_key_values=cache).past_key_values.layers[1].keys, copied.layers[1].keys[:, :, :-1]
        )


def test_what_is_not_packed_yet_can_be_cropped() -> None:
    model = FAMILIES["llava"].build("sdpa")
    inputs = FAMILIES["llava"].inputs(model, "mixed")
    with mmcompress.wrap(model, kv="int8"):
        cache = generate(model, inputs, 6).past_key_values
        short = generate(model, inputs, 3).past_key_values
        cache.crop(-3)
        step = {
            "input_ids": torch.tensor([[7]] * 3),
            "attention_mask": torch.cat([inputs["attention_mask"], torch.ones(3, 3)], dim=1),
        }
        logits = [model(**step, past_key_values=part).logits for part in (cache, short)]
        torch.testing.assert_close(*logits, atol=TOLERANCE, rtol=0)
        with pytest.raises(UnsupportedError, match="cannot crop"):
            cache.crop(-4)
        assert cache.layers[0].keys.shape[2] == inputs["input_ids"].shape[1] + 3


@pytest.mark.parametrize(
    ("kv", "message"),
    [
        ("kivi", "kivi: 16 channels of a head do not divide into groups of 32"),
        ("int8(keep=4)", "int8 takes no keep="),
        ("kvquant", "kvquant needs calibration="),
        ("kvquant(calibration=nowhere.safetensors)", "nowhere.safetensors.* is no safetensors file"),
        (["int8", "kivi(group=4, residual=8)"], "int8 and kivi do not go together"),
        (["snapkv(keep=64)", "keydiff(keep=8)"], "what does is one that evicts and behind it one that packs"),
        (["quest(keep=64)", "int8"], "quest and int8 do not go together"),
        (["int8", "snapkv(keep=64)"], "snapkv acts before int8: give it first"),
        (["h2o(keep=64)", "int8"], "h2o takes entries out at every step, and what int8 has packed cannot"),
        (["adakv(keep=64)", "int8"], "adakv leaves every head another number of entries"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_and_leaves_nothing(kv: typing.Any, message: str) -> None:
    model = FAMILIES["llava"].build("sdpa")
    with pytest.raises((SpecError, UnsupportedError), match=message):
        mmcompress.wrap(model, kv=kv)
    mmcompress.wrap(model, "uniform", keep=0.5).unwrap()


def test_a_calibration_of_another_model_is_refused(tmp_path: Path) -> None:
    model, path = FAMILIES["llava"].build("sdpa"), tmp_path / "calibration.safetensors"
    for layers, channels, message in ((3, 32, "is for 3 layers"), (4, 48, "is for 48 channels; there are 32")):
        bounds, centroids = torch.ones(layers, channels), torch.linspace(-1, 1, 8).repeat(layers, 1)
        tables = {"key_lower": -bounds, "key_upper": bounds}
        save_file({**tables, "key_centroids": centroids, "value_centroids": centroids.clone()}, path)
        with pytest.raises(SpecError, match=message):
            mmcompress.wrap(model, kv={"name": "kvquant", "calibration": str(path)})


def test_other_caches_are_refused() -> None:
    model = FAMILIES["llava"].build("sdpa")
    inputs = FAMILIES["llava"].inputs(model, "single")
    again = {"input_ids": torch.tensor([[7]])}
    plain = model(**inputs).past_key_values
    with mmcompress.wrap(model, kv="int8"):
        with pytest.raises(UnsupportedError, match="static and offloaded"):
            generate(model, inputs, cache_implementation="static")
        with pytest.raises(UnsupportedError, match="filled without int8"):
            model(**again, past_key_values=plain)
        with pytest.raises(UnsupportedError, match="leave prompt_lookup"):
            generate(model, inputs, prompt_lookup_num_tokens=2)
        packed = model(**inputs).past_key_values
        model(**inputs, past_key_values=DynamicCache())
    for method, kv in ((None, "int4"), (None, "keydiff(keep=8)"), ("uniform(keep=0.5)", None)):
        with mmcompress.wrap(model, method, kv=kv), pytest.raises(UnsupportedError, match="this cache holds what"):
            model(**again, past_key_values=packed)
    with mmcompress.wrap(model, kv=["keydiff(keep=8)", "int8"]):
        evicted = model(**inputs).past_key_values
        model(**again, past_key_values=evicted)
        with pytest.raises(UnsupportedError, match="a second prompt needs a new cache"):
            model(input_ids=torch.tensor([[7, 8]]), past_key_values=evicted)
    model.generation_config.cache_implementation = "static"
    with pytest.raises(UnsupportedError, match="generation_config asks for"):
        mmcompress.wrap(model, kv="int8")


def test_bytes_by_layer_of_every_cache() -> None:
    model = FAMILIES["llava"].build("sdpa")
    inputs = FAMILIES["llava"].inputs(model, "mixed")
    entry = 3 * HEADS * DIM * 2 * 4
    columns = inputs["input_ids"].shape[1]
    with mmcompress.wrap(model, "fastv(keep=0.5, layer=1)") as handle:
        generate(model, inputs, 4)
        left = max(handle.stats.rows_by_layer[-1])
        grown = [(entry * (count + 3), entry * (count + 3)) for count in (columns, left, left, left)]
        assert handle.stats.kv_layers == grown and handle.stats.kv_held is None
    with mmcompress.wrap(model, kv="keydiff(keep=10)") as handle:
        generate(model, inputs, 4)
        assert handle.stats.kv_layers == [(entry * 13, entry * columns)] * 4
    with mmcompress.wrap(model, "uniform", keep=0.5) as handle:
        generate(model, inputs, 2, cache_implementation="static")
        assert len({now for now, peak in handle.stats.kv_layers if now == peak}) == 1


def test_unwrapping_gives_all_layers_back() -> None:
    model = FAMILIES["llava"].build("eager")
    configs = [layer.self_attn.config for layer in model.model.language_model.layers]
    inputs = FAMILIES["llava"].inputs(model, "mixed")
    plain = generate(model, inputs, 2).sequences
    with mmcompress.wrap(model, "fastv(keep=0.5)", kv=["snapkv(keep=8, window=4)", "zipcache(block=4)"]):
        generate(model, inputs, 2)
    assert all(
        layer.self_attn.config is config and not layer.self_attn._forward_hooks
        for layer, config in zip(model.model.language_model.layers, configs, strict=True)
    )
    assert torch.equal(generate(model, inputs, 2).sequences, plain)
