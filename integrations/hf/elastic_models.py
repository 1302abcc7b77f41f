"""`load`: published models with a dial, as transformers models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    CLIPVisionModel,
    GotOcr2ImageProcessorPil,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessorPil,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights

from mmcompress.elastic import Elastic, ElasticProjector, ImageSize
from mmcompress.errors import InputError, SpecError, UnsupportedError
from mmcompress.integrations.hf.checkpoints import TOKENFLEX, TOWER, Checkpoint, dial
from mmcompress.integrations.hf.dialled import DialledProjector
from mmcompress.integrations.hf.elastic_processors import ElasticProcessor, HDImages, hd_processor
from mmcompress.integrations.hf.processor_dial import tiles_of
from mmcompress.projectors.mqt import MQT
from mmcompress.projectors.tokenpacker import TokenPacker
from mmcompress.projectors.tokenpacker_hd import TokenPackerHD

_IMAGE_TOKENS = {TOKENFLEX.name: "<IMG_CONTEXT>"}
_LISTED = 3


class ElasticModel:
    """A model with a dial, and the processor that counts with it.

    Args:
        model: a transformers model.
        processor: its processor.
        dial: which budgets there are, and what each comes to.
    """

    def __init__(self, model: PreTrainedModel, processor: Any, dial: Elastic) -> None:
        self.model, self.processor, self.dial = model, processor, dial

    def budgets(self) -> Sequence[int]:
        """What the dial can be set to, ascending: a `range`, or else a tuple, of one number where it is fixed."""
        return self.dial.budgets()

    def tokens_for(self, image_size: ImageSize, budget: int) -> int:
        """How many tokens the LLM sees of an image of `(height, width)`.

        Raises:
            SpecError: `budget` is none of `budgets()`.
        """
        return self.dial.tokens_for(image_size, budget)

    @property
    def keep(self) -> int:
        """The budget in force."""
        return self._projector.budget

    def set(self, *, keep: int) -> AbstractContextManager[ElasticModel]:
        """Turn the dial for what is processed and generated from now on; as a context manager, only until its end.

        Raises:
            SpecError: `keep` is none of `budgets()`; the budget in force stays.
            UnsupportedError: the model's dial is a method.
        """
        projector = self._projector
        self.dial.require(keep)
        before = projector.budget
        self._turn(keep)

        @contextmanager
        def until() -> Iterator[ElasticModel]:
            try:
                yield self
            finally:
                self._turn(before)

        return until()

    def _turn(self, budget: int) -> None:
        self._projector.budget = self.processor.visual_tokens = budget

    @property
    def _projector(self) -> DialledProjector:
        projector = cast(Any, self.model).model.multi_modal_projector
        if not isinstance(projector, DialledProjector):
            raise UnsupportedError('the dial of this model is a method: mmcompress.wrap(model, "m3", keep=36).')
        return projector


def load(
    path: str | Path,
    *,
    keep: int | None = None,
    vision_tower: str | Path | None = None,
    tiles: int | None = None,
    dtype: torch.dtype | None = None,
) -> ElasticModel:
    """Load a published Matryoshka checkpoint: MQT, TokenPacker, TokenFLEX or M3, in its authors' format.

    Args:
        path: the folder, or a name on the Hugging Face hub.
        keep: visual tokens of an image, or of each of its tiles; by default as many as there can be. The dial of M3 is
            a method instead: `mmcompress.wrap(loaded.model, "m3", keep=36)`.
        vision_tower: folder or hub name of the tower, for checkpoints without one; by default what they name.
        tiles: of TokenPacker-HD, the largest number of tiles it was trained for: 9, 16 or 25.
        dtype: of the weights; by default that of the checkpoint.

    Raises:
        SpecError: the model has no such budget, or no such tiles, or brings its own tower.
        InputError: something cannot be read, or weights are missing, misshapen or unknown.
        UnsupportedError: the checkpoint is of another architecture, or lacks a tower that no other can replace.
    """
    checkpoint = Checkpoint(path)
    tokenizer, image_token = _tokenizer(checkpoint)
    image_id = int(tokenizer.convert_tokens_to_ids(image_token))
    if checkpoint.has_tower and vision_tower is not None:
        raise SpecError(f"{checkpoint.folder} holds the vision tower it was trained with; leave out vision_tower=.")
    tower = None if checkpoint.has_tower else _other_tower(checkpoint, vision_tower)
    vision: Any = checkpoint.vision_config() if tower is None else tower.config
    text: Any = checkpoint.text_config()
    text.vocab_size = max(text.vocab_size, image_id + 1)
    projector = checkpoint.projector(vision, text.hidden_size)
    if keep is not None:
        if projector is None:
            raise SpecError('the dial of this model is a method: load it, then mmcompress.wrap(model, "m3", keep=36).')
        projector.require(keep)
    hd = None if tiles is None else _hd(projector, tiles, vision.image_size)
    dtype = _dtype(checkpoint, dtype)
    model = _model(checkpoint, vision, text, image_id, projector, dtype)
    _fill(checkpoint, model, tower)
    if isinstance(projector, MQT):
        projector.precompute((vision.image_size // vision.patch_size) ** 2)
    model.to(dtype)
    model.generation_config.suppress_tokens = [image_id]
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    processor = _processor(checkpoint, vision, tokenizer, image_token, hd, elastic=projector is not None)
    loaded = ElasticModel(model.eval(), processor, hd or _dial(checkpoint, vision, projector))
    if projector is not None:
        loaded.set(keep=projector.budgets()[-1] if keep is None else keep)
    return loaded


class _Tiled(Elastic):
    """A projector's dial, where images are cut into tiles and each of them has the budget."""

    def __init__(self, projector: ElasticProjector, pixels: int, fewest: int, most: int) -> None:
        self.projector, self.pixels, self.fewest, self.most = projector, (pixels, pixels), fewest, most

    def budgets(self) -> Sequence[int]:
        return self.projector.budgets()

    def require(self, budget: int) -> None:
        self.projector.require(budget)

    def tokens_for(self, image_size: ImageSize, budget: int) -> int:
        tiles = tiles_of(image_size, self.pixels, self.fewest, self.most)
        return tiles * self.projector.tokens_for(self.pixels, budget)


def _dial(checkpoint: Checkpoint, vision: Any, projector: ElasticProjector | None) -> Elastic:
    if projector is None:
        return dial(checkpoint, vision)
    cut = checkpoint.tiles()
    return projector if cut is None else _Tiled(projector, vision.image_size, *cut)


def _hd(projector: ElasticProjector | None, tiles: int, pixels: int) -> TokenPackerHD:
    if not isinstance(projector, TokenPacker):
        raise SpecError("tiles= is for TokenPacker-HD; other models find in their configuration how to cut images.")
    return TokenPackerHD(projector, tiles, pixels)


def _tokenizer(checkpoint: Checkpoint) -> tuple[Any, str]:
    """The tokenizer, padding on the left, and its placeholder of images, which is new to most checkpoints."""
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint.folder)
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"{checkpoint.folder}: its tokenizer cannot be loaded: {error}") from error
    token = _IMAGE_TOKENS.get(checkpoint.format.name, "<image>")
    if token not in tokenizer.get_vocab():
        tokenizer.add_tokens([token], special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    tokenizer.padding_side = "left"
    return tokenizer, token


def _other_tower(checkpoint: Checkpoint, given: str | Path | None) -> Any:
    """A tower that is no part of the checkpoint."""
    kind, name = checkpoint.format, given or checkpoint.config.get("mm_vision_tower")
    if kind.own_tower:
        raise UnsupportedError(f"{checkpoint.folder} holds no vision tower, and {kind.own_tower}.")
    if name is None:
        raise InputError(f"{checkpoint.folder} neither holds nor names its vision tower: give vision_tower=.")
    try:
        return CLIPVisionModel.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise InputError(f"the vision tower {name} cannot be loaded: {error}; give vision_tower=.") from error


def _dtype(checkpoint: Checkpoint, dtype: torch.dtype | None) -> torch.dtype:
    named = getattr(torch, str(checkpoint.config.get("dtype", checkpoint.config.get("torch_dtype"))), None)
    return dtype or (named if isinstance(named, torch.dtype) else torch.float32)


def _model(
    checkpoint: Checkpoint,
    vision: Any,
    text: Any,
    image_id: int,
    projector: ElasticProjector | None,
    dtype: torch.dtype,
) -> Any:
    """The model without its weights."""
    layers = checkpoint.format.layers
    if isinstance(layers, list) and vision.num_hidden_layers <= max(layers):
        raise UnsupportedError(
            f"{checkpoint.format.name} reads layers {', '.join(map(str, layers))} of the vision tower, which has "
            f"{vision.num_hidden_layers}."
        )
    resolutions = checkpoint.resolutions()
    settings: dict[str, Any] = dict(
        vision_config=vision,
        text_config=text,
        image_token_index=image_id,
        vision_feature_layer=layers,
        vision_feature_select_strategy="full" if checkpoint.format is TOKENFLEX else "default",
    )
    with no_init_weights():
        if resolutions:
            pinpoints = [list(resolution) for resolution in resolutions]
            tiled = LlavaNextConfig(**settings, image_grid_pinpoints=pinpoints)
            return LlavaNextForConditionalGeneration._from_config(tiled, dtype=dtype)
        model: Any = LlavaForConditionalGeneration._from_config(LlavaConfig(**settings), dtype=dtype)
    if projector is not None:
        norm = None
        if checkpoint.format is TOKENFLEX:  # what transformers takes from this tower is not normalised yet
            norm, model.model.vision_tower.post_layernorm = model.model.vision_tower.post_layernorm, nn.Identity()
        model.model.multi_modal_projector = DialledProjector(projector, norm)
    return model


def _fill(checkpoint: Checkpoint, model: Any, tower: Any) -> None:
    """Copy all weights into the model.

    Raises:
        InputError: some are missing, unknown or of another shape.
    """
    wanted, tokens = model.state_dict(), checkpoint.text_config().vocab_size
    missing, unknown, misshapen = set(wanted), [], []
    with torch.no_grad():
        if tower is not None:
            for name, value in tower.state_dict().items():
                missing.discard(TOWER + name)
                wanted[TOWER + name].copy_(value)
        for name, value in checkpoint.tensors():
            new = checkpoint.renamed(name)
            if new is None or new not in wanted:
                unknown.append(name)
                continue
            missing.discard(new)
            target = wanted[new]
            if new.endswith(("embed_tokens.weight", "lm_head.weight")) and len(value) == tokens < len(target):
                value = _with_new_rows(value, len(target), is_input=new.endswith("embed_tokens.weight"))
            if value.shape != target.shape:
                misshapen.append(f"{name} is {list(value.shape)} instead of {list(target.shape)}")
                continue
            target.copy_(value)
    if model.config.text_config.tie_word_embeddings:
        missing.discard("lm_head.weight")
    problems = [
        f"{what} {', '.join(sorted(names)[:_LISTED])}"
        + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")
        for what, names in (("missing", missing), ("unknown", unknown), ("misshapen", misshapen))
        if names
    ]
    if problems:
        raise InputError(
            f"{checkpoint.folder} does not fit {checkpoint.format.name}, with today's names for what is missing: "
            f"{'; '.join(problems)}."
        )


def _with_new_rows(rows: Tensor, count: int, *, is_input: bool) -> Tensor:
    """`rows` `[tokens, hidden]` with those of tokens the checkpoint did not have: their mean, or for logits zeros."""
    new = rows.float().mean(dim=0).to(rows.dtype) if is_input else torch.zeros_like(rows[0])
    return torch.cat([rows, new.expand(count - len(rows), -1)])


def _processor(
    checkpoint: Checkpoint, vision: Any, tokenizer: Any, image_token: str, hd: TokenPackerHD | None, *, elastic: bool
) -> Any:
    size = int(vision.image_size)
    square = {"height": size, "width": size}
    config = checkpoint.config
    shared: dict[str, Any] = dict(
        patch_size=int(vision.patch_size),
        vision_feature_select_strategy="default",
        image_token=image_token,
        num_additional_image_tokens=1,
        chat_template=getattr(tokenizer, "chat_template", None),
    )
    if checkpoint.resolutions():
        pinpoints = [list(resolution) for resolution in checkpoint.resolutions()]
        images: Any = LlavaNextImageProcessorPil(
            size={"shortest_edge": size}, crop_size=square, image_grid_pinpoints=pinpoints
        )
        return LlavaNextProcessor(images, tokenizer, **shared)
    if hd is not None:
        return hd_processor(HDImages(), tokenizer, hd, **shared)
    if checkpoint.format is TOKENFLEX:
        cut = checkpoint.tiles()
        fewest, most = cut or (1, 1)
        images = GotOcr2ImageProcessorPil(
            size=square,
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
            crop_to_patches=cut is not None,
            min_patches=fewest,
            max_patches=most,
        )
    else:
        images = LlavaImageProcessorPil(
            size={"shortest_edge": size}, crop_size=square, do_pad=config.get("image_aspect_ratio") == "pad"
        )
    return (ElasticProcessor if elastic else LlavaProcessor)(images, tokenizer, **shared)
