"""A saved model is a folder as on the hub: it loads with nothing missing, and its processor writes our prompts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from tiny_models import SIDE, TINY_MODELS, save_tiny_model
from transformers import AutoModelForImageTextToText, PreTrainedModel

from mmcompress.errors import SpecError
from mmcompress.evals.micro.processing import load_processor
from mmcompress.evals.micro.saving import build_tokenizer
from mmcompress.evals.micro.vocabulary import TOKENS

MARKERS = {
    "llava": "<image>",
    "llava_next": "<image>",
    "qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|>",
}
QUESTION = "is there a red star ?"


@pytest.fixture(scope="module", params=TINY_MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def saved(name: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Path]:
    folder = tmp_path_factory.mktemp(name)
    return save_tiny_model(name, folder), folder


def user(*content: str) -> dict[str, object]:
    """A message; `image` stands for a picture, all else is text."""
    parts = [{"type": "image"} if part == "image" else {"type": "text", "text": part} for part in content]
    return {"role": "user", "content": parts}


def test_the_model_comes_back_whole(saved: tuple[PreTrainedModel, Path]) -> None:
    model, folder = saved
    loaded, info = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert type(loaded) is type(model) and not any(info.values()), info
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in loaded.state_dict().items())


def test_the_weights_are_named_as_on_the_hub(name: str, saved: tuple[PreTrainedModel, Path]) -> None:
    with safe_open(saved[1] / "model.safetensors", "pt") as file:
        keys = set(file.keys())
    llava = {
        "language_model.lm_head.weight",
        "language_model.model.embed_tokens.weight",
        "multi_modal_projector.linear_1.weight",
        "vision_tower.vision_model.embeddings.class_embedding",
    }
    expected = {
        "llava": llava,
        "llava_next": {*llava, "image_newline"},
        "qwen2_5_vl": {"lm_head.weight", "model.embed_tokens.weight", "visual.patch_embed.proj.weight"},
    }
    assert expected[name] <= keys


def test_chats_become_our_prompts(name: str, saved: tuple[PreTrainedModel, Path]) -> None:
    write, image = load_processor(saved[1]).apply_chat_template, MARKERS[name]
    asked = write([user("image", QUESTION)], add_generation_prompt=True)
    assert asked == f"<s> USER: {image} {QUESTION} ASSISTANT:"
    two = write([user("image", "image", QUESTION)], add_generation_prompt=True)
    assert two == f"<s> USER: {image} {image} {QUESTION} ASSISTANT:"
    answer = {"role": "assistant", "content": "yes"}
    turns = write([user("image", QUESTION), answer, user("what color ?")], add_generation_prompt=True)
    assert turns == f"{asked} yes </s> USER: what color ? ASSISTANT:"
    assert write([{"role": "user", "content": QUESTION}]) == f"<s> USER: {QUESTION}"


def test_the_processor_reads_words_and_pictures(name: str, saved: tuple[PreTrainedModel, Path]) -> None:
    processor = load_processor(saved[1])
    picture = Image.new("RGB", (2 * SIDE, SIDE), "white")
    prompt = f"<s> USER: {MARKERS[name]} {QUESTION} ASSISTANT:"
    inputs = processor(text=prompt, images=picture, return_tensors="pt")
    before, after = prompt.split(MARKERS[name])
    tokens = processor.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])
    words = [
        token for token in tokens if token not in ("<image>", "<|image_pad|>", "<|vision_start|>", "<|vision_end|>")
    ]
    assert words == [*before.split(), *after.split()]
    assert inputs["pixel_values"].min() == inputs["pixel_values"].max() == 1
    assert processor.decode(inputs["input_ids"][0], skip_special_tokens=True) == f"USER: {QUESTION} ASSISTANT:"


def test_the_saved_model_answers(name: str, saved: tuple[PreTrainedModel, Path]) -> None:
    model, folder = saved
    pictures = [Image.new("RGB", size, color) for size, color in (((112, 84), "red"), ((56, 112), "blue"))]
    prompts = [f"<s> USER: {MARKERS[name]} {QUESTION} ASSISTANT:", f"<s> USER: {MARKERS[name]} what ? ASSISTANT:"]
    inputs = load_processor(folder)(
        text=prompts, images=pictures, return_tensors="pt", padding=True, padding_side="left"
    )
    answers = model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert answers.shape == (2, inputs["input_ids"].shape[1] + 2)


def test_every_word_has_the_id_of_its_place() -> None:
    tokenizer = build_tokenizer(TOKENS)
    assert tokenizer.convert_ids_to_tokens(range(len(TOKENS))) == list(TOKENS)
    ids = tokenizer("<s> USER: what zebra </s>")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", "USER:", "what", "<unk>", "</s>"]


def test_vocabularies_that_would_break_prompts_are_refused() -> None:
    with pytest.raises(SpecError, match="begin with <unk>, <s>"):
        build_tokenizer(TOKENS[1:])
    with pytest.raises(SpecError, match="what occurs more often"):
        build_tokenizer((*TOKENS, "what"))
