"""What hangs on a wrapped model and must not be copied with it."""

from __future__ import annotations

from typing import Any

from mmcompress.errors import UnsupportedError


class Attached:
    """Hooks on one model; a copy of the model would have hooks that act on the first."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise UnsupportedError(
            "a wrapped model cannot be copied or pickled, nor its parts; unwrap it first, or wrap it afterwards."
        )
