"""Answers as they come: a JSON line each, written at once, so that a killed evaluation goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from mmcompress.errors import InputError, SpecError
from mmcompress.evals.runner import Run, Spent

STATE_VERSION = 1


class Key(NamedTuple):
    """What an answer answers; budgets as written, for 1 and 1.0 are different ones."""

    suite: str
    question: str
    method: str | None
    keep: str
    kv: str | None

    @classmethod
    def of(cls, suite: str, question: str, run: Run) -> Key:
        """The key of what `run` answers."""
        return cls(suite, question, run.method, repr(run.keep), run.kv)


class Answers:
    """The folder of an evaluation: what was asked of what, and a file of answers for every process.

    Args:
        folder: made if missing.
        conditions: what answers depend on; those of a folder must agree.
        process: the number of this process; only it writes its file.

    Raises:
        SpecError: the folder holds an evaluation under other conditions.
        InputError: its files are broken.
        OSError: it cannot be written to.
    """

    def __init__(self, folder: Path, conditions: Mapping[str, Any], process: int = 0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.known = folder, {}
        self._agree(conditions, process)
        self.refresh()
        path = folder / f"answers-{process}.jsonl"
        _drop_torn_line(path)
        self._file = path.open("ab", buffering=0)

    known: dict[Key, tuple[str, Spent]]

    def __contains__(self, key: Key) -> bool:
        return key in self.known

    def add(self, answers: Iterable[tuple[Key, str, Spent]]) -> None:
        """Write answers down.

        Raises:
            OSError: they cannot be written, for the disk is full; those before them stay.
        """
        lines = []
        for key, text, spent in answers:
            self.known[key] = (text, spent)
            lines.append(json.dumps({**key._asdict(), "text": text, **vars(spent)}) + "\n")
        remaining = memoryview("".join(lines).encode())
        while remaining:
            remaining = remaining[self._file.write(remaining) :]

    def refresh(self) -> None:
        """Read what all processes have written.

        Raises:
            InputError: a line is none of theirs.
        """
        for path in sorted(self.folder.glob("answers-*.jsonl")):
            whole = path.read_bytes()
            lines = whole[: whole.rfind(b"\n") + 1].splitlines()
            for number, line in enumerate(lines, 1):
                try:
                    cells = json.loads(line)
                    key = Key(*(cells.pop(name) for name in Key._fields))
                    self.known[key] = (cells.pop("text"), Spent(**cells))
                except (ValueError, KeyError, TypeError, AttributeError) as error:
                    raise InputError(f"{path}, line {number} is no answer of an evaluation.") from error

    def close(self) -> None:
        """Write no more."""
        self._file.close()

    def __enter__(self) -> Answers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _agree(self, conditions: Mapping[str, Any], process: int) -> None:
        path = self.folder / "conditions.json"
        wanted = {"version": STATE_VERSION, **conditions}
        if not path.exists():
            if process == 0:
                write_whole(path, json.dumps(wanted, indent=1) + "\n")
            return
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{path} is no JSON.") from error
        differing = sorted(name for name in wanted if name in found and wanted[name] != found[name])
        if differing:
            changes = "; ".join(f"{name} was {found[name]}, is {wanted[name]}" for name in differing)
            raise SpecError(
                f"{self.folder} holds answers given under other conditions ({changes}): choose another --out."
            )
        if process == 0:
            write_whole(path, json.dumps({**found, **wanted}, indent=1) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Replace a file, so that it is never there in part."""
    beside = path.with_name(path.name + ".part")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def _drop_torn_line(path: Path) -> None:
    """Cut off what a process that was killed while writing left behind the last whole line."""
    if path.exists():
        with path.open("rb+") as file:
            file.truncate(file.read().rfind(b"\n") + 1)
