"""The plug-in of lmms-eval, `lmms_eval --model mmcompress`, and its tasks in `mmcompress eval --backend lmms`."""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """What lmms-eval is told by the entry point."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("mmcompress", chat_class_path="mmcompress.evals.lmms.model.MMCompress")
