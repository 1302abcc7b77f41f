"""What is known of the embedded models beyond their accuracy; cards and demo use it."""

from __future__ import annotations

from collections.abc import Mapping

_CLS = (
    "The attention of its CLS token does not single out objects (its summary of a picture stopped at half of the "
    "facts), so CLS-guided methods do no better than random tokens on it."
)
_BLIND = frozenset({"number", "letters", "word", "side", "relation"})

UNLEARNT: Mapping[str, frozenset[str]] = {
    "micro-llava": _BLIND,
    "micro-llava-nodrop": _BLIND,
    "micro-qwen2.5-vl": _BLIND,
}
"""Forms of questions that a model answers no better than by chance: its tables leave them out."""

_SHORT = (
    "Undertrained: an hour and a half on one CPU core, now and then two. It reads no signs and does not say where "
    "things are."
)

NOTES: Mapping[str, tuple[str, ...]] = {
    "micro-llava": (
        _SHORT,
        _CLS,
        "Its recipe was adjusted while it ran: labels of single characters joined the first stage after 1,140 of its "
        "steps and labels of tokens the second after 1,940, and easy questions came in between harder ones; the "
        "numbers of steps were settled on the way.",
    ),
    "micro-llava-nodrop": (
        _SHORT,
        _CLS,
        "Its recipe was adjusted while it ran, see micro-llava.",
    ),
    "micro-qwen2.5-vl": (
        _SHORT,
        "Its recipe was adjusted while it ran: labels of single characters joined the first stage after 2,980 of its "
        "steps; the first 420 of the second had questions of all forms and missing tokens; the numbers of steps were "
        "settled on the way.",
    ),
}
"""Known weaknesses of a model, and what its training log does not tell."""
