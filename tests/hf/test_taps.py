"""What methods see of a wrapped model is what eager attention maps say, without the model ever making a map."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields

import pytest
import torch
from hf.fake_flash import fake_flash_attention
from hf.families import FAMILIES, Kind
from hf.oracle import encoder_facts, reference_items

import mmcompress
from mmcompress.method import VisualMethod
from mmcompress.registry import METHODS
from mmcompress.statistics import NEEDS_CLS, STATISTICS
from mmcompress.types import EncoderFacts, Needs, Selection, VisualItem

SEEN: list[VisualItem] = []


@dataclass(frozen=True)
class Spy(VisualMethod):
    """Reads everything the encoder can supply and keeps the first tokens."""

    def needs(self, encoder: EncoderFacts) -> Needs:
        layers = tuple(range(encoder.used))
        wanted = {name: layers for name in STATISTICS if name not in encoder.missing}
        wanted["received_attention"] = encoder.global_layers
        return Needs(**wanted, features=True, text=True, embeddings=True)

    def select(self, item: VisualItem, budget: int, needs: Needs) -> Selection:
        return Selection(torch.arange(budget))

    def compress(self, items: Sequence[VisualItem], keep: object, needs: Needs) -> list[Selection]:
        SEEN.extend(items)
        return super().compress(items, keep, needs)


@pytest.fixture
def spy() -> Iterator[str]:
    METHODS.register("test-spy", summary="", family="")(Spy)
    SEEN.clear()
    yield "test-spy"
    METHODS._classes.pop("test-spy")


def assert_close(value: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(value, wanted, rtol=2e-5, atol=2e-5 * float(wanted.abs().max()))


CASES = [(name, kind) for name, family in FAMILIES.items() for kind in family.kinds if kind != "images"]


@pytest.mark.parametrize("attention", ["sdpa", "eager", "flash"])
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_items_are_what_eager_maps_say(spy: str, name: str, kind: Kind, attention: str) -> None:
    model = FAMILIES[name].build("sdpa" if attention == "flash" else attention)
    inputs = FAMILIES[name].inputs(model, kind)
    expected = [reference.item for reference in reference_items(model, name, inputs)]
    facts = encoder_facts(model, name)
    with (
        fake_flash_attention(model) if attention == "flash" else nullcontext(),
        mmcompress.wrap(model, spy, keep=0.5) as handle,
        torch.no_grad(),
    ):
        assert handle.encoder.depth == facts.depth
        assert handle.encoder.used == facts.used
        assert handle.encoder.global_layers == facts.global_layers
        assert set(handle.encoder.missing) == set(facts.missing)
        model(**inputs)
    assert len(SEEN) == len(expected)
    for seen, wanted in zip(SEEN, expected, strict=True):
        assert seen.grids == wanted.grids
        assert seen.tiles.tolist() == wanted.tiles.tolist() and seen.crops == wanted.crops
        assert seen.modality == wanted.modality
        for field in fields(VisualItem):
            value = getattr(seen, field.name)
            if isinstance(value, torch.Tensor):
                assert_close(value.float(), getattr(wanted, field.name).float())
            elif isinstance(value, dict):
                assert set(value) == set(getattr(handle.needs, field.name))
                for layer, statistic in value.items():
                    assert_close(statistic, getattr(wanted, field.name)[layer])
        assert bool(seen.cls_rows) == (not facts.missing)


def test_only_what_is_declared_is_tapped() -> None:
    model = FAMILIES["llava"].build("sdpa")
    shared = model.model.vision_tower.config
    layers = model.model.vision_tower.encoder.layers
    with mmcompress.wrap(model, "vtc-cls(first_layer=1)", keep=0.5):
        assert [layer.self_attn.config is shared for layer in layers] == [True, False, True]
    with mmcompress.wrap(model, "uniform", keep=0.5):
        assert all(layer.self_attn.config is shared for layer in layers)
    assert all(layer.self_attn.config is shared for layer in layers)


def test_the_encoder_keeps_its_attention() -> None:
    """Under FlashAttention the tapped layers still run the FlashAttention kernel."""
    model = FAMILIES["llava"].build("sdpa")
    inputs = FAMILIES["llava"].inputs(model, "single")
    with fake_flash_attention(model) as calls, torch.no_grad():
        model.get_image_features(inputs["pixel_values"])
        untapped = len(calls)
        with mmcompress.wrap(model, "vtc-cls(first_layer=0)", keep=0.5):
            model.get_image_features(inputs["pixel_values"])
        assert len(calls) == 2 * untapped > 0


def test_a_missing_statistic_is_refused_with_the_reason() -> None:
    for name, family in FAMILIES.items():
        model = family.build("sdpa")
        if "cls_rows" in encoder_facts(model, name).missing:
            with pytest.raises(mmcompress.UnsupportedError, match=r"vtc-cls needs cls_rows.*no CLS token"):
                mmcompress.wrap(model, "vtc-cls", keep=0.5)
    assert {"cls_rows", "cls_logits", "cls_rows_full_width"} == NEEDS_CLS
