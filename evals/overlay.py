"""Pictures of what was kept: dropped patches dimmed, kept ones framed, merged ones tinted by group."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from functools import cache

import torch
from PIL import Image, ImageDraw, ImageEnhance, ImageFont
from torch import Tensor

from mmcompress.errors import UnsupportedError
from mmcompress.types import Selection

SIDE = 336
"""Pixels along the longer side of a picture."""

FRAME = (255, 255, 255)
_PAPER, _INK = (255, 255, 255), (30, 30, 30)
_GAP, _FONT_SIZE, _DROPPED = 10, 15, -1


def overlay(
    image: Image.Image,
    grids: Sequence[tuple[int, int]],
    selection: Selection,
    method: str,
    note: str = "",
    side: int = SIDE,
) -> Image.Image:
    """What `kept` draws, with the method and the number of tokens below it, and further lines of `note`.

    Raises:
        UnsupportedError: there are more planes than a thumbnail and its crops.
    """
    caption = f"{method}: {tokens_kept(grids, selection)}"
    return captioned(kept(image, grids, selection, side), f"{caption}\n{note}" if note else caption)


def kept(image: Image.Image, grids: Sequence[tuple[int, int]], selection: Selection, side: int = SIDE) -> Image.Image:
    """Draw `selection` over the picture it was made for.

    A tiled image is drawn twice, once with the patches of its thumbnail and once with those of its stitched crops.

    Args:
        image: the picture as the model sees it, of any size.
        grids: `(rows, columns)` of each plane of its tokens.
        selection: which tokens stayed.
        side: pixels along the longer side of the picture.

    Raises:
        UnsupportedError: there are more planes than a thumbnail and its crops.
    """
    if len(grids) > 2:
        raise UnsupportedError(f"cannot draw an image of {len(grids)} planes; the most is a thumbnail and its crops.")
    sizes = [rows * columns for rows, columns in grids]
    groups = _groups(selection, sum(sizes)).split(sizes)
    anchors = _anchors(selection, sum(sizes)).split(sizes)
    picture, merged = resized(image, side), selection.weight is not None
    planes = [
        _draw(picture, group.view(grid), anchor.view(grid), merged)
        for grid, group, anchor in zip(grids, groups, anchors, strict=True)
    ]
    return side_by_side(planes, gap=2)


def tokens_kept(grids: Sequence[tuple[int, int]], selection: Selection) -> str:
    """How many of how many tokens `selection` keeps, for people."""
    return f"{len(selection)} of {sum(rows * columns for rows, columns in grids)} tokens"


def original(image: Image.Image, caption: str = "original", side: int = SIDE) -> Image.Image:
    """The picture itself, sized and captioned like an overlay."""
    return captioned(resized(image, side), caption)


def side_by_side(
    pictures: Sequence[Image.Image], columns: int | None = None, title: str = "", gap: int = _GAP
) -> Image.Image:
    """Set pictures out in rows of `columns` (default: one row), under a title."""
    columns = columns or len(pictures)
    width = max(picture.width for picture in pictures)
    height = max(picture.height for picture in pictures)
    title = _broken(title, columns * (width + gap))
    lines = -(-len(pictures) // columns)
    head = _text_height(title) + gap if title else 0
    sheet = Image.new("RGB", (columns * (width + gap) - gap, head + lines * (height + gap) - gap), _PAPER)
    if title:
        ImageDraw.Draw(sheet).multiline_text((2, 2), title, fill=_INK, font=_font())
    for number, picture in enumerate(pictures):
        line, column = divmod(number, columns)
        sheet.paste(picture, (column * (width + gap), head + line * (height + gap)))
    return sheet


def _groups(selection: Selection, tokens: int) -> Tensor:
    """For every token the output token that it went into, `[tokens]`; all kept ones are one group if none merge."""
    if selection.weight is not None:
        weight = selection.weight.cpu()
        return torch.where(weight.amax(dim=0) > 0, weight.argmax(dim=0), _DROPPED)
    groups = torch.full((tokens,), _DROPPED)
    groups[selection.anchor.cpu()] = 0
    return groups


def _anchors(selection: Selection, tokens: int) -> Tensor:
    anchors = torch.zeros(tokens, dtype=torch.bool)
    anchors[selection.anchor.cpu()] = True
    return anchors


def _draw(picture: Image.Image, groups: Tensor, anchors: Tensor, merged: bool) -> Image.Image:
    """One plane, from the group and anchor maps of its patches `[rows, columns]`."""
    dimmed = ImageEnhance.Brightness(ImageEnhance.Color(picture).enhance(0.15)).enhance(0.3)
    kept = _enlarged((groups != _DROPPED) * 255, picture.size)
    crisp = Image.blend(picture, _tints(groups, picture.size), 0.25) if merged else picture
    drawn = Image.composite(crisp, dimmed, kept)
    pen = ImageDraw.Draw(drawn)
    rows, columns = groups.shape
    across = [round(column * picture.width / columns) for column in range(columns + 1)]
    down = [round(row * picture.height / rows) for row in range(rows + 1)]
    bordered = torch.nn.functional.pad(groups, (1, 1, 1, 1), value=_DROPPED).tolist()
    for row in range(rows + 1):
        for column in range(columns + 1):
            here = bordered[row + 1][column + 1]
            x, y = min(across[column], picture.width - 1), min(down[row], picture.height - 1)
            if column < columns and here != bordered[row][column + 1]:
                pen.line([(x, y), (across[column + 1], y)], fill=FRAME)
            if row < rows and here != bordered[row + 1][column]:
                pen.line([(x, y), (x, down[row + 1])], fill=FRAME)
    for row, column in anchors.nonzero().tolist() if merged else ():
        x, y = (across[column] + across[column + 1]) / 2, (down[row] + down[row + 1]) / 2
        pen.ellipse([x - 2, y - 2, x + 2, y + 2], fill=FRAME)
    return drawn


def _tints(groups: Tensor, size: tuple[int, int]) -> Image.Image:
    """A colour per group, neighbours far apart in hue."""
    hues = [group * 0.618 % 1.0 for group in range(int(groups.max()) + 2)]
    palette = torch.tensor([[int(255 * part) for part in colorsys.hsv_to_rgb(hue, 0.9, 1.0)] for hue in hues])
    return _enlarged(palette[groups], size)


def _enlarged(cells: Tensor, size: tuple[int, int]) -> Image.Image:
    """Values per patch `[rows, columns]` or `[rows, columns, 3]` in 0..255 as a picture of blocks."""
    return Image.fromarray(cells.to(torch.uint8).numpy()).resize(size, Image.Resampling.NEAREST)


def resized(image: Image.Image, side: int = SIDE) -> Image.Image:
    """The picture as RGB, its longer side `side` pixels long."""
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.convert("RGB").resize(size, Image.Resampling.LANCZOS)


def captioned(picture: Image.Image, caption: str) -> Image.Image:
    """The picture with words below it."""
    text = _broken(caption, picture.width)
    sheet = Image.new("RGB", (picture.width, picture.height + _text_height(text)), _PAPER)
    sheet.paste(picture, (0, 0))
    ImageDraw.Draw(sheet).multiline_text((2, picture.height + 2), text, fill=_INK, font=_font())
    return sheet


def _broken(text: str, width: int) -> str:
    """`text` with lines broken between words so that they fit into `width` pixels."""
    lines = []
    for paragraph in text.splitlines():
        line = ""
        for word in paragraph.split():
            longer = f"{line} {word}".lstrip()
            if line and _font().getlength(longer) > width - 4:
                lines.append(line)
                longer = word
            line = longer
        lines.append(line)
    return "\n".join(lines)


def _text_height(text: str) -> int:
    return round(1.5 * _FONT_SIZE * len(text.splitlines())) + 4


@cache
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(_FONT_SIZE)
