"""The page of samples shows everything that can be asked."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from PIL import Image

from mmcompress.evals.micro import samples
from mmcompress.evals.micro.questions import TYPES


def test_the_page_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["samples", "--out", str(tmp_path)])
    samples.main()
    page = (tmp_path / "micro-samples.md").read_text()
    types = set(re.findall(r"^\| (\w+) \| [\w-]+ \| `.+` \| `.+` \|$", page, re.MULTILINE))
    assert types == {*TYPES, "compare", "clip"}
    assert "![Pictures with their questions and answers](micro-samples.png)" in page
    assert (tmp_path / "micro-samples.png").stat().st_size <= 600_000
    with Image.open(tmp_path / "micro-samples.png") as image:
        assert image.width > 1000


def test_the_committed_page_is_what_is_made_now() -> None:
    committed = Path(__file__).parents[2] / "docs" / "micro-samples.md"
    assert committed.read_text() == samples.page(samples.blocks())
