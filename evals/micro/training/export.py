"""Training weights as folders that engines load, and such folders as a start for training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForImageTextToText, CLIPModel, PreTrainedTokenizerFast

from mmcompress.errors import InputError, SpecError
from mmcompress.evals.micro import MODELS, saving
from mmcompress.evals.micro.training import architectures
from mmcompress.evals.micro.training.families import Llava, LlavaNext
from mmcompress.evals.micro.training.recipes import Recipe
from mmcompress.evals.micro.training.stages import Modules
from mmcompress.evals.micro.vocabulary import TOKENS

TEXT_TOWER = "text-tower"
"""Folder, within a model's, of the CLIP that was trained beside its encoder."""

_MIN_PIXELS, _MAX_PIXELS = 168 * 168, 672 * 672


def write(modules: Modules, recipe: Recipe, folder: Path) -> None:
    """Write the model, and the CLIP if there is one, in bfloat16."""
    plain = recipe.build()
    plain.load_state_dict(modules.model.state_dict())
    plain.generation_config.update(do_sample=False, max_new_tokens=16)
    saving.save(folder, plain.bfloat16(), TOKENS, _processor(plain, recipe))
    if modules.clip is not None:
        tower = architectures.clip(plain.config.vision_config)
        tower.load_state_dict(modules.clip.state_dict())
        tower.bfloat16().save_pretrained(folder / TEXT_TOWER)
        _text_tower_tokenizer().save_pretrained(folder / TEXT_TOWER)


def take_weights(model: Any, recipe: Recipe, folder: Path | None) -> None:
    """Copy what `recipe` starts with from the model in `folder`, or from the embedded one.

    Raises:
        SpecError: no folder is given, and the model is not embedded here.
        InputError: there is no model in it, or one of other sizes.
    """
    folder = folder or MODELS.get(str(recipe.start))
    if folder is None:
        raise SpecError(f"this model starts from the weights of {recipe.start}: name its folder with --start.")
    weights = _read(folder).state_dict()
    if not recipe.keeps_language_model:
        encoder = "model.vision_tower." if hasattr(model.model, "vision_tower") else "model.visual."
        weights = {name: tensor for name, tensor in weights.items() if name.startswith(encoder)}
    try:
        model.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise InputError(f"the model in {folder} does not fit: {error}") from error


def take_all(modules: Modules, folder: Path) -> None:
    """Copy all of the finished model in `folder`, and of the CLIP beside it; without one there, none is trained on.

    Raises:
        InputError: there is no model in it, or one of another architecture.
    """
    source = _read(folder)
    wanted, found = (type(model).__name__ for model in (modules.model, source))
    if wanted != found:
        raise InputError(f"{folder} holds a {found}, but what is to be trained on is a {wanted}.")
    try:
        modules.model.load_state_dict(source.state_dict())
        if not (folder / TEXT_TOWER).exists():
            modules.clip = None
        if modules.clip is not None:
            modules.clip.load_state_dict(
                CLIPModel.from_pretrained(folder / TEXT_TOWER, dtype=torch.float32).state_dict()
            )
    except RuntimeError as error:
        raise InputError(f"the model in {folder} does not fit: {error}") from error


def _read(folder: Path) -> Any:
    try:
        return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise InputError(f"no model to start from can be read in {folder}: {error}") from error


def _text_tower_tokenizer() -> PreTrainedTokenizerFast:
    """The shared words, each text between `<s>` and an end token of its own, as CLIP's are."""
    tokens = (*TOKENS[: architectures.END_OF_TEXT], "<|endoftext|>")
    tokenizer = saving.build_tokenizer(tokens)
    begin, end = ("<s>", architectures.TOKEN_IDS["<s>"]), ("<|endoftext|>", architectures.END_OF_TEXT)
    template = TemplateProcessing(single=f"{begin[0]} $A {end[0]}", special_tokens=[begin, end])
    tokenizer.backend_tokenizer.post_processor = template
    tokenizer.eos_token = end[0]
    return tokenizer


def _processor(model: Any, recipe: Recipe) -> saving.ProcessorFiles:
    match recipe.family:
        case LlavaNext():
            pinpoints = [tuple(pinpoint) for pinpoint in model.config.image_grid_pinpoints]
            return saving.llava_next_processor(model.config.vision_config.image_size, pinpoints)
        case Llava():
            return saving.llava_processor(model.config.vision_config.image_size)
        case _:
            return saving.qwen_processor(_MIN_PIXELS, _MAX_PIXELS)
