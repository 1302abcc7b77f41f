"""How each embedded model is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from mmcompress.errors import SpecError, unknown_name
from mmcompress.evals.micro.training import architectures
from mmcompress.evals.micro.training.families import Family, Llava, LlavaNext, Qwen


@dataclass(frozen=True)
class Optimisation:
    """How weights are fitted: AdamW, linear warm-up, cosine decay.

    Args:
        steps: number of updates.
        batch: pictures, pairs or clips per update.
        learning_rate: at its peak.
    """

    steps: int
    batch: int = 16
    learning_rate: float = 1.5e-3

    def scaled(self, scale: float) -> int:
        """The number of steps times `scale`, at least one."""
        return max(1, round(self.steps * scale))


TEXTS: Mapping[str, float] = {"number": 1.0}
"""How often a sign shows two digits, two letters or a word; letters and words need far more pictures than digits."""

FORMS: Mapping[str, float] = {
    "exist": 1.2,
    "color": 1.2,
    "shape": 1.2,
    "kind-count": 1.0,
    "color-count": 0.8,
    "number": 1.6,
    "color-choice": 1.4,
    "shape-choice": 1.2,
    "count-choice": 0.7,
    "side": 1.0,
    "half": 0.7,
}
"""How often each form of question is asked, relative to the others."""


@dataclass(frozen=True)
class Recipe:
    """All that decides what a model becomes, together with the seed.

    Args:
        summary: what the model is for, in a line.
        family: how its architecture takes pictures.
        build: makes the model, untrained.
        answers: training of projector and language model, the encoder frozen.
        pruned: more of the same, most batches seeing only some of their visual tokens.
        vision: training of the encoder; without it the encoder comes from `start`.
        start: another recipe whose finished model gives the encoder.
        keeps_language_model: whether it also gives projector and language model.
        canvases: (width, height) of the pictures, one drawn per batch.
        pairs: share of batches that compare two pictures.
        clips: whether clips are asked about, not pictures.
        token_patch: px of a picture that one LLM token stands for, if the projector is to be taught what tokens show.
        shown_where: whether the language model is shown where to look while it sees all tokens.
        length: tokens of packed questions per row.
        font_sizes: of the signs, in px.
        text_tower: whether to train a CLIP text tower beside the encoder.
        continued: whether all weights come from a finished model of this recipe, see `onward`.
        characters: weight of what signs say among the labels of the encoder.
    """

    summary: str
    family: Family
    build: Callable[[], Any]
    answers: Optimisation
    pruned: Optimisation | None = None
    vision: Optimisation | None = None
    start: str | None = None
    keeps_language_model: bool = False
    canvases: tuple[tuple[int, int], ...] = ((224, 224),)
    pairs: float = 0.0
    clips: bool = False
    token_patch: int | None = None
    shown_where: bool = False
    length: int = 160
    font_sizes: tuple[int, ...] = (15, 18, 22)
    text_tower: bool = False
    continued: bool = False
    characters: float = 1.0
    seed: int = 1
    texts: Mapping[str, float] = field(default_factory=lambda: dict(TEXTS))
    forms: Mapping[str, float] = field(default_factory=lambda: dict(FORMS))


_MICRO_LLAVA = Recipe(
    summary="LLaVA-1.5 with 256 visual tokens, trained to answer from all of them and from some",
    family=Llava(),
    build=lambda: architectures.llava(architectures.clip_vision(224), architectures.llama()),
    vision=Optimisation(steps=7800, learning_rate=1.2e-3),
    answers=Optimisation(steps=7900, batch=10),
    pruned=Optimisation(steps=200, batch=10, learning_rate=8e-4),
    token_patch=14,
    shown_where=True,
    text_tower=True,
)

RECIPES: Mapping[str, Recipe] = {
    "micro-llava": _MICRO_LLAVA,
    "micro-llava-nodrop": replace(
        _MICRO_LLAVA, summary="micro-llava before its last stage: it always saw all visual tokens", pruned=None
    ),
    "micro-llava-draft": Recipe(
        summary="a smaller LLaVA of the same tokenizer, to draft for micro-llava",
        family=Llava(),
        build=lambda: architectures.llava(architectures.clip_vision(224), architectures.llama(hidden=128, layers=2)),
        start="micro-llava",
        answers=Optimisation(steps=1200),
        pruned=Optimisation(steps=300, learning_rate=8e-4),
    ),
    "micro-llava-next": Recipe(
        summary="LLaVA-NeXT whose small text can be read in tiles only",
        family=LlavaNext(),
        build=lambda: architectures.llava_next(architectures.clip_vision(224), architectures.llama()),
        start="micro-llava",
        keeps_language_model=True,
        answers=Optimisation(steps=1200, batch=4),
        pruned=Optimisation(steps=300, batch=4, learning_rate=8e-4),
        canvases=((448, 224), (224, 448), (448, 448), (672, 224), (224, 672)),
        font_sizes=(12, 15, 18),
    ),
    "micro-qwen2.5-vl": Recipe(
        summary="Qwen2.5-VL at its own resolution, 36 to 80 visual tokens in training",
        family=Qwen(),
        build=architectures.qwen,
        vision=Optimisation(steps=7700, learning_rate=1.2e-3),
        answers=Optimisation(steps=8800),
        pruned=Optimisation(steps=150, learning_rate=8e-4),
        pairs=0.15,
        token_patch=28,
        shown_where=True,
        canvases=((224, 224), (168, 168), (224, 168), (168, 224), (280, 224), (224, 280)),
    ),
    "micro-video": Recipe(
        summary="Qwen2.5-VL on clips of 4 to 8 frames",
        family=Qwen(video=True),
        build=architectures.qwen,
        start="micro-qwen2.5-vl",
        keeps_language_model=True,
        answers=Optimisation(steps=2400, batch=8),
        pruned=Optimisation(steps=600, batch=8, learning_rate=8e-4),
        canvases=((168, 168), (224, 168), (224, 224)),
        clips=True,
    ),
}
"""Every model that can be trained, by name."""

_ONWARD_RATE = 0.5
_ONWARD_CHARACTERS = 3.0
# What a model answers early on is asked the less: existence, colours and shapes.
_ONWARD_FORMS: Mapping[str, float] = {
    "exist": 0.8,
    "color": 0.6,
    "shape": 0.8,
    "kind-count": 1.4,
    "color-count": 1.2,
    "number": 1.5,
    "color-choice": 1.6,
    "shape-choice": 1.8,
    "count-choice": 1.4,
    "side": 0.5,
    "half": 0.3,
}


def onward(recipe: Recipe, seed: int) -> Recipe:
    """`recipe` for training a finished model on: other scenes, gentler steps, more of what is learnt late."""
    gentler: dict[str, Any] = {
        name: replace(stage, learning_rate=_ONWARD_RATE * stage.learning_rate)
        for name, stage in stage_settings(recipe).items()
    }
    return replace(
        recipe,
        continued=True,
        keeps_language_model=True,
        characters=_ONWARD_CHARACTERS,
        forms=dict(_ONWARD_FORMS),
        seed=seed,
        **gentler,
    )


def stage_settings(recipe: Recipe) -> dict[str, Optimisation]:
    """The stages of a recipe, in order."""
    stages = {"vision": recipe.vision, "answers": recipe.answers, "pruned": recipe.pruned}
    return {name: stage for name, stage in stages.items() if stage is not None}


def only(recipe: Recipe, steps: Mapping[str, int]) -> Recipe:
    """`recipe` with other numbers of steps for the stages named in `steps`.

    Raises:
        SpecError: it has no such stage, or a number is not positive.
    """
    settings = stage_settings(recipe)
    for name, count in steps.items():
        if name not in settings:
            raise unknown_name("stage", name, tuple(settings))
        if count < 1:
            raise SpecError(f"stage {name} needs at least 1 step, got {count}.")
    changed: dict[str, Any] = {name: replace(settings[name], steps=count) for name, count in steps.items()}
    return replace(recipe, **changed)


def find_recipe(name: str) -> Recipe:
    """The recipe called `name`.

    Raises:
        SpecError: there is none.
    """
    if name not in RECIPES:
        raise unknown_name("model", name, tuple(RECIPES))
    return RECIPES[name]
