"""Clips: frames of one scene whose objects move, come and go, and the questions about what happens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import numpy as np
from numpy.typing import NDArray

from mmcompress.errors import SpecError
from mmcompress.evals.micro.background import draw_background
from mmcompress.evals.micro.questions import MAX_COUNT, Asked
from mmcompress.evals.micro.render import add_noise, draw_noise, draw_tint, paint
from mmcompress.evals.micro.scene import (
    MIN_GAP,
    Box,
    Scene,
    Shape,
    Sign,
    Style,
    alter_text,
    draw_scene,
    pick,
    pick_weighted,
    sign_size,
)
from mmcompress.evals.micro.vocabulary import HELD_OUT_PAIRS

FRAMES = range(4, 9)
"""How many frames a clip can have."""

_SHAPE_ROLES = {"moves": 0.5, "stays": 0.1, "appears": 0.2, "disappears": 0.2}
_SIGN_ROLES = {"changes": 0.6, "stays": 0.4}
_PANS = 0.2
_MOTION = range(52, 81)  # pixels from the first to the last frame
_PAN = range(8, 21)  # likewise, of everything; so little that no motion turns into its contrary
_ATTEMPTS = 10
_DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}

Thing = Shape | Sign
Course = Sequence[Thing | None]
"""What one object is in every frame, None while it is not there."""

Step = tuple[int, int]
"""Pixels to the right and down, from the first frame to the last."""


@dataclass(frozen=True)
class Clip:
    """One scene per frame and the frames (RGB, uint8 [frames, height, width, 3]).

    Colour and kind name a shape throughout: no two of a clip have both in common.
    """

    scenes: tuple[Scene, ...]
    pictures: NDArray[np.uint8]


def make_clip(seed: int, index: int, style: Style | None = None, frames: int = 8) -> tuple[Clip, list[Asked]]:
    """Make clip `index` of the endless series `seed` with a question of every form that it allows.

    Raises:
        SpecError: `seed` or `index` is negative, or `frames` is not 4 to 8.
    """
    if seed < 0 or index < 0:
        raise SpecError(f"seed and index must not be negative, got seed={seed} and index={index}.")
    clip_rng, question_rng = np.random.default_rng((seed, index)).spawn(2)
    clip = draw_clip(clip_rng, style or Style(), frames)
    asked = (asker(question_rng, clip) for asker in _ASKERS)
    return clip, [question for question in asked if question is not None]


def draw_clip(rng: np.random.Generator, style: Style, frames: int) -> Clip:
    """Draw a clip; objects move in straight lines, and sometimes the camera does.

    Raises:
        SpecError: `frames` is not 4 to 8.
    """
    if frames not in FRAMES:
        raise SpecError(f"frames must be {FRAMES.start} to {FRAMES[-1]}, got {frames}.")
    pan = _draw_step(rng, _PAN) if rng.random() < _PANS else (0, 0)
    scenes = _draw_scenes(rng, style, frames, pan)
    background = draw_background(rng, style.width + abs(pan[0]), style.height + abs(pan[1]))
    tints = {_name(thing): draw_tint(rng, thing.color) for scene in scenes for thing in scene.objects}
    noise = draw_noise(rng)
    pictures = []
    for frame, scene in enumerate(scenes):
        across, down = _part(pan, frame, frames)
        left, top = max(0, pan[0]) - across, max(0, pan[1]) - down
        picture = background[top : top + style.height, left : left + style.width].copy()
        paint(picture, scene.objects, [tints[_name(thing)] for thing in scene.objects])
        pictures.append(add_noise(rng, picture, noise))
    return Clip(scenes, np.stack(pictures))


def draw_clip_question(rng: np.random.Generator, clip: Clip) -> Asked | None:
    """Ask one question of a random form; None if `clip` does not allow that form."""
    return pick(rng, _ASKERS)(rng, clip)


def _draw_scenes(rng: np.random.Generator, style: Style, frames: int, pan: Step) -> tuple[Scene, ...]:
    scene = draw_scene(rng, style)
    canvas = Box(1, 1, style.width - 2, style.height - 2)
    things = {_name(thing): thing for thing in scene.objects if _stays_on(canvas, thing.box, pan)}
    taken = {name: thing.box for name, thing in things.items()}
    courses = []
    for name, thing in things.items():
        others = [box for other, box in taken.items() if other != name]
        role = pick_weighted(rng, _SHAPE_ROLES if isinstance(thing, Shape) else _SIGN_ROLES)
        for _ in range(_ATTEMPTS):
            course = _draw_course(rng, thing, role, frames)
            swept = reduce(Box.union, (state.box for state in course if state is not None))
            if _stays_on(canvas, swept, pan) and all(swept.is_clear_of(other, MIN_GAP) for other in others):
                break
        else:
            course, swept = [thing] * frames, thing.box  # no room to move
        taken[name] = swept
        courses.append(course)
    scenes = []
    for frame in range(frames):
        visible = [_moved(state, pan, frame, frames) for course in courses if (state := course[frame]) is not None]
        shapes = tuple(thing for thing in visible if isinstance(thing, Shape))
        signs = tuple(thing for thing in visible if isinstance(thing, Sign))
        scenes.append(Scene(style.width, style.height, shapes, signs))
    return tuple(scenes)


def _draw_course(rng: np.random.Generator, thing: Thing, role: str, frames: int) -> Course:
    turn = int(rng.integers(1, frames))
    if role == "moves":
        motion = _draw_step(rng, _MOTION)
        return [_moved(thing, motion, frame, frames) for frame in range(frames)]
    if role == "changes" and isinstance(thing, Sign):
        text = alter_text(rng, thing.text)
        box = Box(thing.box.x, thing.box.y, *sign_size(text, thing.font, thing.font_size))
        return [thing] * turn + [replace(thing, text=text, box=box)] * (frames - turn)
    before, after = {"appears": (None, thing), "disappears": (thing, None), "stays": (thing, thing)}[role]
    return [before] * turn + [after] * (frames - turn)


def _draw_step(rng: np.random.Generator, lengths: range) -> Step:
    length = pick(rng, lengths)
    across, down = pick(rng, tuple(_DIRECTIONS.values()))
    return across * length, down * length


def _part(step: Step, frame: int, frames: int) -> Step:
    """How much of `step` is done in `frame`."""
    return round(step[0] * frame / (frames - 1)), round(step[1] * frame / (frames - 1))


def _moved(thing: Thing, step: Step, frame: int, frames: int) -> Thing:
    return replace(thing, box=thing.box.moved(*_part(step, frame, frames)))


def _stays_on(canvas: Box, box: Box, pan: Step) -> bool:
    return canvas.union(box).union(box.moved(*pan)) == canvas


def _name(thing: Thing) -> str | tuple[str, str]:
    return thing.pair if isinstance(thing, Shape) else thing.color


def _motion(rng: np.random.Generator, clip: Clip) -> Asked | None:
    first, last = ({shape.pair: shape.box for shape in scene.shapes} for scene in (clip.scenes[0], clip.scenes[-1]))
    moves = []
    for pair in sorted((first.keys() & last.keys()) - HELD_OUT_PAIRS):
        across, down = last[pair].x - first[pair].x, last[pair].y - first[pair].y
        for direction, (right, below) in _DIRECTIONS.items():
            if across * right + down * below >= _MOTION.start - _PAN[-1]:
                moves.append((pair, direction))
    if not moves:
        return None
    (color, kind), direction = pick(rng, moves)
    return Asked("clip", f"which way does the {color} {kind} move ?", direction, "motion")


def _change(rng: np.random.Generator, clip: Clip) -> Asked | None:
    first, last = ({shape.pair for shape in scene.shapes} for scene in (clip.scenes[0], clip.scenes[-1]))
    verb, changed = pick(rng, (("appear", last - first), ("disappear", first - last)))
    did = sorted({kind for _, kind in changed})
    did_not = sorted({kind for _, kind in first | last} - set(did))
    if not did or not did_not:
        return None
    happened = bool(rng.random() < 0.5)
    question = f"did a {pick(rng, did if happened else did_not)} {verb} ?"
    return Asked("clip", question, "yes" if happened else "no", verb)


def _appearances(rng: np.random.Generator, clip: Clip) -> Asked | None:
    first, last = ({shape.pair for shape in scene.shapes} for scene in (clip.scenes[0], clip.scenes[-1]))
    count = len(last - first)
    return Asked("clip", "how many shapes appear ?", str(count), "appear-count") if count <= MAX_COUNT else None


def _read(rng: np.random.Generator, clip: Clip) -> Asked | None:
    when, scene = pick(rng, (("first", clip.scenes[0]), ("last", clip.scenes[-1])))
    if not scene.signs:
        return None
    sign = pick(rng, scene.signs)
    verb = "were" if sign.text_kind == "letters" else "was"
    question = f"what {sign.text_kind} {verb} on the {sign.color} sign {when} ?"
    return Asked("clip", question, " ".join(sign.text), f"{when}-text")


_ASKERS: tuple[Callable[[np.random.Generator, Clip], Asked | None], ...] = (_motion, _change, _appearances, _read)
