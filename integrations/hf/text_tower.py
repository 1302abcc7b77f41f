"""The text side of a CLIP: how much every token has to do with what the prompt asks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import AutoConfig, AutoTokenizer, CLIPModel

from mmcompress.errors import SpecError, UnsupportedError
from mmcompress.integrations.hf.families import Family

_MARK = "\ue000"  # stands for a question; no template says it


class TextTower(nn.Module):
    """A CLIP's text encoder with the projections of both sides, for a model that sees through its vision encoder.

    Prompts arrive as token ids. They are decoded by the model's own tokenizer, and what the chat template puts around
    a question is left out; so the tower may have another vocabulary.
    """

    def __init__(self, folder: str, family: Family) -> None:
        """Load the CLIP in `folder`, and the tokenizer of the model.

        Raises:
            SpecError: there is no such CLIP, or it does not fit the model's vision encoder.
            UnsupportedError: the model sees through no CLIP, or its tokenizer is not at hand.
        """
        super().__init__()
        config: Any = family.config.vision_config
        if config.model_type != "clip_vision_model":
            raise UnsupportedError(
                f"text_tower={folder!r}: {type(family.base).__name__} sees through {config.model_type!r}, and only "
                "the features of a CLIP can be compared with text."
            )
        clip, self._tokenizer = _load(folder)
        if clip.config.vision_config.hidden_size != config.hidden_size:
            raise SpecError(
                f"text_tower={folder!r} reads features of width {clip.config.vision_config.hidden_size}, but the "
                f"vision encoder's are {config.hidden_size} wide; give the CLIP that the encoder comes from."
            )
        self._text, self._text_projection = clip.text_model, clip.text_projection
        self._norm, self._visual_projection = clip.vision_model.post_layernorm, clip.visual_projection
        self._length = clip.config.text_config.max_position_embeddings
        self._prompts = _prompt_tokenizer(family.base.name_or_path, folder)
        self._before, self._after = _frame(self._prompts)

    @torch.no_grad()
    def relevance(self, features: Tensor, ids: Tensor) -> Tensor:
        """Cosine `[text_chunks, tokens]` of `features` `[tokens, width]` with what a prompt of token `ids` asks."""
        self.to(features.device)
        chunks = self._tokenizer(
            self.question(ids),
            truncation=True,
            max_length=self._length,
            return_overflowing_tokens=True,
            padding=True,
            return_tensors="pt",
        ).to(features.device)
        read = self._text(input_ids=chunks["input_ids"], attention_mask=chunks["attention_mask"])
        seen = self._visual_projection(self._norm(features.float()))
        return cosines(self._text_projection(read.pooler_output), seen)

    def question(self, ids: Tensor) -> str:
        """What the user wrote: the text of `ids` without the words that the chat template begins and ends with."""
        words = _words(self._prompts, ids.tolist())
        begin = _shared(words, self._before)
        end = _shared(words[begin:][::-1], self._after[::-1])
        return " ".join(words[begin : len(words) - end])


def cosines(texts: Tensor, patches: Tensor) -> Tensor:
    """Cosine of every one of `texts` `[texts, dim]` with every one of `patches` `[patches, dim]`, in float32."""
    return normalize(texts.float(), dim=-1) @ normalize(patches.float(), dim=-1).T


def _load(folder: str) -> tuple[Any, Any]:
    """The CLIP in `folder` and its tokenizer; nothing is downloaded."""
    if not Path(folder).is_dir():
        raise SpecError(f"text_tower={folder!r}: there is no such folder.")
    try:
        kind = AutoConfig.from_pretrained(folder, local_files_only=True).model_type
        if kind != "clip":
            raise SpecError(f"text_tower={folder!r} holds a model of type {kind!r}; a 'clip' is needed.")
        with torch.device("cpu"):  # the model to be wrapped may be on the meta device, as a context
            loaded: Any = CLIPModel.from_pretrained(
                folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
            )
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except SpecError:
        raise
    except Exception as error:  # there are as many ways as there are broken folders
        raise SpecError(f"text_tower={folder!r}: cannot be loaded: {' '.join(str(error).split())}") from error
    clip, found = loaded
    if found["missing_keys"]:
        raise SpecError(f"text_tower={folder!r} lacks weights: {', '.join(sorted(found['missing_keys'])[:3])}.")
    return clip.eval(), tokenizer


def _prompt_tokenizer(name: str, folder: str) -> Any:
    """The tokenizer that the wrapped model was published with."""
    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:
        raise UnsupportedError(
            f"text_tower={folder!r}: prompts are decoded by the model's own tokenizer, which cannot be loaded from "
            f"{name!r}, where the model comes from: {' '.join(str(error).split())}"
        ) from error


def _frame(tokenizer: Any) -> tuple[list[str], list[str]]:
    """The words before and after a question; none without a chat template."""
    if tokenizer.chat_template is None:
        return [], []
    marked = [{"role": "user", "content": [{"type": "text", "text": _MARK}]}]
    before, _, after = tokenizer.apply_chat_template(marked, add_generation_prompt=True, tokenize=False).partition(
        _MARK
    )
    before_ids, after_ids = tokenizer([before, after], add_special_tokens=False)["input_ids"]
    return _words(tokenizer, before_ids), _words(tokenizer, after_ids)


def _words(tokenizer: Any, ids: list[int]) -> list[str]:
    return tokenizer.decode(ids, skip_special_tokens=True).split()


def _shared(one: list[str], other: list[str]) -> int:
    """How many words both begin with."""
    count = 0
    for left, right in zip(one, other, strict=False):
        if left != right:
            break
        count += 1
    return count
