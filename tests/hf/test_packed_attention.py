"""Single tokens attend to codes as they are packed; the answer is that of what the codes stand for."""

from __future__ import annotations

import pytest
import torch
from hf.families import FAMILIES
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import mmcompress
from mmcompress.integrations.hf import packed_attention
from mmcompress.integrations.hf.packed_attention import attend, reads_codes
from mmcompress.integrations.hf.quantised import Row, Strand
from mmcompress.kv_policy import Block, Quantiser
from mmcompress.registry import POLICIES

KV_HEADS, HEADS, DIM = 2, 6, 16
KIVI = POLICIES.build("kivi", {"group": 4, "residual": 8})
INT4 = POLICIES.build("int4", {})


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def row_of(quantiser: Quantiser, tokens: int, generated: int, seed: int) -> Row:
    """A row as a prompt of `tokens` and so many steps leave it."""
    empty = Strand(torch.zeros(KV_HEADS, 0, DIM), 0)
    keys, values = empty, empty
    for step in range(generated + 1):
        new = tokens if step == 0 else 1
        keys = keys.append(randn(KV_HEADS, new, DIM, seed=seed + 2 * step))
        values = values.append(randn(KV_HEADS, new, DIM, seed=seed + 2 * step + 1))
        keys = keys.pack(quantiser.keys_due(keys.waiting, step == 0), lambda states: quantiser.pack_keys(Block(states)))
        due = quantiser.values_due(values.waiting, step == 0)
        values = values.pack(due, lambda states: quantiser.pack_values(Block(states)))
    return Row(keys, values)


@pytest.mark.parametrize(
    ("quantiser", "lengths"),
    [
        (KIVI, [(19, 0), (19, 0), (26, 3), (9, 14)]),  # of keys and values different numbers are packed
        (KIVI, [(40, 2)]),
        (INT4, [(5, 1), (5, 1), (5, 1)]),
        (INT4, [(3, 33), (30, 6)]),
    ],
    ids=["kivi", "kivi alone", "int4", "int4 ragged"],
)
def test_it_is_attention_to_what_the_codes_stand_for(quantiser: Quantiser, lengths: list[tuple[int, int]]) -> None:
    rows = [row_of(quantiser, *length, seed=100 * sum(length)) for length in lengths]
    query, key, value = (randn(len(rows), count, 1, DIM, seed=count) for count in (HEADS, KV_HEADS, KV_HEADS))
    assert reads_codes(rows, quantiser)
    output = attend(rows, quantiser, query, key, value, 0.3)
    for number, row in enumerate(rows):
        keys = row.keys.read([quantiser.unpack_keys(packed) for packed in row.keys.packed])
        values = row.values.read([quantiser.unpack_values(packed) for packed in row.values.packed])
        expected = scaled_dot_product_attention(
            query[number],
            torch.cat([keys, key[number]], dim=1).repeat_interleave(HEADS // KV_HEADS, dim=0),
            torch.cat([values, value[number]], dim=1).repeat_interleave(HEADS // KV_HEADS, dim=0),
            scale=0.3,
        )
        torch.testing.assert_close(output[number], expected)


def test_rows_of_which_nothing_is_packed_are_read_in_full() -> None:
    rows = [row_of(KIVI, 19, 0, seed=0), row_of(KIVI, 7, 0, seed=1)]
    assert reads_codes(rows[:1], KIVI) and not reads_codes(rows, KIVI)
    assert not reads_codes([], KIVI)
    assert not reads_codes(rows[:1], POLICIES.build("zipcache", {}))


@pytest.mark.parametrize("kv", ["int4", "kivi(group=4, residual=4)"])
def test_only_what_is_new_passes_through_the_cache(kv: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def counted(*arguments: object, **named: object) -> Tensor:
        key = arguments[3]
        assert isinstance(key, Tensor)
        seen.append(key.shape[2])
        return attend(*arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr("mmcompress.integrations.hf.quant_stage.attend", counted)
    model = FAMILIES["llava"].build("sdpa")
    inputs = FAMILIES["llava"].inputs(model, "mixed")
    layers = model.base_model.get_decoder().config.num_hidden_layers
    with mmcompress.wrap(model, kv=kv):
        model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert seen == [1] * 3 * layers


def test_a_cache_can_be_gone_on_with_unwrapped_behind_a_step_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> Tensor:
        raise RuntimeError("on purpose")

    model = FAMILIES["llava"].build("sdpa")
    inputs = FAMILIES["llava"].inputs(model, "mixed")
    with mmcompress.wrap(model, kv="int8"), torch.no_grad():
        cache = model(**inputs).past_key_values
        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="on purpose"):
            patch.setattr(packed_attention.ops, "attention_decode_quant", fails)
            model(input_ids=inputs["input_ids"][:, -1:], past_key_values=cache)
    new = torch.zeros(len(inputs["input_ids"]), KV_HEADS, 1, DIM)
    before = cache.layers[1].keys
    keys, _ = cache.layers[1].update(new, new)
    assert torch.equal(keys[:, :, :-1], before)
