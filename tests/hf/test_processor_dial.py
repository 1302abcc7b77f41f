"""Dials in processors: the count that is foretold is the count that comes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GotOcr2ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import mmcompress
from mmcompress import InputError, SpecError, UnsupportedError
from mmcompress.integrations.hf.processor_dial import processor_dial

QWEN = transformers.Qwen2_5_VLConfig()
INTERNVL = transformers.InternVLConfig()
sides = st.integers(28, 900)


def image(height: int, width: int) -> Any:
    return np.zeros((height, width, 3), dtype=np.uint8)


@settings(max_examples=20, deadline=None)
@given(sides, sides, st.sampled_from([1, 4, 16, 100, 256]))
def test_qwen_has_as_many_as_foretold(height: int, width: int, keep: int) -> None:
    arguments = mmcompress.processor_kwargs(QWEN, keep)["images_kwargs"]
    grids = Qwen2VLImageProcessorPil()(images=[image(height, width)], **arguments)["image_grid_thw"]
    foretold = processor_dial(QWEN).tokens_for((height, width), keep)
    assert int(np.prod(grids[0])) // 4 == foretold
    if max(height, width) < 4 * min(height, width) and keep >= 4:
        assert foretold <= keep


@settings(max_examples=10, deadline=None)
@given(sides, sides, st.sampled_from([256, 768, 1280, 3328]))
def test_internvl_has_as_many_as_foretold(height: int, width: int, keep: int) -> None:
    arguments = mmcompress.processor_kwargs(INTERNVL, keep)["images_kwargs"]
    processor = GotOcr2ImageProcessorPil(size={"height": 448, "width": 448})
    tiles = len(processor(images=[image(height, width)], **arguments)["pixel_values"])
    foretold = processor_dial(INTERNVL).tokens_for((height, width), keep)
    assert tiles * 256 == foretold <= keep


def test_images_that_a_processor_refuses_have_no_count() -> None:
    with pytest.raises(InputError, match="an image of 10 x 3000 pixels is refused: absolute aspect ratio"):
        processor_dial(QWEN).tokens_for((10, 3000), 16)


def test_qwen3_counts_larger_squares() -> None:
    config = transformers.Qwen3VLConfig()
    assert processor_dial(config).tokens_for((320, 320), 100) == 100
    assert mmcompress.processor_kwargs(config, 100)["images_kwargs"]["size"]["longest_edge"] == 100 * 32**2


@pytest.mark.parametrize(
    ("config", "keep", "message"),
    [
        (INTERNVL, 512, "Tiles has no budget 512: it takes 256, 768, 1024"),
        (QWEN, 0, "Pixels has no budget 0: it takes 1 to 16384"),
        (QWEN, 0.5, "Pixels has no budget 0.5"),
        (QWEN, True, "Pixels has no budget True"),
    ],
)
def test_budgets_outside_the_dial_are_refused(config: Any, keep: Any, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        mmcompress.processor_kwargs(config, keep)


@pytest.mark.parametrize("model", [SimpleNamespace(config=transformers.LlavaConfig()), object()])
def test_models_without_such_a_dial_are_refused(model: Any) -> None:
    with pytest.raises(UnsupportedError, match=r"has no dial that is known here; those of qwen2_vl, .*internvl have"):
        mmcompress.processor_kwargs(model, 16)
