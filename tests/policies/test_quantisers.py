"""Policies that hold entries in few bits: what all of them owe, and what each of them does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mmcompress.errors import SpecError
from mmcompress.kv_policy import Block, KVRow, Packed, Quantiser
from mmcompress.registry import POLICIES

QUANTISERS = [name for name in POLICIES.names() if issubclass(POLICIES.get(name), Quantiser)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BATCH, HEADS, TOKENS, DIM, LAYERS = 2, 2, 64, 32, 3
# Bits of a key or value, at most and with everything that is held beside the codes, in half precision.
MOST_BITS = {"int8": 8 + 1, "int4": 4 + 1, "kivi": 2 + 1, "zipcache": 3.2 + 1.2, "kvquant": 3 + 1.8}
# Mean squared error of keys and values of variance 1, at most.
MOST_ERROR = {"int8": 1e-4, "int4": 0.02, "kivi": 0.3, "zipcache": 0.15, "kvquant": 0.05}

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """With deterministic algorithms on, torch fills what `torch.empty` returns with NaN or the largest integer."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def build(tmp_path: Path) -> Callable[..., Any]:
    """Name and options -> a quantiser; KVQuant has a calibration of 3 bits for normal keys."""

    def build(name: str, **options: Any) -> Any:
        if name == "kvquant" and "calibration" not in options:
            options["calibration"] = calibrated(tmp_path / "calibration.safetensors")
        return POLICIES.build(name, options)

    return build


def calibrated(path: Path, **changed: Tensor) -> str:
    """A calibration file."""
    centroids = torch.tensor([-0.7, -0.45, -0.25, -0.08, 0.08, 0.25, 0.45, 0.7]).repeat(LAYERS, 1)
    tables = {
        "key_lower": torch.full((LAYERS, HEADS * DIM), -2.6),
        "key_upper": torch.full((LAYERS, HEADS * DIM), 2.6),
        "key_centroids": centroids,
        "value_centroids": centroids.clone(),
    }
    save_file(tables | changed, path)
    return str(path)


def block(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, layer: int = 0) -> Block:
    """Keys or values, and saliency."""
    shape = shape or (BATCH, HEADS, TOKENS, DIM)
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(shape, generator=generator).to(dtype)
    return Block(states, layer, torch.rand(shape[:-1], generator=generator))


def halves(policy: Quantiser) -> list[tuple[Callable[[Block], Packed], Callable[[Packed], Tensor]]]:
    return [(policy.pack_keys, policy.unpack_keys), (policy.pack_values, policy.unpack_values)]


def row(tokens: int = 40, queries: int | None = None, layer: int = 0) -> KVRow:
    """A prompt, with three query heads per KV head; only its last queries if these are given."""
    generator = torch.Generator().manual_seed(tokens)
    query = 3 * torch.randn(3 * HEADS, tokens, DIM, generator=generator)
    key, value = torch.randn(2, HEADS, tokens, DIM, generator=generator)
    place = torch.arange(tokens).expand(HEADS, -1)
    visual = torch.zeros_like(place, dtype=torch.bool)
    query = query[:, tokens - (tokens if queries is None else queries) :]
    return KVRow(layer, LAYERS, key, value, place, visual, tokens, DIM**-0.5, query=query)


def test_all_quantisers_are_bounded_here() -> None:
    assert set(QUANTISERS) == set(MOST_BITS) == set(MOST_ERROR)


@pytest.mark.parametrize("name", QUANTISERS)
def test_cards(name: str) -> None:
    info = POLICIES.get(name).info
    assert info.stage == "kv" and not info.takes_keep and info.summary


@pytest.mark.parametrize("name", QUANTISERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_round_trips(name: str, dtype: torch.dtype, build: Callable[..., Any]) -> None:
    given = block(dtype=dtype)
    before = given.states.clone()
    for pack, unpack in halves(build(name)):
        packed = pack(given)
        read = unpack(packed)
        assert (read.shape, read.dtype, packed.layer) == (before.shape, dtype, 0)
        assert float((read - before).float().square().mean()) < MOST_ERROR[name]
        assert torch.equal(read, unpack(packed))
        assert torch.equal(given.states, before)


@pytest.mark.parametrize("name", QUANTISERS)
def test_bytes(name: str, build: Callable[..., Any]) -> None:
    given = block(dtype=torch.bfloat16)
    for pack, _ in halves(build(name)):
        packed = pack(given)
        assert packed.bytes == sum(part.nbytes for part in packed.parts)
        assert not any(part.untyped_storage().nbytes() > part.nbytes for part in packed.parts)
        assert 8 * packed.bytes <= MOST_BITS[name] * given.states.numel()


@pytest.mark.parametrize("name", QUANTISERS)
def test_rows_do_not_know_each_other(name: str, build: Callable[..., Any]) -> None:
    given = block(3, 2, HEADS, TOKENS, DIM)
    assert given.saliency is not None
    for pack, unpack in halves(build(name)):
        together = unpack(pack(given))
        for place in ((0, 0), (2, 1)):
            alone = Block(given.states[place], saliency=given.saliency[place])
            torch.testing.assert_close(unpack(pack(alone)), together[place], rtol=0, atol=0)


@pytest.mark.parametrize("name", QUANTISERS)
@pytest.mark.parametrize("value", [0.0, -1.5])
def test_equal_entries_stay_what_they_are(name: str, value: float, build: Callable[..., Any]) -> None:
    policy = build(name)
    equal = replace(block(), states=torch.full((BATCH, HEADS, TOKENS, DIM), value))
    torch.testing.assert_close(policy.unpack_values(policy.pack_values(equal)), equal.states)
    if name != "kvquant":  # whose steps between keys do not depend on them
        assert torch.equal(policy.unpack_keys(policy.pack_keys(equal)), equal.states)


@pytest.mark.parametrize("name", [name for name in QUANTISERS if name != "kivi"])
@pytest.mark.parametrize("tokens", [1, 2, 3, 7])
def test_short_prompts(name: str, tokens: int, build: Callable[..., Any]) -> None:
    given = block(HEADS, tokens, DIM)
    for pack, unpack in halves(build(name)):
        assert float((unpack(pack(given)) - given.states).square().mean()) < 1


@pytest.mark.parametrize("name", QUANTISERS)
def test_what_is_due(name: str, build: Callable[..., Any]) -> None:
    """A prompt of 70 tokens, then 300: nothing is packed twice, and few wait."""
    policy = build(name)
    held, packed = [0, 0], [0, 0]
    for step in range(301):
        for half, due in enumerate((policy.keys_due, policy.values_due)):
            held[half] += 1 if step else 70
            count = due(held[half], step == 0)
            assert 0 <= count <= held[half]
            packed[half] += count
            held[half] -= count
    if name == "kivi":
        assert (packed, held) == ([256, 242], [114, 128])
    else:
        waiting = 300 % policy.block
        assert (packed, held) == ([370 - waiting] * 2, [waiting] * 2)


@pytest.mark.parametrize("name", ["int8", "int4", "kivi", "kvquant"])
def test_tokens_packed_apart_read_as_if_packed_at_once(name: str, build: Callable[..., Any]) -> None:
    given = block()
    for pack, unpack in halves(build(name)):
        apart = [unpack(pack(Block(states))) for states in given.states.split(32, dim=-2)]
        assert torch.equal(torch.cat(apart, dim=-2), unpack(pack(given)))


@pytest.mark.parametrize(
    ("name", "options", "shape", "message"),
    [
        ("int4", {}, (2, 5, 7), "int4: 7 channels of 4 bits each do not fill whole bytes"),
        ("kivi", {}, (2, 32, 48), "kivi: 48 channels of a head do not divide into groups of 32"),
        ("kivi", {}, (2, 33, 32), "kivi: 33 tokens do not divide into groups of 32"),
        ("kivi", {"group": 3, "residual": 3}, (2, 3, 6), "kivi: 6 channels of 2 bits each do not fill whole bytes"),
        ("zipcache", {}, (1, 5, 6), "zipcache: 6 channels of 2 bits each do not fill whole bytes"),
        ("kvquant", {}, (2, 5, 20), "kvquant: .* is for 64 channels; there are 40"),
    ],
)
def test_sizes_that_do_not_fit(
    name: str, options: dict[str, Any], shape: tuple[int, ...], message: str, build: Callable[..., Any]
) -> None:
    policy = build(name, **options)
    with pytest.raises(SpecError, match=message):
        for pack, _ in halves(policy):
            pack(block(*shape))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("kivi", {"bits": 3}),
        ("kivi", {"group": 0}),
        ("kivi", {"residual": 100}),
        ("kivi", {"residual": 0}),
        ("zipcache", {"high_bits": 2}),
        ("zipcache", {"low_ratio": 1.1}),
        ("zipcache", {"recent": 0.0}),
        ("zipcache", {"random": -0.1}),
        ("zipcache", {"block": 0}),
        ("kvquant", {"outliers": 0.0}),
        ("kvquant", {"sinks": -1}),
    ],
    ids=str,
)
def test_options_out_of_range(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match=rf"{name}.*{next(iter(options))}"):
        POLICIES.build(name, options)


@pytest.mark.parametrize(("name", "bits"), [("int8", 8), ("int4", 4)])
def test_plain_rounding(name: str, bits: int, build: Callable[..., Any]) -> None:
    given, policy = block(dtype=torch.bfloat16), build(name)
    assert policy.pack_keys(given).bytes == given.states.numel() * bits // 8 + BATCH * HEADS * TOKENS * 2 * 2
    states = given.states.float()
    step = (states.amax(-1, keepdim=True) - states.amin(-1, keepdim=True)) / (2**bits - 1)
    error = (policy.unpack_keys(policy.pack_keys(given)).float() - states).abs()
    assert (error <= step / 2 + states.abs() / 128).all()


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("group", [8, 32])
def test_kivi_groups(bits: int, group: int, build: Callable[..., Any]) -> None:
    given, policy = block(), build("kivi", bits=bits, group=group)
    for (pack, unpack), dim in zip(halves(policy), (-2, -1), strict=True):
        packed = pack(given)
        assert 8 * packed.bytes == given.states.numel() * (bits + 2 * 32 / group)
        groups = given.states.unflatten(dim, (-1, group))
        step = (groups.amax(dim, keepdim=True) - groups.amin(dim, keepdim=True)) / (2**bits - 1)
        error = (unpack(packed) - given.states).unflatten(dim, (-1, group)).abs()
        assert (error <= step / 2 * (1 + 1e-5)).all()
        assert (error > step / 4).any()


def test_kivi_keys_with_offsets_per_channel_are_read_well(build: Callable[..., Any]) -> None:
    policy = build("kivi", bits=2)
    given = block()
    with_offsets = Block(given.states + 20 * torch.randn(DIM, generator=torch.Generator().manual_seed(3)))
    by_channel, by_token = (unpack(pack(with_offsets)) - with_offsets.states for pack, unpack in halves(policy))
    assert 20 * by_channel.square().mean() < by_token.square().mean()


def test_zipcache_spends_its_bits_on_what_is_salient(build: Callable[..., Any]) -> None:
    given, policy = block(), build("zipcache")
    assert given.saliency is not None
    least = given.saliency.argsort(dim=-1)[..., : int(0.4 * TOKENS)]
    low = torch.zeros_like(given.saliency, dtype=torch.bool).scatter(-1, least, True)
    for pack, unpack in halves(policy):
        error = (unpack(pack(given)) - given.states).square().mean(dim=-1)
        assert 4 * error[~low].mean() < error[low].mean()
    for ratio, others in ((0.0, 1.0), (1.0, 0.0)):
        alike, swapped = (
            policy.unpack_keys(policy.pack_keys(replace(given, saliency=each)))
            for policy in (build("zipcache", low_ratio=ratio),)
            for each in (given.saliency, others - given.saliency)
        )
        assert torch.equal(alike, swapped)


@pytest.mark.parametrize("tokens", [64, 61])
def test_zipcache_bytes(tokens: int, build: Callable[..., Any]) -> None:
    policy, given = build("zipcache"), block(HEADS, tokens, DIM, dtype=torch.bfloat16)
    low = int(0.4 * tokens)
    codes = ((tokens - low) * 4 + low * 2) * HEADS * DIM // 8
    marks = HEADS * ((tokens + 7) // 8)
    assert policy.pack_keys(given).bytes == codes + marks + 2 * HEADS * DIM * 2 * 2
    assert policy.pack_values(given).bytes == codes + marks + tokens * 2 * 2 + HEADS * DIM * 2


def test_zipcache_values_are_scaled_per_channel(build: Callable[..., Any]) -> None:
    policy, given = build("zipcache", low_ratio=0.0), block()
    spread = Block(given.states * torch.linspace(-4, 4, DIM).exp(), saliency=given.saliency)
    plain = build("int4")
    errors = [
        (each.unpack_values(each.pack_values(spread)) - spread.states).square().mean(dim=(0, 1, 2))
        for each in (policy, plain)
    ]
    assert (errors[0][: DIM // 2] < errors[1][: DIM // 2]).all()


def attention(given: KVRow) -> Tensor:
    """The whole causal map `[kv_heads, group, queries, tokens]`."""
    assert given.query is not None
    logits = given.grouped(given.query) @ given.key[:, None].mT * given.scaling
    hidden = torch.arange(given.entries) > given.last_seen[:, None]
    return logits.masked_fill(hidden, -torch.inf).softmax(dim=-1)


def test_zipcache_saliency_is_an_average_over_the_probes_that_see_a_token(build: Callable[..., Any]) -> None:
    given, policy = row(40), build("zipcache", recent=0.11, random=0.2)
    probes = policy.probes(given)
    assert probes[:5].tolist() == [35, 36, 37, 38, 39] and len(probes) == 5 + 8
    assert (probes[5:] < 35).all()
    total = attention(given)[:, :, probes].sum(dim=(1, 2))
    counts = torch.tensor([sum(int(probe) >= token for probe in probes) for token in range(40)])
    torch.testing.assert_close(policy.saliency(given), total / counts.clamp(min=1))
    official = replace(policy, compat="official")
    torch.testing.assert_close(official.saliency(given), total / torch.arange(40, 0, -1))


def test_zipcache_probes_are_a_pure_function(build: Callable[..., Any]) -> None:
    given = row(200)
    probes = build("zipcache").probes(given).tolist()
    assert probes == build("zipcache").probes(given).tolist()
    assert probes != build("zipcache").probes(replace(given, layer=1)).tolist()
    assert probes != build("zipcache", seed=1).probes(given).tolist()
    assert len(build("zipcache").probes(row(1))) == 1


@pytest.mark.parametrize("compat", ["none", "official"])
def test_zipcache_reads_the_last_query_of_what_is_generated(compat: str, build: Callable[..., Any]) -> None:
    policy, given = build("zipcache", compat=compat), replace(row(100, queries=1), generated=100)
    assert policy.probes(given).tolist() == [0]
    torch.testing.assert_close(policy.saliency(given), attention(given).sum(dim=(1, 2)))


def test_kvquant_holds_outliers_as_they_are(build: Callable[..., Any]) -> None:
    policy, given = build("kvquant"), block()
    states = given.states.clone()
    states[:, :, ::9, 3] = 40.0
    keys, values = (unpack(pack(Block(states, 2))) for pack, unpack in halves(policy))
    outliers = states.abs() > 2.6
    assert torch.equal(keys[outliers], states[outliers])
    assert (keys[~outliers] != states[~outliers]).float().mean() > 0.99
    assert torch.equal(values[states == 40], states[states == 40])
    # Of 64 channels per token, the lowest and the highest are outliers.
    assert len(policy.pack_values(given).parts[1]) == 2 * BATCH * TOKENS
    assert not policy.rotated and policy.sinks == 1


def test_kvquant_bytes(build: Callable[..., Any]) -> None:
    given, policy = block(dtype=torch.bfloat16), build("kvquant")
    codes, counts, rows = given.states.numel() * 3 // 8, BATCH * TOKENS * 2, BATCH * TOKENS
    outliers = int((given.states.abs() > 2.6).sum())
    assert policy.pack_keys(given).bytes == codes + counts + outliers * (2 + 2)
    values = policy.pack_values(given)
    assert values.bytes == codes + counts + len(values.parts[1]) * (2 + 2) + rows * 2 * 2


def test_kvquant_by_hand(tmp_path: Path) -> None:
    tables = {
        "key_lower": torch.tensor([[-1.0, 0.0, 10.0, -1.0]]),
        "key_upper": torch.tensor([[1.0, 4.0, 30.0, 1.0]]),
        "key_centroids": torch.tensor([[0.5, -0.5, 1.0, -1.0]]),
        "value_centroids": torch.tensor([[-1.0, -0.5, 0.5, 1.0]]),
    }
    policy: Any = POLICIES.build("kvquant", {"calibration": calibrated(tmp_path / "small", **tables), "outliers": 0.5})
    keys = torch.tensor([[[0.1, 1.2, 28.0, -0.9], [5.0, 4.0, 9.0, -0.1]]])
    packed = policy.pack_keys(Block(keys))
    assert packed.parts[1].tolist() == [5.0, 9.0]  # what is on a threshold is no outlier
    assert policy.unpack_keys(packed).tolist() == [[[0.5, 1.0, 30.0, -1.0], [5.0, 4.0, 9.0, -0.5]]]
    # Outliers are below 0.75 and above 2.25 quartiles; 1 and 2 are left, and ends are centroids.
    values = torch.tensor([[[2.0, -50.0, 1.0, 60.0]]])
    assert policy.unpack_values(policy.pack_values(Block(values))).tolist() == values.tolist()


def test_kvquant_layers_have_calibrations_of_their_own(tmp_path: Path, build: Callable[..., Any]) -> None:
    lower = torch.full((LAYERS, HEADS * DIM), -2.6)
    lower[1] *= 3
    policy = build("kvquant", calibration=calibrated(tmp_path / "calibration", key_lower=lower))
    first, second, third = (policy.pack_keys(block(layer=layer)) for layer in range(3))
    read = [policy.unpack_keys(packed) for packed in (first, second, third)]
    assert torch.equal(read[0], read[2]) and not torch.equal(read[0], read[1])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"key_upper": torch.full((LAYERS, 5), 3.0)}, "every key_lower has a key_upper"),
        ({"key_upper": torch.full((LAYERS, HEADS * DIM), -3.0)}, "every key_lower has a key_upper"),
        ({"key_lower": torch.full((LAYERS, HEADS * DIM), torch.nan)}, "every key_lower has a key_upper"),
        ({"key_centroids": torch.zeros(LAYERS, 6)}, "key_centroids are"),
        ({"key_centroids": torch.full((LAYERS, 4), torch.inf)}, "key_centroids are"),
        ({"value_centroids": torch.zeros(LAYERS - 1, 8)}, "value_centroids are"),
        ({"key_lower": torch.zeros(3)}, "no safetensors file with key_lower"),
    ],
    ids=str,
)
def test_kvquant_files_that_are_wrong(changed: dict[str, Tensor], message: str, tmp_path: Path) -> None:
    policy: Any = POLICIES.build("kvquant", {"calibration": calibrated(tmp_path / "wrong", **changed)})
    with pytest.raises(SpecError, match=message):
        policy.pack_keys(block())


def test_kvquant_needs_a_file_for_every_layer(tmp_path: Path, build: Callable[..., Any]) -> None:
    (tmp_path / "text").write_text("no tensors")
    save_file({"key_lower": torch.zeros(1, 1)}, tmp_path / "half")
    for path in ("nowhere", "text", "half"):
        with pytest.raises(SpecError, match="no safetensors file"):
            POLICIES.build("kvquant", {"calibration": str(tmp_path / path)}).pack_values(block())
    with pytest.raises(SpecError, match="is for 3 layers; this is number 3"):
        build("kvquant").pack_values(block(layer=3))
    assert POLICIES.get("kvquant").info.lacking(POLICIES.build("kvquant", {})) == "calibration="
