"""The capability matrix: the committed page is what the registry says, and every "no" has its reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmcompress.evals import capabilities
from mmcompress.integrations.hf.capability import Capability, models
from mmcompress.integrations.hf.families import FAMILIES
from mmcompress.integrations.vllm.capability import FAMILIES as IN_VLLM
from mmcompress.integrations.vllm.capability import capability as vllm_capability
from mmcompress.registry import METHODS, POLICIES
from mmcompress.spec import Spec
from mmcompress.types import Needs

PAGE = Path(__file__).parents[2] / "docs" / "methods-matrix.md"


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, Capability]]:
    return capabilities.measure(METHODS.names())


@pytest.fixture(scope="module")
def policies() -> dict[str, dict[str, Capability]]:
    return capabilities.measure_policies(POLICIES.names())


def test_the_page_is_what_the_registry_says(
    found: dict[str, dict[str, Capability]], policies: dict[str, dict[str, Capability]]
) -> None:
    page = capabilities.markdown(found, policies)
    assert PAGE.read_text() == page, "run: mmcompress list --markdown > docs/methods-matrix.md"


def test_every_policy_is_asked_of_every_family(policies: dict[str, dict[str, Capability]]) -> None:
    assert {tuple(by_family) for by_family in policies.values()} == {(*FAMILIES, "in vLLM")}
    in_vllm = [name for name, by_family in policies.items() if by_family["in vLLM"].needs is not None]
    assert in_vllm == ["quest", "streamingllm"]
    assert "--kv-cache-dtype" in policies["kivi"]["in vLLM"].reason
    assert "take streamingllm" in policies["snapkv"]["in vLLM"].reason
    assert "take quest" in policies["tidaldecode"]["in vLLM"].reason


def test_every_method_is_asked_of_every_family(found: dict[str, dict[str, Capability]]) -> None:
    columns = (*FAMILIES, "in vLLM")
    assert list(found) == METHODS.names() and {tuple(by_family) for by_family in found.values()} == {columns}
    assert all(found["random"][family].reason == "" for family in FAMILIES)
    qwen = found["vtc-cls"]["qwen2_5_vl"]
    assert qwen.spec == Spec("vtc-cls", None, {"score": "received"}) and qwen.needs is not None and "CLS" in qwen.reason
    assert found["globalcom2"]["qwen2_vl"].needs is None


def test_vllm_does_on_every_family_what_it_does_on_llava(found: dict[str, dict[str, Capability]]) -> None:
    for family, model in models():
        if family not in IN_VLLM:
            continue
        for name, by_family in found.items():
            there, here = by_family[family], by_family["in vLLM"]
            both = Spec(name, None, {**there.spec.options, **here.spec.options})
            stitched = METHODS.get(name).info.stage == "projector" and family != "llava"  # vLLM stitches at once
            possible = there.needs is not None and here.needs is not None and not stitched
            assert (vllm_capability(model, both).needs is not None) == possible, (name, family)


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
