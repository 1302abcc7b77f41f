"""Writing an embedded model as a folder which transformers and vLLM load alike.

`save` writes all of it: weights under the names that models on the hub have, a tokenizer of whole words, the
processor's settings and the chat template. Prompts read `<s> USER: <image> what is this ? ASSISTANT:` and answers end
with `</s>`; the tokenizer adds neither.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from mmcompress.errors import SpecError
from mmcompress.evals.micro.vocabulary import SPECIAL_TOKENS

_PATCH = 14
# Pictures become values in -1..1 in all families.
_CENTRED = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
_CHAT_TEMPLATE = (
    "<s>{% for message in messages %} {{ message['role'] | upper }}:"
    "{% if message['content'] is string %} {{ message['content'] }}{% else %}{% for part in message['content'] %}"
    " {{ part['text'] if part['type'] == 'text' else MARKERS[part['type']] }}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %} </s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)


@dataclass(frozen=True)
class ProcessorFiles:
    """What a processor is loaded from: its settings, and the template that turns chats into prompts.

    The settings are written out rather than saved by a processor, because those of Qwen-VL cannot be made without
    `torchvision`.
    """

    settings: Mapping[str, Any]
    chat_template: str


def llava_processor(side: int) -> ProcessorFiles:
    """The processor of a LLaVA whose tower sees pictures of `side` pixels."""
    return _llava_like("LlavaProcessor", "CLIPImageProcessor", side, {})


def llava_next_processor(side: int, pinpoints: Sequence[tuple[int, int]]) -> ProcessorFiles:
    """The processor of a LLaVA-NeXT with crops of `side` pixels and these resolutions (height, width)."""
    grid = {"image_grid_pinpoints": [list(pinpoint) for pinpoint in pinpoints], "do_pad": True}
    return _llava_like("LlavaNextProcessor", "LlavaNextImageProcessor", side, grid)


def qwen_processor(min_pixels: int, max_pixels: int) -> ProcessorFiles:
    """The processor of a Qwen2.5-VL which scales pictures to between `min_pixels` and `max_pixels`."""
    size = {"shortest_edge": min_pixels, "longest_edge": max_pixels}
    patches = {"patch_size": _PATCH, "merge_size": 2, "temporal_patch_size": 2, "size": size, **_CENTRED}
    settings = {
        "processor_class": "Qwen2_5_VLProcessor",
        "image_processor": {"image_processor_type": "Qwen2VLImageProcessor", **patches},
        "video_processor": {"video_processor_type": "Qwen2VLVideoProcessor", **patches},
    }
    image, video = (f"<|vision_start|><|{kind}_pad|><|vision_end|>" for kind in ("image", "video"))
    return ProcessorFiles(settings, _chat_template(image, video))


def build_tokenizer(tokens: Sequence[str]) -> PreTrainedTokenizerFast:
    """Make a tokenizer whose tokens are whole words; a token's id is its place in `tokens`.

    Raises:
        SpecError: `tokens` does not begin with `SPECIAL_TOKENS`, or a token occurs twice.
    """
    if tuple(tokens[: len(SPECIAL_TOKENS)]) != SPECIAL_TOKENS:
        raise SpecError(f"the tokens must begin with {', '.join(SPECIAL_TOKENS)}.")
    if repeated := sorted({token for token in tokens if tokens.count(token) > 1}):
        raise SpecError(f"every token must occur once, but {', '.join(repeated)} occurs more often.")
    words = Tokenizer(WordLevel({token: place for place, token in enumerate(tokens)}, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    markers = [token for token in SPECIAL_TOKENS if token.startswith("<")]
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=markers[4:],
    )


def save(folder: Path, model: PreTrainedModel, tokens: Sequence[str], processor: ProcessorFiles) -> None:
    """Write `model` to `folder` with everything needed to load and ask it.

    Raises:
        SpecError: `tokens` is no vocabulary for `build_tokenizer`.
    """
    build_tokenizer(tokens).save_pretrained(folder)
    model.save_pretrained(folder)
    rename_as_on_the_hub(folder / "model.safetensors")
    (folder / "processor_config.json").write_text(json.dumps(processor.settings, indent=2) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(processor.chat_template, encoding="utf-8")


def _llava_like(name: str, image_processor: str, side: int, extra: Mapping[str, Any]) -> ProcessorFiles:
    square = {"height": side, "width": side}
    images = {"image_processor_type": image_processor, "size": square, "crop_size": square, **_CENTRED, **extra}
    settings = {
        "processor_class": name,
        "image_processor": images,
        "image_token": "<image>",
        "num_additional_image_tokens": 1,  # the tower's [CLS], which `vision_feature_select_strategy` drops
        "patch_size": _PATCH,
        "vision_feature_select_strategy": "default",
    }
    return ProcessorFiles(settings, _chat_template("<image>", "<video>"))


def _chat_template(image: str, video: str) -> str:
    return _CHAT_TEMPLATE.replace("MARKERS", str({"image": image, "video": video}))


def rename_as_on_the_hub(weights: Path) -> None:
    """Give the vision tower's weights in a file the names that models on the hub have."""
    # transformers reads the tower of a LLaVA with and without this prefix and writes it without; vLLM insists on it.
    old, new = "vision_tower.", "vision_tower.vision_model."
    tensors = load_file(weights)
    if not any(name.startswith(new) for name in tensors):
        tensors = {name.replace(old, new, 1) if name.startswith(old) else name: t for name, t in tensors.items()}
        save_file(tensors, weights, metadata={"format": "pt"})
