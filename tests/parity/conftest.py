"""`pytest tests/parity --golden-dir DIR [--method NAME...]`: our methods against what the published ones gave."""

from __future__ import annotations

from pathlib import Path

import pytest
from parity.cases import choose
from parity.handlers import HANDLERS

GOLDEN = Path(__file__).parents[1] / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--golden-dir", type=Path, default=GOLDEN, help="folder of cases, walked recursively")
    parser.addoption("--method", nargs="+", default=[], help="check only these methods")


def pytest_configure(config: pytest.Config) -> None:
    known = sorted(set().union(*(handler.methods for handler in HANDLERS.values())))
    for name in config.getoption("--method", default=[]):
        if name.replace("_", "-") not in known:
            raise pytest.UsageError(f"--method {name}: no such method has cases; available: {', '.join(known)}.")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    # The options are unknown to a run that did not start in this folder.
    folder = metafunc.config.getoption("--golden-dir", default=GOLDEN)
    methods = metafunc.config.getoption("--method", default=[])
    cases = choose(folder, {name.replace("_", "-") for name in methods})
    # An empty parameter set would be a skip.
    ids = [str(case.relative_to(folder)) for case in cases] or [f"no cases in {folder}"]
    metafunc.parametrize("golden", cases or [None], ids=ids)
