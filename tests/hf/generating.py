"""Greedy decoding as the tests of the engine want it: so many tokens, whatever they are, and the logits of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel


def generating(default: int) -> Callable[..., Any]:
    """A `generate` of `default` tokens, where a test does not ask for another number or another way to decode."""

    def generate(model: PreTrainedModel, inputs: dict, steps: int = default, **options: Any) -> Any:
        options = {"max_new_tokens": steps, "min_new_tokens": steps, "do_sample": False, **options}
        return model.generate(**inputs, **options, return_dict_in_generate=True, output_logits=True)

    return generate
