"""What all tests with lmms-eval need."""

from __future__ import annotations

from pathlib import Path

import local_tasks
import pytest


@pytest.fixture(scope="session")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    local_tasks.write(folder)
    return folder
