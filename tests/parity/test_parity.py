"""Every golden case."""

from __future__ import annotations

from pathlib import Path

from parity.cases import check, load


def test_parity(golden: Path | None) -> None:
    assert golden is not None, "there is nothing to check"
    check(load(golden))
