"""A draft: a smaller model that reads every prompt first, tells what it attends to, and may say how the prompt goes on.

It holds what it has read beside the model's own cache, so that later turns only tell it what is new.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial, reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer
from transformers.cache_utils import DynamicCache

from mmcompress import ops
from mmcompress.errors import SpecError, UnsupportedError
from mmcompress.integrations.hf.families import FAMILIES, Family
from mmcompress.integrations.hf.renamed import CACHE
from mmcompress.integrations.hf.taps import tap
from mmcompress.types import DraftNeeds

# What decides which tokens a picture or a clip becomes.
_GEOMETRY = (
    "image_grid_pinpoints",
    "vision_aspect_ratio",
    "vision_feature_select_strategy",
    "downsample_ratio",
    "scale_factor",
    "vision_config.image_size",
    "vision_config.patch_size",
    "vision_config.temporal_patch_size",
    "vision_config.spatial_merge_size",
)


@dataclass(frozen=True)
class Told:
    """Tokens as a model is told them.

    Args:
        ids: `[batch, tokens]`.
        valid: `[batch, tokens]` bool, which are no padding.
        positions: `[..., batch, tokens]`.
    """

    ids: Tensor
    valid: Tensor
    positions: Tensor

    def join(self, more: Told) -> Told:
        """These and `more` behind them."""
        return Told(*(torch.cat(parts, dim=-1) for parts in zip(self._parts, more._parts, strict=True)))

    def take(self, rows: Tensor) -> Told:
        """Only the rows numbered `rows`."""
        return Told(*(part.index_select(-2, rows.to(part.device)) for part in self._parts))

    def split(self, tokens: int) -> tuple[Told, Told]:
        """The first `tokens` and the others."""
        return Told(*(part[..., :tokens] for part in self._parts)), Told(*(part[..., tokens:] for part in self._parts))

    @property
    def _parts(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.ids, self.valid, self.positions


@dataclass(frozen=True)
class Reading:
    """How far a draft has got with a batch.

    Args:
        cache: what it holds.
        valid: `[cached, read]` bool, which of the tokens it has read are no padding.
        following: `[..., cached]` position of the token that comes next.
        rows: `[batch]`, the cached row that each row goes on from.
        unread: what it was told since.
        logits: `[cached, vocabulary]` of the token that comes next; None until all is read.
        observed: `[batch, layers, tokens]`, what was made of the attention to the tokens read last; None if not read.
    """

    cache: DynamicCache
    valid: Tensor
    following: Tensor
    rows: Tensor
    unread: Told | None = None
    logits: Tensor | None = None
    observed: Tensor | None = None

    def take(self, rows: Tensor) -> Reading:
        """Follow a batch whose rows became those numbered `rows`."""
        unread = None if self.unread is None else self.unread.take(rows)
        return replace(self, rows=self.rows[rows.to(self.rows.device)], unread=unread, observed=None)

    def crop(self, tokens: int) -> Reading | None:
        """All but the last `tokens`; None if some of them are read, which cannot be undone."""
        left = -tokens if self.unread is None else self.unread.ids.shape[1] - tokens
        if left < 0:
            return None
        return self if self.unread is None else replace(self, unread=self.unread.split(left)[0])


class _Local(threading.local):
    """What one thread is reading."""

    def __init__(self) -> None:
        self.asked: list[Tensor] | None = None
        self.keys: Tensor
        self.observed: list[Tensor]


class Draft:
    """The smaller model in a folder, beside the one that is wrapped."""

    def __init__(self, folder: str, family: Family, needs: DraftNeeds | None = None) -> None:
        """Load it.

        Raises:
            SpecError: there is no such model, or it reads other tokens than the one that is wrapped.
        """
        self._folder, self._needs = folder, needs
        self._model = _load(folder, family)
        own = FAMILIES[self._model.config.model_type](self._model.base_model)
        if problem := _mismatch(own, family):
            raise SpecError(f"draft={folder!r} does not fit {type(family.base).__name__}: {problem}.")
        self._decoder: Any = own.base.get_decoder()
        self._vocabulary = min(_text(own).vocab_size, _text(family).vocab_size)  # either may be padded
        ends = self._model.generation_config.eos_token_id
        self._ends = torch.tensor([] if ends is None else ends, dtype=torch.long).flatten()
        self._local = _Local()
        if needs is not None:
            layers = self._decoder.layers
            for layer in layers[round(needs.skip * len(layers)) :]:
                tap(layer.self_attn, partial(self._observe, needs))

    def hear(self, reading: Reading | None, told: Told) -> Reading:
        """What was read before, if anything, with more to be read."""
        if reading is not None:
            unread = told if reading.unread is None else reading.unread.join(told)
            return replace(reading, unread=unread, logits=None, observed=None) if told.ids.numel() else reading
        return Reading(
            cache=DynamicCache(config=self._decoder.config),
            valid=told.valid[:, :0],
            following=torch.zeros_like(told.positions[..., 0]),
            rows=torch.arange(len(told.ids), device=told.ids.device),
            unread=told,
        )

    @torch.no_grad()
    def read(self, reading: Reading, inputs: Mapping[str, Tensor], copies: int) -> Reading:
        """Read what is unread.

        Args:
            reading: what was read before, and what is to be read.
            inputs: pixels and whatever else the model takes of the pictures that are new.
            copies: so many rows in a row are the same, and `inputs` are those of one of them.

        Raises:
            UnsupportedError: there are copies, and what was read before tells them apart.
        """
        assert reading.unread is not None
        model, rows, told = self._model.to(reading.unread.ids.device), reading.rows, reading.unread
        if copies > 1:
            if reading.valid.shape[1]:
                raise UnsupportedError(
                    "beams cannot go on with another picture under a draft; start a new cache, or search without beams."
                )
            told, rows = told.take(torch.arange(0, len(rows), copies)), rows[::copies]
        if reading.valid.shape[1]:
            reading.cache.batch_select_indices(rows)
        valid = torch.cat([reading.valid[rows], told.valid], dim=1)
        local, length = self._local, told.ids.shape[1]
        local.keys, local.observed, local.asked = valid, [], [row.nonzero()[:, 0] for row in told.valid]
        try:
            hidden = self._run(told, valid, reading.cache, **{n: self._typed(part) for n, part in inputs.items()})
        finally:
            local.asked = None
        own = torch.arange(len(valid), device=valid.device)
        last = (told.valid * torch.arange(length, device=valid.device)).argmax(dim=1)
        cached = own.repeat_interleave(copies)
        observed = torch.stack(local.observed, dim=1)[cached, :, -length:] if local.observed else None
        return Reading(
            cache=reading.cache,
            valid=valid,
            following=told.positions[..., own, last] + 1,
            rows=cached,
            logits=model.get_output_embeddings()(hidden[own, last]),
            observed=observed,
        )

    @torch.no_grad()
    def expect(self, reading: Reading, tokens: int) -> Told:
        """How it would go on, greedily, at most so many `tokens`; the end of an answer ends a row."""
        assert reading.logits is not None
        logits, valid = reading.logits, reading.valid
        going = torch.ones_like(logits[:, 0], dtype=torch.bool)
        said: list[Told] = []
        while True:
            ids = logits[:, : self._vocabulary].argmax(dim=-1)
            said.append(Told(ids[:, None], going[:, None], (reading.following + len(said))[..., None]))
            valid = torch.cat([valid, going[:, None]], dim=1)
            going = going & ~torch.isin(ids, self._ends.to(ids.device))
            if len(said) == tokens or not bool(going.any()):
                break
            hidden = self._run(said[-1], valid, reading.cache)
            logits = self._model.get_output_embeddings()(hidden[:, -1])
        reading.cache.crop(1 - len(said))
        return reduce(Told.join, said).take(reading.rows)

    def _run(self, told: Told, valid: Tensor, cache: DynamicCache, **inputs: Tensor) -> Tensor:
        output = self._model.base_model(
            input_ids=told.ids,
            attention_mask=valid.long(),
            position_ids=told.positions,
            use_cache=True,
            **{CACHE: cache},
            **inputs,
        )
        hidden: Tensor = output.last_hidden_state
        return hidden

    def _typed(self, part: Tensor) -> Tensor:
        return part.to(self._model.device, self._model.dtype if part.is_floating_point() else part.dtype)

    def _observe(self, needs: DraftNeeds, query: Tensor, key: Tensor, mask: Any, kwargs: dict[str, Any]) -> None:
        local = self._local
        if local.asked is None:
            return
        observed = torch.zeros(local.keys.shape, device=key.device)
        for row, asked in enumerate(local.asked):
            seen = local.keys[row].nonzero()[:, 0]
            window = query[row : row + 1, :, asked[-needs.window :]]
            last_seen = torch.arange(len(seen) - window.shape[2], len(seen), device=key.device)
            rows = ops.attention_rows(window, key[row : row + 1, :, seen], kwargs["scaling"], last_seen)[0]
            observed[row, seen] = needs.observe(rows)
        local.observed.append(observed)


def _load(folder: str, family: Family) -> Any:
    """The model in `folder`, in the type of the one that is wrapped; nothing is downloaded."""
    if not Path(folder).is_dir():
        raise SpecError(f"draft={folder!r}: there is no such folder.")
    kind = family.config.model_type
    try:
        found = AutoConfig.from_pretrained(folder, local_files_only=True).model_type
        if found != kind:
            raise SpecError(f"draft={folder!r} holds a model of type {found!r}; a smaller {kind!r} is needed.")
        with torch.device("cpu"):  # the model to be wrapped may be on the meta device, as a context
            loaded: Any = AutoModelForImageTextToText.from_pretrained(
                folder, dtype=family.base.dtype, local_files_only=True, use_safetensors=True, output_loading_info=True
            )
    except SpecError:
        raise
    except Exception as error:  # there are as many ways as there are broken folders
        raise SpecError(f"draft={folder!r}: cannot be loaded: {' '.join(str(error).split())}") from error
    model, report = loaded
    if report["missing_keys"]:
        raise SpecError(f"draft={folder!r} lacks weights: {', '.join(sorted(report['missing_keys'])[:3])}.")
    return model.eval()


def _mismatch(draft: Family, family: Family) -> str:
    """Why both do not read the same tokens; "" if they do."""
    words = [_words(one.base.name_or_path) for one in (draft, family)]
    sizes = [_text(one).vocab_size for one in (draft, family)]
    if None in words and sizes[0] != sizes[1]:
        return f"it knows {sizes[0]} tokens, the model {sizes[1]}"
    if None not in words and words[0] != words[1]:
        return "its tokenizer has other tokens"
    if draft.token_ids != family.token_ids:
        return f"its placeholder tokens are {draft.token_ids}, those of the model {family.token_ids}"
    for name in _GEOMETRY:
        own, wanted = (_setting(one, name) for one in (draft, family))
        if own != wanted:
            return f"it sees pictures as other tokens, as its {name} is {own} and that of the model {wanted}"
    return ""


def _words(name: str) -> dict[str, int] | None:
    """The vocabulary of the tokenizer that a model was published with; None if it is not at hand."""
    try:
        vocabulary: dict[str, int] = AutoTokenizer.from_pretrained(name, local_files_only=True).get_vocab()
    except Exception:
        return None
    return vocabulary


def _text(family: Family) -> Any:
    return family.config.get_text_config()


def _setting(family: Family, name: str) -> Any:
    value = family.config
    for part in name.split("."):
        value = getattr(value, part, None)
    return value
