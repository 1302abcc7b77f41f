"""What a method is shown of a row inside the LLM is what the unwrapped model computes there."""

from __future__ import annotations

import pytest
import torch
from hf.families import FAMILIES, IMAGE

import mmcompress
from mmcompress.llm_method import LLMMethod, PromptRow
from mmcompress.types import Selection

LAYER = 2


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "smolvlm"])
@torch.no_grad()
def test_normed_states_and_keys(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family = FAMILIES[name]
    model = family.build("sdpa")
    inputs = family.inputs(model, "mixed")
    whole = model(**inputs, use_cache=True, output_hidden_states=True)
    normed = model.base_model.get_decoder().norm(whole.hidden_states[LAYER])
    keys = whole.past_key_values.layers[LAYER - 1].keys
    shown: list[tuple[PromptRow, int]] = []
    reduce = LLMMethod.reduce

    def noted(method: LLMMethod, row: PromptRow, left: int) -> Selection:
        shown.append((row, left))
        return reduce(method, row, left)

    monkeypatch.setattr(LLMMethod, "reduce", noted)
    with mmcompress.wrap(model, "dart", layer=LAYER, keep=3):
        model(**inputs)
    visual = inputs["input_ids"] == IMAGE
    rows = visual.any(dim=1).nonzero()[:, 0].tolist()
    assert len(rows) == len(shown) < len(visual)
    for number, (row, left) in zip(rows, shown, strict=True):
        valid = inputs["attention_mask"][number].bool()
        assert row.previous is not None and row.normed is not None
        torch.testing.assert_close(row.normed, normed[number, valid])
        torch.testing.assert_close(row.previous.key, keys[number][:, valid])
        assert row.visual.tolist() == visual[number, valid].tolist()
        assert row.layer == LAYER and row.total == int(visual[number].sum())
        assert left < row.total
