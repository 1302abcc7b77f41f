"""Writing a split of pictures and questions: `python -m mmcompress.evals.micro.build --out DIR`.

Drawing needs matplotlib, for its fonts: `pip install "mmcompress[evals]"`.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.progress import track

from mmcompress.errors import MMCompressError, SpecError
from mmcompress.evals.micro import GENERATOR_VERSION, Question
from mmcompress.evals.micro.questions import Asked, ask
from mmcompress.evals.micro.render import render
from mmcompress.evals.micro.scene import Scene, Style, draw_scene

MICROVQA_IMAGES = 100
MICROVQA_SEED = 20260
"""The arguments that rebuild the embedded split."""


@dataclass(frozen=True)
class Sample:
    """One scene, its picture (RGB, uint8 [height, width, 3]) and the questions about it."""

    scene: Scene
    picture: NDArray[np.uint8]
    questions: list[Asked]


def make_sample(seed: int, index: int, style: Style | None = None) -> Sample:
    """Make picture `index` of the endless series `seed`; equal arguments give equal samples.

    Raises:
        SpecError: `seed` or `index` is negative.
    """
    if seed < 0 or index < 0:
        raise SpecError(f"seed and index must not be negative, got seed={seed} and index={index}.")
    scene_rng, picture_rng, question_rng = np.random.default_rng((seed, index)).spawn(3)
    scene = draw_scene(scene_rng, style or Style())
    return Sample(scene, render(picture_rng, scene), ask(question_rng, scene))


def build(
    out: Path, images: int = MICROVQA_IMAGES, seed: int = MICROVQA_SEED, style: Style | None = None
) -> list[Question]:
    """Write the split `out` and return its questions; progress goes to stderr.

    `out` gets `images/*.png`, `questions.jsonl` with a row per question, and `meta.json` saying what the split is.

    Raises:
        SpecError: `images` is not positive, `seed` is negative, or `out` already holds files.
    """
    if images < 1 or seed < 0:
        raise SpecError(f"images must be at least 1 and seed at least 0, got images={images} and seed={seed}.")
    if out.exists() and any(out.iterdir()):
        raise SpecError(f"{out} is not empty; name a new directory.")
    style = style or Style()
    meta = {"generator_version": GENERATOR_VERSION, "seed": seed, "images": images, "style": asdict(style)}
    (out / "images").mkdir(parents=True, exist_ok=True)
    questions: list[Question] = []
    for index in track(range(images), "Drawing pictures", console=Console(stderr=True)):
        sample = make_sample(seed, index, style)
        name = f"images/{index:03d}.png"
        Image.fromarray(sample.picture).save(out / name)
        for asked in sample.questions:
            questions.append(Question(len(questions), name, asked.question, asked.answer, asked.type, asked.form))
    rows = (json.dumps(asdict(question)) + "\n" for question in questions)
    (out / "questions.jsonl").write_text("".join(rows), encoding="utf-8")
    (out / "meta.json").write_text(json.dumps(meta) + "\n", encoding="utf-8")
    return questions


def main() -> None:
    """Run the command line."""
    default = Style()
    parser = argparse.ArgumentParser(prog="python -m mmcompress.evals.micro.build", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="a new or empty directory")
    parser.add_argument("--width", type=int, default=default.width, help="of the pictures in pixels (%(default)s)")
    parser.add_argument("--height", type=int, default=default.height, help="of the pictures in pixels (%(default)s)")
    parser.add_argument("--images", type=int, default=MICROVQA_IMAGES, help="number of pictures (%(default)s)")
    parser.add_argument("--seed", type=int, default=MICROVQA_SEED, help="which series of scenes (%(default)s)")
    arguments = parser.parse_args()
    try:
        style = Style(arguments.width, arguments.height)
        build(arguments.out, arguments.images, arguments.seed, style)
    except MMCompressError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
