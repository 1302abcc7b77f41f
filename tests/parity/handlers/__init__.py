"""How golden cases are recomputed: every module here has a table from stem prefix to method and function."""

from __future__ import annotations

import importlib
import pkgutil

from parity.handlers.base import NOT_BUILT, Handler, Kept, Outputs, matches

HANDLERS: dict[str, Handler] = {}
for _module in pkgutil.iter_modules(__path__, f"{__name__}."):
    HANDLERS |= getattr(importlib.import_module(_module.name), "HANDLERS", {})

__all__ = ["HANDLERS", "NOT_BUILT", "Handler", "Kept", "Outputs", "matches"]
