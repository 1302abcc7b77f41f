"""The things a scene can contain, the words that name them, and the tokens of the models that answer."""

from __future__ import annotations

import string

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

HELD_OUT_PAIRS: frozenset[tuple[str, str]] = frozenset(
    (color, SHAPE_NAMES[(3 * index + 1) % len(SHAPE_NAMES)]) for index, color in enumerate(COLOR_NAMES)
)
"""Pairs (colour, shape) that pictures show, but that only questions of type `compose` are about: training has none."""

DIGITS: str = string.digits
LETTERS: str = string.ascii_uppercase
OPTION_LETTERS: tuple[str, ...] = ("A", "B", "C", "D")

WORDS: tuple[str, ...] = tuple(
    """
    ACE AIR APPLE ARM BAG BAKE BALL BAND BANK BEACH BELL BIRD BLOCK BOAT BOOK BOX BREAD BRICK BUS CAFE CAKE CAMP CAR
    CARD CHAIR CITY CLOCK CLUB COAST COIN COLD COOK CORN CUP DANCE DAY DESK DOG DOOR DREAM DRINK EAST EGG EXIT
    FARM FAST FIELD FIRE FISH FLY FOOD FOX FREE FRUIT GAME GATE GIFT GLASS GOLD GRAND GRASS GYM HALL HAND HAT HILL
    HOME HORSE HOT HOTEL ICE JAM JAZZ JOB JUICE KEY KING KITE LAKE LAMP LEAF LIGHT LION MAIL MAP MILK MIX MUSIC
    NEWS NIGHT NORTH OAK OPEN PAPER PARK PIANO PIZZA QUEEN QUIET RADIO RAIN RIVER ROAD SALE SHIP SHOP SKY SNOW SOUP
    STOP TAXI TEA TRAIN TREE VIDEO WATER WEST WIND WOLF YARD ZEBRA ZOO
    """.split()  # noqa: SIM905 (a list would take a line per word)
)
"""What signs say besides numbers and letters: common words of three to five letters."""

SPECIAL_TOKENS: tuple[str, ...] = (
    "<unk>",
    "<s>",
    "</s>",
    "<pad>",
    "<image>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<video>",
    "USER:",
    "ASSISTANT:",
)

QUESTION_WORDS: tuple[str, ...] = tuple(
    """
    ? is are was were the a there what which how many color shape shapes number letters word on sign in of half left
    right top bottom above below yes no picture pictures has more first second last same both way does did move up
    down appear disappear
    """.split()  # noqa: SIM905 (a list would take a line per word)
)
"""The words of questions and answers that name no colour, shape, digit or letter."""

_TOKENS = 128


def _tokens() -> tuple[str, ...]:
    named = (*SPECIAL_TOKENS, *QUESTION_WORDS, *COLOR_NAMES, *SHAPE_NAMES, *DIGITS, *LETTERS)
    return (*named, *(f"<unused{number}>" for number in range(_TOKENS - len(named))))


TOKENS: tuple[str, ...] = _tokens()
"""The word-level vocabulary of the models, in the order of the ids."""
