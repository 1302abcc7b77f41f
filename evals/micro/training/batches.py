"""Training batches, each made from nothing but its number: any number of workers, and a resumed run, see the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from mmcompress.evals.micro.clips import draw_clip, draw_clip_question
from mmcompress.evals.micro.compare import draw_pair, draw_pair_question
from mmcompress.evals.micro.questions import Asked, draw_question
from mmcompress.evals.micro.render import render
from mmcompress.evals.micro.scene import Scene, Style, crowded, draw_scene
from mmcompress.evals.micro.training.architectures import END_OF_TEXT, TOKEN_IDS
from mmcompress.evals.micro.training.families import PATCH
from mmcompress.evals.micro.training.packing import pack, tokenize
from mmcompress.evals.micro.training.recipes import Recipe
from mmcompress.evals.micro.training.targets import FIELDS, targets

_SERIES = {"vision": 0, "answers": 1, "pruned": 2}
_CROWDED_SHARE = 0.8
_BIG_OBJECTS_UNTIL = 0.4
_FEWEST_SHAPES = 2
_MOST_SHAPES = (2, 4, 6, 8)
# A fresh language model begins with questions about single objects in pictures that show few.
_EASY_UNTIL = 0.4
_EASY_MOST_SHAPES = (2, 4)
_EASY_FORMS = ("exist", "color", "shape", "kind-count", "color-count", "side", "half")
_FRAMES = (4, 6, 8)
_GROUNDED_PER_PICTURE = 2
_QUESTION_LENGTH = 32


class VisionBatch(NamedTuple):
    """Pictures for the encoder, see `VisionHeads.forward` and `ground`."""

    pictures: Tensor
    labels: Tensor
    facts: Tensor
    questions: Tensor
    asked: Tensor
    referred: Tensor


class AnswersBatch(NamedTuple):
    """Pictures, pairs or clips with packed questions, see `Packed`, and what their tokens show where that is taught."""

    pictures: Tensor
    labels: Tensor
    owners: Tensor
    ids: Tensor
    block: Tensor
    offset: Tensor
    target: Tensor
    referent: Tensor


class VisionBatches(Dataset[VisionBatch]):
    """Crowded scenes, big objects first."""

    def __init__(self, recipe: Recipe, steps: int) -> None:
        assert recipe.vision is not None
        self._recipe, self._stage, self._steps = recipe, recipe.vision, steps

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, step: int) -> VisionBatch:
        rng = np.random.default_rng((self._recipe.seed, _SERIES["vision"], step))
        big = 0.0 if self._recipe.continued else max(0.0, 1 - step / (_BIG_OBJECTS_UNTIL * self._steps))
        plain = _style(rng, self._recipe, (_FEWEST_SHAPES, _MOST_SHAPES[-1]), big)
        scenes = [
            draw_scene(rng, crowded(plain) if rng.random() < _CROWDED_SHARE else plain)
            for _ in range(self._stage.batch)
        ]
        labelled = [targets(scene, PATCH) for scene in scenes]
        grounded = [
            (number, found)
            for number, scene in enumerate(scenes)
            for _ in range(_GROUNDED_PER_PICTURE)
            if (found := draw_question(rng, scene, self._recipe.forms)) is not None and found.referent is not None
        ]
        referred = [labelled[number].owners.ravel() == asked.referent for number, asked in grounded]
        # An object that others hide from every patch cannot be pointed at.
        grounded = [pair for pair, patches in zip(grounded, referred, strict=True) if patches.any()]
        referred = [patches for patches in referred if patches.any()]
        return VisionBatch(
            torch.from_numpy(np.stack([render(rng, scene) for scene in scenes]))[:, None],
            torch.from_numpy(np.stack([label.patches.reshape(len(label.patches), -1) for label in labelled])),
            torch.from_numpy(np.stack([label.summary for label in labelled])),
            torch.from_numpy(np.stack([_text(asked.question) for _, asked in grounded])),
            torch.tensor([number for number, _ in grounded]),
            torch.from_numpy(np.stack(referred).astype(np.float32)),
        )


class AnswersBatches(Dataset[AnswersBatch]):
    """What the language model is asked."""

    def __init__(self, recipe: Recipe, stage: Literal["answers", "pruned"], steps: int) -> None:
        optimisation = recipe.answers if stage == "answers" else recipe.pruned
        assert optimisation is not None
        self._recipe, self._stage, self._steps, self._rows = recipe, stage, steps, optimisation.batch

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, step: int) -> AnswersBatch:
        recipe = self._recipe
        rng = np.random.default_rng((recipe.seed, _SERIES[self._stage], step))
        fresh = self._stage == "answers" and not recipe.keeps_language_model
        easy = fresh and step < _EASY_UNTIL * self._steps
        if easy:
            recipe = replace(recipe, pairs=0.0, forms={form: recipe.forms[form] for form in _EASY_FORMS})
        style = _style(rng, recipe, (_FEWEST_SHAPES, int(rng.choice(_EASY_MOST_SHAPES if easy else _MOST_SHAPES))))
        frames, comparing = int(rng.choice(_FRAMES)), bool(rng.random() < recipe.pairs)
        rows = []
        for _ in range(self._rows):
            scenes, pictures, draw = _material(rng, recipe, style, frames, comparing)
            rows.append((pictures, *_token_labels(recipe, scenes), *pack(draw, recipe.length)))
        return AnswersBatch(*(torch.from_numpy(np.stack(column)) for column in zip(*rows, strict=True)))


def _material(
    rng: np.random.Generator, recipe: Recipe, style: Style, frames: int, comparing: bool
) -> tuple[Sequence[Scene], NDArray[np.uint8], Callable[[], Asked | None]]:
    """Scenes and pictures of one prompt [pictures, height, width, 3], and what draws questions about them."""
    if recipe.clips:
        clip = draw_clip(rng, style, frames)
        return clip.scenes, clip.pictures, lambda: draw_clip_question(rng, clip)
    if comparing:
        pair = draw_pair(rng, style)
        return pair.scenes, np.stack(pair.pictures), lambda: draw_pair_question(rng, pair)
    scene = draw_scene(rng, style)
    return [scene], render(rng, scene)[None], lambda: draw_question(rng, scene, recipe.forms)


def _token_labels(recipe: Recipe, scenes: Sequence[Scene]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Labels of a prompt's tokens [fields, tokens] and the objects these show [tokens]; none if they are not taught."""
    if recipe.token_patch is None:
        return np.empty((len(FIELDS), 0), np.int64), np.empty(0, np.int64)
    labelled = [targets(scene, recipe.token_patch) for scene in scenes]
    labels = [label.patches.reshape(len(FIELDS), -1) for label in labelled]
    return np.concatenate(labels, 1), np.concatenate([label.owners.ravel() for label in labelled])


def _style(rng: np.random.Generator, recipe: Recipe, shapes: tuple[int, int], big: float = 0.0) -> Style:
    width, height = recipe.canvases[rng.integers(len(recipe.canvases))]
    return Style(width=width, height=height, shapes=shapes, big=big, texts=recipe.texts, font_sizes=recipe.font_sizes)


def _text(question: str) -> NDArray[np.int64]:
    ids = [TOKEN_IDS["<s>"], *tokenize(question), END_OF_TEXT]
    return np.array(ids + (_QUESTION_LENGTH - len(ids)) * [TOKEN_IDS["<pad>"]])
