"""The capability matrix: the committed page is what the registry says, and every "no" has its reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmcompress.evals import capabilities
from mmcompress.integrations.hf.capability import Capability, matrix
from mmcompress.integrations.hf.families import FAMILIES
from mmcompress.registry import METHODS
from mmcompress.spec import Spec
from mmcompress.types import Needs

PAGE = Path(__file__).parents[2] / "docs" / "methods-matrix.md"


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, Capability]]:
    return matrix(METHODS.names())


def test_the_page_is_what_the_registry_says(found: dict[str, dict[str, Capability]]) -> None:
    assert PAGE.read_text() == capabilities.markdown(found), "run: mmcompress list --markdown > docs/methods-matrix.md"


def test_every_method_is_asked_of_every_family(found: dict[str, dict[str, Capability]]) -> None:
    assert list(found) == METHODS.names() and {tuple(by_family) for by_family in found.values()} == {tuple(FAMILIES)}
    assert all(found["random"][family].reason == "" for family in FAMILIES)
    qwen = found["vtc-cls"]["qwen2_5_vl"]
    assert qwen.spec == Spec("vtc-cls", None, {"score": "received"}) and qwen.needs is not None and "CLS" in qwen.reason
    assert found["globalcom2"]["qwen2_vl"].needs is None


def test_reasons_are_said_once() -> None:
    refused = [Capability(Spec(name), None, f"{name} is not for QwenModel.") for name in ("pool", "todre")]
    possible = Capability(Spec("pool", None, {"size": 2}), Needs(), "pool is too large.")
    cells, reasons = capabilities.rows(
        {"pool": {"a": refused[0], "b": possible}, "todre": {"a": refused[1], "b": Capability(Spec("todre"), Needs())}}
    )
    assert cells == [["pool", "pre_llm", "no [1]", "size=2 [2]"], ["todre", "pre_llm", "no [1]", "yes"]]
    assert reasons == ["[1] it is not for the model.", "[2] it is too large."]
    table, listed = capabilities.table({"pool": {"a": refused[0]}})
    assert table.row_count == 1 and listed == reasons[:1]
