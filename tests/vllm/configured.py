"""Engine configurations, for which no engine has to start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm.engine.arg_utils import EngineArgs

from mmcompress.evals.micro import model_path


def configured(wanted: Any, model: Path | None = None, **settings: Any) -> Any:
    """The engine configuration with `wanted` under `mmcompress`."""
    usual: dict[str, Any] = dict(dtype="float32", max_model_len=1024, limit_mm_per_prompt={"image": 2, "video": 0})
    arguments = EngineArgs(
        model=str(model or model_path()), additional_config={"mmcompress": wanted}, **usual | settings
    )
    return arguments.create_engine_config()
