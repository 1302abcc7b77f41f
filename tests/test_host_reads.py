"""Where the host waits for the device: nowhere in ops, and elsewhere only as is listed here."""

from __future__ import annotations

import importlib
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from host_reads import host_reads
from kernel_calls import one_of_each
from policies.test_evictors import EVICTORS, evictor, observed, prompt
from registered import variants
from torch.nn import functional

from mmcompress import ops, wrap
from mmcompress.evals.bench.items import CLIP, make_item
from mmcompress.evals.loading import load_micro
from mmcompress.evals.micro import MICROVQA_PATH, load_microvqa
from mmcompress.evals.suites.base import picture_in
from mmcompress.integrations.hf.renamed import CACHE
from mmcompress.method import VisualMethod
from mmcompress.registry import METHODS

CALLS = one_of_each()
FOLDERS = [path.parent.name for path in Path(ops.__file__).parent.glob("kernels/*/reference.py")]

SHARES = "how many tokens each tile gets depends on how many it has"
SPREAD = "the method's own threshold decides how many tokens are taken, or whether there are any to rescale"
LEFT = "tokens that are left behind the first choice are listed, whose number attention decides"
MAY_WAIT: dict[str, tuple[set[str], str]] = {
    "aim": ({"bincount", "tolist"}, SHARES),
    "cdpruner": ({"bincount", "tolist", "_local_scalar_dense"}, f"{SHARES}; {SPREAD}"),
    "fastervlm": ({"bincount", "tolist"}, SHARES),
    "fastvid": ({"bincount", "tolist", "nonzero", "index by mask"}, "clips are cut where frames change"),
    "globalcom2": (
        {"bincount", "cpu", "_local_scalar_dense", "index by mask", "index_put_ by mask"},
        "shares of crops are worked out in float64 on the host",
    ),
    "hiprune": ({"bincount", "tolist", "_local_scalar_dense"}, f"{SHARES}; how wide rows are"),
    "hired": (
        {"bincount", "cpu", "tolist", "_local_scalar_dense", "index by mask"},
        "shares of crops are worked out in float64 on the host",
    ),
    "holov": ({"bincount", "tolist", "_local_scalar_dense", "index by mask"}, f"{SHARES}, again until none is left"),
    "prumerge": ({"bincount", "tolist", "_local_scalar_dense"}, f"{SHARES}; {SPREAD}"),
    "prumerge-plus": ({"bincount", "tolist", "_local_scalar_dense", "index by mask"}, f"{SHARES}; {SPREAD}"),
    "tokencorr": ({"bincount", "tolist", "_local_scalar_dense"}, f"{SHARES}; {SPREAD}"),
    "vidcom2": ({"index by mask", "_local_scalar_dense"}, "shares of frames are made up to the budget"),
    "visionzip": ({"bincount", "tolist", "nonzero", "_local_scalar_dense"}, f"{SHARES}; {LEFT}"),
    "vispruner": ({"bincount", "tolist", "nonzero"}, f"{SHARES}; {LEFT}"),
    "vtc-cls": ({"bincount", "tolist"}, SHARES),
}
POLICIES_MAY_WAIT = {
    "adakv": ({"bincount", "tolist"}, "heads hold different numbers of entries, as attention decides"),
    "tgv-kv": ({"tolist"}, "layers hold different numbers of entries, as attention decides"),
}
REFERENCES_MAY_WAIT = {
    "greedy_select": ({"tolist"}, "rows of similarities are made when they are asked for, on the CPU"),
    "dpp_select": ({"tolist"}, "likewise"),
}


def implementation(name: str, module: str) -> Any:
    found = [importlib.import_module(f"mmcompress.kernels.{folder}.{module}") for folder in FOLDERS]
    return next(getattr(one, name) for one in found if hasattr(one, name))


@pytest.mark.parametrize("name", CALLS)
def test_references_of_ops(name: str) -> None:
    with host_reads() as found:
        implementation(name, "reference")(*CALLS[name])
    assert set(found) <= REFERENCES_MAY_WAIT.get(name, (set(), ""))[0]


@pytest.mark.parametrize("name", CALLS)
def test_launches_of_kernels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    if not importlib.import_module("triton").knobs.runtime.interpret:
        pytest.skip("triton came before its switch")
    monkeypatch.setattr(interpreter.InterpretedFunction, "__getitem__", lambda *_: lambda *_, **__: None)
    with host_reads() as found:
        implementation(name, "triton")(*CALLS[name])
    assert not found


@pytest.mark.parametrize("spec", [spec for spec in variants("pre_llm") if spec.name != "specpc"], ids=str)
def test_methods(spec: Any) -> None:
    method: VisualMethod = METHODS.build(spec.name, spec.options)
    needs = method.needs(CLIP)
    item = make_item(180, needs, "image", 0, "cpu")
    with host_reads() as found:
        method.select(item, 20, needs)
    assert set(found) <= MAY_WAIT.get(spec.name, (set(), ""))[0]


@pytest.mark.parametrize("name", EVICTORS)
def test_policies(name: str) -> None:
    policy = evictor(name)
    row = prompt(policy)[1]
    with host_reads() as found:
        policy.select(observed(policy, row), 10)
    assert set(found) <= POLICIES_MAY_WAIT.get(name, (set(), ""))[0]


def reads(images: int, compressed: bool) -> tuple[Counter[str], Counter[str]]:
    """What is waited for in a prompt with an image in every row, and in the step behind it."""
    model, processor = load_micro()
    asked = load_microvqa(images)
    pictures = [picture_in(MICROVQA_PATH, row.image).open() for row in asked]
    prompts = [f"<s> USER: <image> {row.question} ASSISTANT:" for row in asked]
    inputs = processor(text=prompts, images=pictures, padding=True, padding_side="left", return_tensors="pt")
    longer = functional.pad(inputs["attention_mask"], (0, 1), value=1)
    with torch.no_grad(), wrap(model, "uniform", keep=0.2) if compressed else nullcontext():
        with host_reads() as prompt:
            output = model(**inputs, use_cache=True)
        following = {"input_ids": output.logits[:, -1:].argmax(-1), "attention_mask": longer, CACHE: output[CACHE]}
        with host_reads() as step:
            model(**following, use_cache=True)
    return prompt, step


def added(images: int) -> tuple[Counter[str], Counter[str]]:
    """What is waited for besides what the model itself waits for."""
    (prompt, step), (plain_prompt, plain_step) = reads(images, True), reads(images, False)
    return prompt - plain_prompt, step - plain_step


def test_a_compressed_model() -> None:
    (first, _), (second, step) = added(1), added(2)
    assert step <= Counter({"_local_scalar_dense": 1})  # whether there is padding, which transformers asks too
    assert first.total() <= 12  # whatever the prompt: where its items are, how much is left of each row, what for stats
    # Of every further item: whether what the method returned is a selection, and which tokens are separators.
    assert second - first <= Counter({"_local_scalar_dense": 1, "index by mask": 1})


def test_the_detector_detects() -> None:
    mask = torch.tensor([True, False])
    for read in (lambda: int(mask.sum()), lambda: mask.tolist(), lambda: mask[mask], lambda: bool(mask.any())):
        with host_reads() as found:
            read()
        assert found.total() == 1
