"""What is known of the embedded models beyond their accuracy; cards and demo use it."""

from __future__ import annotations

from collections.abc import Mapping

UNLEARNT: Mapping[str, frozenset[str]] = {
    "micro-llava": frozenset({"relation"}),
    "micro-llava-nodrop": frozenset({"relation"}),
    "micro-qwen2.5-vl": frozenset({"relation"}),
}
"""Forms of questions that a model answers no better than by chance: its tables leave them out."""

NOTES: Mapping[str, tuple[str, ...]] = {
    "micro-llava": (),
    "micro-llava-nodrop": (),
    "micro-qwen2.5-vl": (),
}
"""Known weaknesses of a model, and what its training log does not tell."""
