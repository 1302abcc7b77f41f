"""Reading result files; whatever is wrong with one is said in a sentence."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmcompress.errors import InputError, SpecError

NAME = "results.json"


def read(path: Path, versions: Mapping[str, int]) -> dict[str, Any]:
    """The result file `path`, or the one in a folder, of one of the formats whose versions are given.

    Raises:
        InputError: it is missing, not whole, or of another format.
        SpecError: it is of another version of its format.
    """
    file = path / NAME if path.is_dir() else path
    if not file.exists():
        raise InputError(_missing(path, file))
    text = file.read_bytes()
    if not text.strip():
        raise InputError(f"{file} is empty.")
    try:
        record = json.loads(text)
    except ValueError as error:
        raise InputError(f"{file} is no JSON, or not all of it: {error}") from error
    form = record.get("format") if isinstance(record, dict) else None
    if not isinstance(form, str) or form not in versions:
        wanted = " or ".join(map(repr, versions))
        raise InputError(f"{file} is no result that can be read here: its format is {form!r}, not {wanted}.")
    if record.get("version") != versions[form]:
        raise SpecError(
            f"{file} has version {record.get('version')} of its format; this mmcompress reads version "
            f"{versions[form]}: make it anew with the command in it."
        )
    return dict(record)


def _missing(path: Path, file: Path) -> str:
    if not path.exists():
        return f"{path} does not exist; mmcompress eval and mmcompress bench make such folders."
    if (path / "conditions.json").exists():
        return f"the evaluation in {path} has not finished: the same mmcompress eval command goes on with it."
    return f"{file} does not exist: {path} is no folder of mmcompress eval or mmcompress bench."
