"""The things a scene can contain and the words that name them."""

from __future__ import annotations

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (215, 35, 35),
    "green": (30, 165, 50),
    "blue": (40, 70, 225),
    "yellow": (240, 220, 40),
    "purple": (145, 45, 185),
    "orange": (245, 135, 20),
    "cyan": (40, 210, 220),
    "white": (245, 245, 245),
}
"""Every colour by name, as RGB in 0..255 before the per-object jitter."""

COLOR_NAMES: tuple[str, ...] = tuple(COLORS)
SHAPE_NAMES: tuple[str, ...] = ("circle", "square", "triangle", "star", "cross", "diamond", "ring", "moon")
OPTION_LETTERS: tuple[str, ...] = ("A", "B", "C", "D")

# The embedded model was trained without these pairs, so scenes leave them out: they would measure its
# generalisation to new pairs, not the loss caused by compression.
UNSEEN_PAIRS: frozenset[tuple[str, str]] = frozenset(
    (color, SHAPE_NAMES[(3 * index + 1) % len(SHAPE_NAMES)]) for index, color in enumerate(COLOR_NAMES)
)
