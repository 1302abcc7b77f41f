"""What is known of the embedded models beyond their accuracy; cards and demo use it."""

from __future__ import annotations

from collections.abc import Mapping

_UNREAD = frozenset({"letters", "word"})
_PLACELESS = frozenset({"side", "relation"})

UNLEARNT: Mapping[str, frozenset[str]] = {
    "micro-llava": _UNREAD | _PLACELESS,
    "micro-llava-nodrop": _UNREAD | _PLACELESS,
    "micro-llava-m3": _UNREAD | _PLACELESS,
    "micro-qwen2.5-vl": _UNREAD | {"relation"},
}
"""Forms of questions that a model was not taught, or answers no better than by chance: its tables leave them out."""

_NUMBERS = "It reads numbers only: no sign it was trained on said letters or a word."
_STAGED = (
    "It was trained in sittings, and the recipe has not been run whole from step 0. {steps} steps of the first stage "
    "ran with letters and words on a part of the signs, labels of single characters from step {glyphs} on, and a "
    "learning rate that fell to nothing. The first {answers} steps of the second ran with another mix of questions and "
    "a learning rate that fell to nothing{besides}."
)
_SHOWN = (
    "Two heads of the last but one layer of its language model were shown which tokens a question is about{when}: "
    "methods that read attention inside the language model may look better on it than on models nobody showed where to "
    "look."
)
_SHOWN_EARLY = _SHOWN.format(when=" (but for steps 1,560 to 1,900 of the second stage)")
_SHOWN_LATE = _SHOWN.format(when=", from step 4,800 of the second stage on")
_LLAVA_STAGED = _STAGED.format(steps="4,000", glyphs="1,140", answers="3,900", besides="")
_QWEN_STAGED = _STAGED.format(
    steps="4,200", glyphs="2,980", answers="4,800", besides=", and 150 steps of the last stage came behind them"
)

NOTES: Mapping[str, tuple[str, ...]] = {
    "micro-llava": (_NUMBERS, _SHOWN_EARLY, _LLAVA_STAGED),
    "micro-llava-nodrop": (_NUMBERS, _SHOWN_EARLY, _LLAVA_STAGED),
    "micro-qwen2.5-vl": (_NUMBERS, _SHOWN_LATE, _QWEN_STAGED),
}
"""Known weaknesses of a model, and what its training log does not tell."""
