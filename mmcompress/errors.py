"""The three ways a request can fail; each message names what is wrong, what is allowed and the nearest match."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MMCompressError(Exception):
    """Base class of every error raised by mmcompress."""


class SpecError(MMCompressError, ValueError):
    """The request itself is wrong: an unknown name or option, a value out of range, a contradiction."""


class UnsupportedError(MMCompressError, RuntimeError):
    """The request is valid, but this model, cache or engine cannot carry it out."""


class InputError(MMCompressError, ValueError):
    """The data is unusable: a missing or corrupt image, NaN features, mismatched placeholders."""


def unknown_name(kind: str, name: str, allowed: Iterable[str]) -> SpecError:
    """Build the error for a `name` that is not in `allowed`, with the nearest match."""
    name, allowed = str(name), sorted(allowed)
    nearest = difflib.get_close_matches(name.lower(), allowed, n=1, cutoff=0.5)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    listing = ", ".join(allowed) if allowed else "none"
    return SpecError(f"unknown {kind} {name!r}.{hint} Available: {listing}.")
