"""How a model of transformers is asked as lmms-eval words it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image

Messages = Sequence[Mapping[str, Any]]
"""Turns of a chat as `apply_chat_template` takes them."""

MAX_NEW_TOKENS = 1024  # of tasks that do not say


def encode(model: Any, processor: Any, chats: Sequence[Messages], images: Sequence[Sequence[Image.Image]]) -> Any:
    """The model's inputs for a batch of chats, each with its images in their order."""
    inputs = processor(
        images=images if any(images) else None,
        text=[processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats],
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )
    return inputs.to(model.device, model.dtype)


def answer(model: Any, processor: Any, inputs: Any, settings: Mapping[str, Any]) -> tuple[list[str], torch.Tensor]:
    """What is said under a task's settings of generation, and its tokens `[rows, longest answer]`."""
    wanted = dict(settings)
    stops = wanted.pop("until", None) or []
    output = model.generate(**inputs, **_generation(wanted))[:, inputs["input_ids"].shape[1] :]
    texts = processor.batch_decode(output, skip_special_tokens=True)
    return [_until(text, [stops] if isinstance(stops, str) else stops) for text in texts], output


def _generation(wanted: dict[str, Any]) -> dict[str, Any]:
    """A task's settings as transformers takes them: greedy unless it asks for a temperature."""
    wanted = {name: value for name, value in wanted.items() if name not in ("image_aspect_ratio", "max_length")}
    sampled = bool(wanted.pop("do_sample", False)) and wanted.get("temperature", 1.0) > 0
    if not sampled:
        wanted = {name: value for name, value in wanted.items() if name not in ("temperature", "top_p", "top_k")}
    return {"max_new_tokens": MAX_NEW_TOKENS, **wanted, "do_sample": sampled}


def _until(text: str, stops: Sequence[str]) -> str:
    """`text` up to the first of `stops`."""
    ends = [text.index(stop) for stop in stops if stop and stop in text]
    return text[: min(ends, default=len(text))].strip()
