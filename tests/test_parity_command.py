"""The parity command itself: it passes on any right folder and fails on anything else."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from parity.cases import check, choose, find_handler, load
from parity.handlers import HANDLERS
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

ROOT = Path(__file__).parents[1]


def write(path: Path, tensors: dict[str, Tensor], params: dict[str, Any], **extra: Any) -> Path:
    """Write a case whose tensors say by `in_` and `out_` what they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path.with_suffix(".safetensors"))
    roles = {
        name: {"shape": list(tensor.shape), "role": "input" if name.startswith("in_") else "output"}
        for name, tensor in tensors.items()
    }
    sidecar = {"method": path.stem.split("_case")[0], "params": params, "tensors": roles, **extra}
    path.with_suffix(".json").write_text(json.dumps(sidecar))
    return path.with_suffix(".json")


def vtc_cls(path: Path, seed: int, layers: int, heads: int, tokens: int, first: int, kept: int, **extra: Any) -> Path:
    """A VTC-CLS case by loops over layers and heads in float64."""
    rng = np.random.default_rng(seed)
    attention = rng.dirichlet([0.3] * (tokens + 1), size=(layers, heads))[:, :, 1:].astype(np.float32)
    features = rng.normal(size=(1, tokens, 5)).astype(np.float32)
    score = np.zeros(tokens)
    for layer in range(first, layers - 1):
        for head in range(heads):
            score += attention[layer, head].astype(np.float64) / heads
    keep = sorted(sorted(range(tokens), key=lambda n: (-score[n], n))[:kept])
    tensors = {
        "in_cls_attn": attention,
        "in_patch_features": features,
        "out_score": score.astype(np.float32),
        "out_keep_indices": np.array(keep),
        "out_tokens": features[:, keep],
    }
    params = {
        "num_layers": layers,
        "start_layer": first,
        "end_layer_exclusive": layers - 1,
        "token_num": kept,
        "layer_reduction": "sum",
        "head_reduction": "mean",
    }
    return write(path, {name: torch.from_numpy(value) for name, value in tensors.items()}, params, **extra)


def todre(path: Path, seed: int, tokens: int, thumbnail: int, kept: int) -> Path:
    """A ToDRE case by Algorithm 1 in float64."""
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(tokens, 24)).astype(np.float32)
    attention = rng.random(thumbnail).astype(np.float32)
    unit = vectors.astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    order = [int(attention.argmax())]
    while len(order) < kept:
        rest = [n for n in range(tokens) if n not in order]
        order.append(min(rest, key=lambda n: sum(float(unit[n] @ unit[m]) for m in order)))
    tensors = {
        "in_tokens": torch.from_numpy(vectors),
        "in_thumbnail_cls_attn": torch.from_numpy(attention),
        "out_selection_order": torch.tensor(order),
        "out_keep_indices": torch.tensor(sorted(order)),
    }
    return write(path, tensors, {"k": kept, "thumbnail_tokens": thumbnail})


def capture_clip(path: Path, seed: int, layers: int, heads: int, image: int) -> Path:
    """A capture case from a model that returns its attention maps."""
    torch.manual_seed(seed)
    settings = dict(
        hidden_size=8 * heads, intermediate_size=40, num_hidden_layers=layers, num_attention_heads=heads,
        image_size=image, patch_size=14, initializer_factor=5.0,
    )  # fmt: skip
    model = CLIPVisionModel._from_config(CLIPVisionConfig(**settings), attn_implementation="eager").eval()
    tower = getattr(model, "vision_model", model)
    projected: dict[str, Tensor] = {}
    for number, block in enumerate(tower.encoder.layers):
        for kind in ("q", "k"):
            projection = getattr(block.self_attn, f"{kind}_proj")
            projection.register_forward_hook(lambda m, a, out, at=f"{kind}{number}": projected.update({at: out}))
    pixels = torch.randn(3, 3, image, image)
    with torch.no_grad():
        output = model(pixels, output_attentions=True, output_hidden_states=True)
    maps = torch.stack(output.attentions)
    query, key, width = projected[f"q{layers - 1}"][:, :1], projected[f"k{layers - 1}"], 8 * heads
    logits = [query[..., 8 * h : 8 * h + 8] @ key[..., 8 * h : 8 * h + 8].mT / 8**0.5 for h in range(heads)]
    before = projected[f"k{layers - 2}"]
    tensors = {
        **{f"in_w.{name}": weight for name, weight in tower.state_dict().items()},
        "in_pixel_values": pixels,
        "out_cls_attn_per_layer": maps[:, :, :, 0, 1:],
        "out_received_attn_per_layer": maps.mean(dim=(2, 3))[..., 1:],
        "out_last_layer_presoftmax_cls_logits_headmean": (sum(logits) / heads)[:, 0, 1:],
        "out_last_layer_fullwidth_cls_attn": (query @ key.mT / width**0.5).softmax(dim=-1)[:, 0, 1:],
        "out_penultimate_key_metric": sum(before[..., 8 * h : 8 * h + 8] for h in range(heads)) / heads,
        "out_hidden_penultimate": output.hidden_states[-2],
        "out_last_layer_keys": key,
    }
    return write(path, tensors, {"config": model.config.to_dict()})


def snapkv(path: Path, seed: int, group: int, tokens: int, window: int, kept: int, **extra: Any) -> Path:
    """A SnapKV case of two KV heads by loops in float64: no roles, inputs in a file of their own, half precision."""
    rng = np.random.default_rng(seed)
    key, value = (rng.normal(size=(1, 2, tokens, 8)).astype(np.float16) for _ in range(2))
    query = rng.normal(size=(1, 2 * group, tokens, 8)).astype(np.float16)
    score = np.zeros((1, 2, tokens - window), np.float32)
    chosen = np.zeros((1, 2, kept), np.int32)
    for head in range(2):
        received = np.zeros(tokens - window)
        for reader in range(head * group, head * group + group):
            for row in range(tokens - window, tokens):
                logits = key[0, head, : row + 1].astype(float) @ query[0, reader, row].astype(float) / 8**0.5
                received += (np.exp(logits) / np.exp(logits).sum())[: tokens - window] / group
        padded = np.pad(received, 1)
        score[0, head] = (padded[:-2] + padded[1:-1] + padded[2:]) / 3
        best = np.argsort(-score[0, head], kind="stable")[: kept - window]
        chosen[0, head] = [*best, *range(tokens - window, tokens)]
    save_file({"q": torch.from_numpy(query), "k": torch.from_numpy(key), "v": torch.from_numpy(value)},
              path.with_name(f"common_T{tokens}_{path.stem}.safetensors"))  # fmt: skip
    params = {
        "window": window, "capacity_incl_window": kept, "kernel": 3, "pooling": "avgpool", "group_reduction": "mean",
    }  # fmt: skip
    tensors = {"score_pooled": torch.from_numpy(score), "kept_positions": torch.from_numpy(chosen)}
    write(path, tensors, params, inputs=f"common_T{tokens}_{path.stem}", **extra)
    return edit(path.with_suffix(".json"), lambda s: [t.pop("role") for t in s["tensors"].values()])


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """Change a sidecar."""
    sidecar = json.loads(path.read_text())
    change(sidecar)
    path.write_text(json.dumps(sidecar))
    return path


def alter(path: Path, name: str, change: Callable[[Tensor], Tensor]) -> Path:
    """Change one tensor of a case."""
    tensors = load_file(path.with_suffix(".safetensors"))
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, path.with_suffix(".safetensors"))
    return path


def nudged(tensor: Tensor) -> Tensor:
    """The tensor with its last element altered: masks flip, indices move by one, values by 1 % of the largest."""
    changed = tensor.clone()
    if tensor.dtype == torch.bool:
        changed.view(-1)[-1] ^= True
        return changed
    changed.view(-1)[-1] += 1e-2 * tensor.abs().max() if tensor.is_floating_point() else 1
    return changed


def put(kept: Tensor, value: int) -> Tensor:
    """The indices with the last of them replaced."""
    changed = kept.clone()
    changed.view(-1)[-1] = value
    return changed


def command(*arguments: str | Path) -> tuple[int, str]:
    """Run the parity command; its status and output."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "tests/parity", "-p", "no:cacheprovider", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout + done.stderr


def rejected(path: Path, message: str) -> None:
    """Assert that a case fails for this reason."""
    with pytest.raises(AssertionError, match=message):
        check(load(path))


def test_new_cases_pass_and_one_altered_index_fails(tmp_path: Path) -> None:
    folder = tmp_path / "golden"
    capture_clip(folder / "capture_clip_case", 5, layers=3, heads=2, image=42)
    todre(folder / "todre_case", 6, tokens=61, thumbnail=61, kept=60)
    todre(folder / "deep/er/todre_case", 7, tokens=90, thumbnail=31, kept=1)
    vtc_cls(folder / "vtc_cls_case", 8, layers=5, heads=1, tokens=33, first=0, kept=33)
    altered = vtc_cls(folder / "deep/vtc_cls_case", 9, layers=9, heads=7, tokens=50, first=4, kept=11)
    (folder / "manifests").mkdir()
    (folder / "manifests/list.json").write_text("[]")
    (folder / "INDEX.md").write_text("no case")
    save_file({"in_x": torch.zeros(1)}, folder / "common_T5.safetensors")

    status, output = command("--golden-dir", folder)
    assert (status, "5 passed" in output) == (0, True), output

    alter(altered, "out_keep_indices", nudged)
    status, output = command("--golden-dir", folder, "--method", "vtc_cls")
    assert (status, "1 failed, 1 passed" in output) == (1, True), output
    assert "[deep/vtc_cls_case.json]" in output and "out_keep_indices differs at [10] and 0 other places" in output


def test_nothing_that_is_wrong_is_passed_over(tmp_path: Path) -> None:
    arguments = dict(layers=4, heads=2, tokens=20, first=1, kept=5)
    vtc_cls(tmp_path / "vtc_cls_case_good", 1, **arguments)
    vtc_cls(tmp_path / "unheard_of_case", 1, **arguments)
    vtc_cls(tmp_path / "vtc_cls_case_no_sidecar", 1, **arguments).unlink()
    vtc_cls(tmp_path / "vtc_cls_case_no_tensors", 1, **arguments).with_suffix(".safetensors").unlink()
    vtc_cls(tmp_path / "vtc_cls_case_bad_json", 1, **arguments).write_text("{")
    vtc_cls(tmp_path / "vtc_cls_case_bad_tensors", 1, **arguments).with_suffix(".safetensors").write_bytes(b"123")
    (tmp_path / "stray.json").write_text("no JSON")
    save_file({"in_x": torch.zeros(1)}, tmp_path / "orphan.safetensors")
    wrong = {"vtc_cls_case_no_sidecar.safetensors", "stray.json", "orphan.safetensors"}
    wrong |= {f"vtc_cls_case_{kind}.json" for kind in ("no_tensors", "bad_json", "bad_tensors")}

    status, output = command("--golden-dir", tmp_path)
    assert status == 1
    assert set(re.findall(r"^FAILED \S*\[(\S+?)\]", output, re.MULTILINE)) == wrong | {"unheard_of_case.json"}
    assert "7 failed, 1 passed" in output and "skipped" not in output
    assert "no handler for 'unheard_of_case'; known prefixes: " in output

    # What cannot be read may belong to the method that is asked for; what can be read and does not is left out.
    assert {path.name for path in choose(tmp_path, {"vtc-cls"})} == wrong | {"vtc_cls_case_good.json"}


def test_no_cases_are_a_failure(tmp_path: Path) -> None:
    vtc_cls(tmp_path / "vtc_cls_case", 1, layers=4, heads=2, tokens=20, first=1, kept=5)
    status, output = command("--golden-dir", tmp_path, "--method", "todre")
    assert (status, "no cases in" in output, "1 failed" in output) == (1, True, True), output
    assert choose(tmp_path / "nothing", set()) == []


def test_an_unknown_method_is_an_error() -> None:
    status, output = command("--method", "vtc_clss")
    assert status == 4
    known = sorted(set().union(*(handler.methods for handler in HANDLERS.values())))
    assert f"vtc_clss: no such method has cases; available: {', '.join(known)}." in output


def test_methods_restrict_a_run(tmp_path: Path) -> None:
    case = vtc_cls(tmp_path / "vtc_cls_case", 1, layers=4, heads=2, tokens=20, first=1, kept=5)
    other = todre(tmp_path / "todre_case", 1, tokens=9, thumbnail=9, kept=3)
    write(tmp_path / "unheard_of_case", {"in_x": torch.zeros(1)}, {})
    assert choose(tmp_path, {"vtc-cls"}) == [case]
    assert choose(tmp_path, {"todre", "vtc-cls"}) == [other, case]
    assert len(choose(tmp_path, set())) == 3
    assert choose(tmp_path, {"capture-clip"}) == []


@pytest.mark.parametrize("golden", choose(ROOT / "tests/golden", set()), ids=lambda path: path.stem)
def test_every_recorded_output_is_compared(golden: Path) -> None:
    case = load(golden)
    actual = dict(case.handler.run(case))
    for name, value in case.outputs.items():
        expected = {**case.expected, name: nudged(value)}
        with pytest.raises(AssertionError, match=f"^{name}"):
            check(type(case)(case.handler, case.sidecar, case.inputs, expected))
    assert set(case.outputs) <= set(actual)
    assert all(reason for reason in case.handler.unchecked.values())


def test_an_output_that_nobody_recomputes_fails(tmp_path: Path) -> None:
    path = vtc_cls(tmp_path / "vtc_cls_case", 1, layers=4, heads=2, tokens=20, first=1, kept=5)
    alter(path, "in_cls_attn", lambda tensor: tensor)  # rewriting alone changes nothing
    check(load(path))
    edit(path, lambda sidecar: sidecar["tensors"].update(out_new={"shape": [2], "role": "output"}))
    with pytest.raises(AssertionError, match="disagree on \\['out_new'\\]"):
        load(path)
    tensors = path.with_suffix(".safetensors")
    save_file({**load_file(tensors), "out_new": torch.zeros(2)}, tensors)
    rejected(path, "^out_new is not checked")


def test_tensors_must_be_as_the_sidecar_says(tmp_path: Path) -> None:
    arguments = dict(layers=4, heads=2, tokens=20, first=1, kept=5)
    path = vtc_cls(tmp_path / "vtc_cls_case", 1, **arguments)
    rejected(edit(path, lambda sidecar: sidecar["tensors"].pop("out_score")), "disagree on \\['out_score'\\]")
    path = vtc_cls(tmp_path / "vtc_cls_case", 1, **arguments)
    rejected(alter(path, "out_score", lambda tensor: tensor[:-1]), "out_score is \\[19\\], its sidecar says \\[20\\]")
    path = vtc_cls(tmp_path / "vtc_cls_case", 1, **arguments)
    rejected(edit(path, lambda s: [t.update(role="input") for t in s["tensors"].values()]), "no output to check")
    path = vtc_cls(tmp_path / "vtc_cls_case", 1, **arguments)
    rejected(edit(path, lambda s: s["params"].update(layer_reduction="max")), "no option reduces")


def test_parameters_come_from_the_sidecar(tmp_path: Path) -> None:
    for entry, value in {"start_layer": 2, "end_layer_exclusive": 2, "token_num": 6}.items():
        path = vtc_cls(tmp_path / "vtc_cls_case", 1, layers=4, heads=2, tokens=20, first=1, kept=5)
        rejected(edit(path, lambda sidecar: sidecar["params"].update({entry: value})), "^out_")  # noqa: B023


def test_half_precision_is_upcast(tmp_path: Path) -> None:
    path = vtc_cls(tmp_path / "vtc_cls_case", 1, layers=4, heads=2, tokens=20, first=1, kept=5)
    alter(path, "in_patch_features", Tensor.half)
    case = load(alter(path, "out_tokens", Tensor.half))
    assert {value.dtype for value in case.inputs.values()} == {torch.float32}
    check(case)


def test_shared_inputs_are_loaded(tmp_path: Path) -> None:
    path = vtc_cls(tmp_path / "vtc_cls_case", 1, layers=4, heads=2, tokens=20, first=1, kept=5)
    tensors = load_file(path.with_suffix(".safetensors"))
    shared = {name: tensors.pop(name) for name in list(tensors) if name.startswith("in_")}
    save_file(tensors, path.with_suffix(".safetensors"))
    save_file(shared, tmp_path / "common_T20.safetensors")
    check(load(edit(path, lambda sidecar: sidecar.update(inputs="common_T20"))))
    assert choose(tmp_path, set()) == [path]


@pytest.mark.parametrize(
    ("tolerance", "passes"),
    [
        (None, False),
        (1e-2, True),
        (1e-5, False),
        ({"rtol": 0, "atol": 1e-2}, True),
        ({"out_score": {"rtol": 1e-7, "atol": 1.5e-2}}, True),
        ({"score": "rtol 1e-5 atol 1e-2 (fp32)"}, True),
        ({"tokens": "rtol 1 atol 1"}, False),
        ({"score": "as close as can be"}, False),
    ],
)
def test_the_tolerance_is_the_sidecars_if_it_has_one(tmp_path: Path, tolerance: Any, passes: bool) -> None:
    extra = {} if tolerance is None else {"tolerance": tolerance}
    path = vtc_cls(tmp_path / "vtc_cls_case", 1, layers=4, heads=2, tokens=20, first=1, kept=5, **extra)
    alter(path, "out_score", nudged)
    if passes:
        check(load(path))
    else:
        rejected(path, "^out_score")


@pytest.mark.parametrize(
    ("gap", "passes"),
    [({}, False), ({"topk_gap": 0.0}, True), ({"gaps": {"score": 1e-9}}, True), ({"total_gap": 1e-3}, False)],
)
def test_ties_may_fall_either_way_where_the_sidecar_says_so(tmp_path: Path, gap: dict[str, Any], passes: bool) -> None:
    attention = torch.tensor([0.3, 0.1, 0.2, 0.2, 0.2]).expand(2, 1, 5)
    tensors = {
        "in_cls_attn": attention,
        "in_patch_features": torch.zeros(1, 5, 2),
        "out_keep_indices": torch.tensor([0, 2, 4]),  # our rule keeps 3 of the equals 2, 3, 4
    }
    params = {
        "num_layers": 2, "start_layer": 0, "end_layer_exclusive": 1, "token_num": 3,
        "layer_reduction": "sum", "head_reduction": "mean",
    }  # fmt: skip
    path = write(tmp_path / "vtc_cls_case", tensors, params, **gap)
    if passes:
        check(load(path))
        alter(path, "out_keep_indices", lambda kept: torch.tensor([0, 1, 2]))
    rejected(path, "^out_keep_indices")


def test_where_there_are_no_roles_the_handler_knows_them(tmp_path: Path) -> None:
    path = snapkv(tmp_path / "snapkv_case", 3, group=3, tokens=40, window=5, kept=12, topk_gap=1e-3)
    case = load(path)
    assert set(case.inputs) == {"q", "k", "v"} and set(case.expected) == {"score_pooled", "kept_positions"}
    assert case.inputs["q"].dtype == torch.float32
    check(case)
    assert choose(tmp_path, set()) == [path] and choose(tmp_path, {"h2o"}) == []
    rejected(alter(path, "score_pooled", nudged), "^score_pooled")
    alter(path, "score_pooled", lambda score: score - 1e-2 * score.abs().max())
    rejected(edit(path, lambda sidecar: sidecar.update(tolerance={"kept": "in any order"})), "^score_pooled")
    check(load(edit(path, lambda sidecar: sidecar.update(tolerance={"score": "rtol 0 atol 1"}))))


@pytest.mark.parametrize(("stated", "by_score"), [({}, True), ({"topk_gap": None}, True), ({"topk_gap": 1e-3}, False)])
def test_without_a_gap_kept_entries_are_compared_by_score(
    tmp_path: Path, stated: dict[str, Any], by_score: bool
) -> None:
    path = snapkv(tmp_path / "snapkv_case", 4, group=1, tokens=30, window=4, kept=10, **stated)
    check(load(alter(path, "kept_positions", lambda kept: kept.flip(-1))))  # a set has no order
    case = load(path)
    kept = case.expected["kept_positions"]
    dropped = next(token for token in range(30) if token not in kept[0, 1])
    with pytest.raises(AssertionError, match=r"^kept_positions differs|^kept_positions: "):
        check(replace(case, expected={**case.expected, "kept_positions": put(kept, dropped)}))
    for wrong in (30, int(kept[0, 1, 0])):
        message = "^kept_positions names something twice" if by_score else "^kept_positions differs"
        with pytest.raises(AssertionError, match=message):
            check(replace(case, expected={**case.expected, "kept_positions": put(kept, wrong)}))


def test_a_gap_may_be_stated_by_output(tmp_path: Path) -> None:
    gaps = {"gaps": {"first": 1e-9, "first_of_all": 0.5}}
    case = load(snapkv(tmp_path / "snapkv_case", 5, group=1, tokens=30, window=4, kept=10, **gaps))
    assert (case.gap("kept_first"), case.gap("kept_first_of_all"), case.gap("kept")) == (1e-9, 0.5, 1e-9)


def test_entries_of_rows_are_outputs(tmp_path: Path) -> None:
    row = {
        "L": 3, "capacity_incl_window": 12, "window": 2, "beta": 5, "T": 40,
        "kept_per_layer_official": [20, 12, 4], "total": 36,
    }  # fmt: skip
    path = tmp_path / "pyramidkv_budgets_case.json"
    path.write_text(json.dumps({"rows": [row, row], "tensors": {}}))
    case = load(path)
    assert set(case.outputs) == {f"rows.{n}.{name}" for n in (0, 1) for name in ("kept_per_layer_official", "total")}
    check(case)
    rejected(edit(path, lambda sidecar: sidecar["rows"][1].update(total=37)), "^rows.1.total")
    rejected(edit(path, lambda sidecar: sidecar["rows"][0].update(new=1)), "^rows.0.new is not checked")


def test_the_longest_prefix_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    longer = HANDLERS["todre_"]
    monkeypatch.setitem(HANDLERS, "vtc_cls_odd_", longer)
    assert find_handler("vtc_cls_odd_k23") is longer
    assert find_handler("vtc_cls_even") is HANDLERS["vtc_cls_"]
    assert find_handler("vtc") is None
