"""Pictures of selections: the right patches are crisp, the right ones dimmed, and everything fits."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from mmcompress.errors import UnsupportedError
from mmcompress.evals.overlay import FRAME, SIDE, original, overlay, side_by_side
from mmcompress.methods.pool import Pool
from mmcompress.types import Needs, Selection, VisualItem

COLOR = (200, 90, 40)
PICTURE = Image.new("RGB", (120, 120), COLOR)


def centre(drawn: Image.Image, grid: tuple[int, int], row: int, column: int, size: tuple[int, int]) -> tuple[int, ...]:
    x, y = int((column + 0.4) * size[0] / grid[1]), int((row + 0.4) * size[1] / grid[0])
    return drawn.getpixel((x, y))  # type: ignore[return-value]


@pytest.mark.parametrize("grid", [(4, 4), (5, 3), (1, 7)])
def test_kept_patches_are_untouched_and_dropped_ones_dimmed(grid: tuple[int, int]) -> None:
    tokens = grid[0] * grid[1]
    kept = set(range(0, tokens, 3))
    drawn = overlay(PICTURE, [grid], Selection(torch.tensor(sorted(kept))), "some")
    for token in range(tokens):
        color = centre(drawn, grid, *divmod(token, grid[1]), (SIDE, SIDE))
        assert color == COLOR if token in kept else sum(color) < sum(COLOR) / 2


def test_a_frame_runs_where_kept_meets_dropped() -> None:
    drawn = overlay(PICTURE, [(2, 2)], Selection(torch.tensor([0, 1])), "top")
    half = SIDE // 2
    assert drawn.getpixel((half // 2, half)) == FRAME
    assert drawn.getpixel((half, half // 2)) == COLOR  # none between two kept patches
    assert drawn.getpixel((half, SIDE - 20)) != FRAME  # none between two dropped ones


def test_merged_tokens_are_tinted_by_group() -> None:
    item = VisualItem(torch.zeros(16, 2), ((4, 4),), torch.zeros(16, dtype=torch.long))
    drawn = overlay(PICTURE, item.grids, Pool().select(item, 4, Needs()), "pool")
    colors = [[centre(drawn, (4, 4), row, column, (SIDE, SIDE)) for column in range(4)] for row in range(4)]
    windows = [{colors[r + i][c + j] for i in (0, 1) for j in (0, 1)} for r in (0, 2) for c in (0, 2)]
    assert all(len(window) == 1 for window in windows)
    assert len(set().union(*windows)) == 4
    assert COLOR not in set().union(*windows)


def test_tokens_that_are_not_absorbed_are_dimmed() -> None:
    weight = torch.tensor([[0.5, 0.5, 0.0, 0.0]])
    drawn = overlay(PICTURE, [(2, 2)], Selection(torch.tensor([0]), weight), "half")
    assert sum(centre(drawn, (2, 2), 1, 0, (SIDE, SIDE))) < sum(COLOR) / 2
    assert sum(centre(drawn, (2, 2), 0, 1, (SIDE, SIDE))) > sum(COLOR) / 2


def test_a_tiled_image_shows_its_thumbnail_and_its_crops() -> None:
    wide = Image.new("RGB", (200, 100), COLOR)
    grids = ((2, 2), (2, 4))
    drawn = overlay(wide, grids, Selection(torch.tensor([0, 11])), "tiled")
    size = (SIDE, SIDE // 2)
    crops = drawn.crop((drawn.width - SIDE, 0, drawn.width, drawn.height))
    assert drawn.width > 2 * SIDE
    assert [centre(drawn, (2, 2), 0, column, size) == COLOR for column in (0, 1)] == [True, False]
    assert [centre(crops, (2, 4), 1, column, size) == COLOR for column in range(4)] == [False, False, False, True]


def test_more_planes_cannot_be_drawn() -> None:
    with pytest.raises(UnsupportedError, match="3 planes"):
        overlay(PICTURE, [(2, 2)] * 3, Selection(torch.tensor([0])), "tiles")


def test_captions_make_room_for_themselves() -> None:
    short = overlay(PICTURE, [(2, 2)], Selection(torch.tensor([0])), "a")
    noted = overlay(PICTURE, [(2, 2)], Selection(torch.tensor([0])), "a", "a note")
    long = overlay(PICTURE, [(2, 2)], Selection(torch.tensor([0])), "a method with a name of many words and options")
    assert short.width == noted.width == long.width == SIDE
    assert SIDE < short.height < noted.height == long.height


def test_pictures_stand_in_rows() -> None:
    panels = [original(PICTURE, name) for name in "abcde"]
    row, grid = side_by_side(panels), side_by_side(panels, columns=2)
    assert row.width > 5 * SIDE and row.height == panels[0].height
    assert 2 * SIDE < grid.width < 3 * SIDE and grid.height > 3 * panels[0].height
    assert side_by_side(panels, title="what is it ?").height > row.height


@pytest.mark.parametrize("size", [(10, 10), (1, 300), (2000, 1000)])
def test_the_longer_side_is_always_the_same(size: tuple[int, int]) -> None:
    caption = original(Image.new("RGB", (50, 50))).height - SIDE
    drawn = original(Image.new("RGB", size), "x")
    assert max(drawn.width, drawn.height - caption) == SIDE
