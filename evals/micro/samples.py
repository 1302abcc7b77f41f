"""A page that shows what is drawn and asked: `python -m mmcompress.evals.micro.samples --out docs`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mmcompress.evals.micro.build import make_sample
from mmcompress.evals.micro.clips import make_clip
from mmcompress.evals.micro.compare import make_pair
from mmcompress.evals.micro.questions import Asked
from mmcompress.evals.micro.render import Picture
from mmcompress.evals.micro.scene import Style, crowded
from mmcompress.evals.micro.vocabulary import HELD_OUT_PAIRS

NAME = "micro-samples"

_SEED = 7
_WIDTH = 1332
_GAP = 12
_LINE = 16
_TEXT_WIDTH = 420
_FRAMES_PER_ROW = 4

_INTRODUCTION = """\
# What the embedded models see and are asked

![Pictures with their questions and answers]({name}.png)

Scenes, pictures and questions are generated; equal seeds give equal ones.

- `python -m mmcompress.evals.micro.build --out DIR --width 336 --height 336` writes pictures and questions of your own;
- `python -m mmcompress.evals.micro.stream` measures how fast they are made;
- `python -m mmcompress.evals.micro.samples --out docs` writes this page.

Of the 64 pairs of colour and shape eight appear in pictures, but only questions of type `compose` are about them, and
those are never trained:
{pairs}.

| type | form | example | answer |
| --- | --- | --- | --- |
"""


class Block(NamedTuple):
    """Rows of pictures of one size, with what was asked about them."""

    title: str
    pictures: Sequence[Sequence[Picture]]
    questions: Sequence[Asked]


def blocks() -> list[Block]:
    """Make everything the page shows."""
    plain = {side: Style(side, side) for side in (168, 224)}
    styles = {
        "168 x 168": plain[168],
        "168 x 168, crowded": crowded(plain[168]),
        "224 x 224": plain[224],
        "224 x 224, crowded": crowded(plain[224]),
        "224 x 224, small text": Style(font_sizes=(10, 12, 14), signs=(3, 4)),
        "336 x 224": Style(336, 224),
        "672 x 336": Style(672, 336, shapes=(12, 20), signs=(4, 6)),
    }
    shown = []
    for index, (title, style) in enumerate(styles.items()):
        sample = make_sample(_SEED, index, style)
        shown.append(Block(title, [[sample.picture]], sample.questions))
    pair, questions = make_pair(_SEED, 0)
    shown.append(Block("two pictures, 224 x 224", [pair.pictures], questions))
    clip, questions = make_clip(_SEED, 5, plain[168])
    frames = list(clip.pictures)
    rows = [frames[:_FRAMES_PER_ROW], frames[_FRAMES_PER_ROW:]]
    shown.append(Block("a clip of eight frames, 168 x 168", rows, questions))
    return shown


def sheet(shown: Sequence[Block]) -> Image.Image:
    """Set blocks from left to right, as many as fit beside each other, questions to the right of the pictures."""
    image = Image.new("RGB", (_WIDTH, 10_000), "white")
    x = y = row_height = _GAP
    for block in shown:
        drawn = _draw_block(block)
        if x + drawn.width + _GAP > _WIDTH:
            x, y = _GAP, y + row_height + _GAP
            row_height = 0
        image.paste(drawn, (x, y))
        x += drawn.width + _GAP
        row_height = max(row_height, drawn.height)
    return image.crop((0, 0, _WIDTH, y + row_height + _GAP))


def page(shown: Sequence[Block]) -> str:
    """Write the page: what can be asked, with an example of every form."""
    examples = {(asked.type, asked.form): asked for block in shown for asked in block.questions}
    pairs = ", ".join(" ".join(pair) for pair in sorted(HELD_OUT_PAIRS))
    rows = (
        f"| {kind} | {form} | `{asked.question}` | `{asked.answer}` |\n" for (kind, form), asked in examples.items()
    )
    return _INTRODUCTION.format(name=NAME, pairs=pairs) + "".join(rows)


def _draw_block(block: Block) -> Image.Image:
    picture_rows = [np.concatenate([_framed(picture) for picture in row], axis=1) for row in block.pictures]
    pixels = np.concatenate(picture_rows, axis=0)
    height = _LINE + max(len(pixels), _LINE * len(block.questions))
    image = Image.new("RGB", (pixels.shape[1] + _TEXT_WIDTH, height), "white")
    image.paste(Image.fromarray(pixels), (0, _LINE))
    draw = ImageDraw.Draw(image)
    plain, bold = (
        ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", font), 11)
        for font in ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf")
    )
    draw.text((0, 0), block.title, font=bold, fill="black")
    for line, asked in enumerate(block.questions, 1):
        left = pixels.shape[1] + _GAP
        draw.text((left, line * _LINE), f"{asked.question}  ", font=plain, fill="black")
        left += int(plain.getlength(f"{asked.question}  "))
        draw.text((left, line * _LINE), asked.answer, font=bold, fill="darkgreen")
    return image


def _framed(picture: Picture) -> Picture:
    return np.pad(picture, ((0, 4), (0, 4), (0, 0)), constant_values=255)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m mmcompress.evals.micro.samples", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="where the page and its picture go")
    out = parser.parse_args().out
    shown = blocks()
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{NAME}.md").write_text(page(shown), encoding="utf-8")
    drawn = sheet(shown)
    # An octree keeps rare colours, of which the default method makes the nearest frequent ones.
    palette = drawn.quantize(256, Image.Quantize.FASTOCTREE)
    drawn.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG).save(out / f"{NAME}.png", optimize=True)


if __name__ == "__main__":
    main()
