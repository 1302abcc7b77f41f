"""The benchmark of selections compares like with like, gives up in time, and fails on answers that differ."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import normalize

from mmcompress.evals.bench import timing
from mmcompress.evals.bench.items import CLIP, layout, make_item
from mmcompress.evals.bench.plain import PLAIN, plain_loop
from mmcompress.evals.bench.rows import COLUMNS
from mmcompress.evals.bench.selection import default_specs, main
from mmcompress.methods.todre import ToDRE
from mmcompress.registry import METHODS
from mmcompress.spec import Spec
from mmcompress.types import Needs


@pytest.fixture(autouse=True)
def few_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "REPEATS", 2)


def run(out: Path, methods: str, *arguments: str) -> dict[str, Any]:
    main(["--out", str(out), "--methods", methods, "--images", "2", *arguments])
    return json.loads((out / "results.json").read_text())


def test_two_methods_at_two_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = run(tmp_path / "new" / "folder", "todre,evs", "--tokens", "16,20", "--keep", "0.3")
    rows = record["rows"]
    assert [[row[key] for key in ("method", "tokens", "item", "kept", "against", "equal")] for row in rows] == [
        ["todre", 16, "4x4", 4, "plain loop", True],
        ["todre", 20, "2x2 + 4x4", 6, "plain loop", True],
        ["evs", 16, "4 frames 2x2", 4, "one by one", True],
        ["evs", 20, "5 frames 2x2", 6, "one by one", True],
    ]
    assert all(row["ms"] > 0 and row["ratio"] == row["against_ms"] / row["ms"] for row in rows)
    assert (record["images"], record["keep"], record["limit"], record["left_out"]) == (2, 0.3, 60, {})
    assert record["environment"]["device"] == "cpu" and record["environment"]["torch"] == torch.__version__
    lines = (tmp_path / "new" / "folder" / "table.md").read_text().splitlines()
    assert lines[0] == f"| {' | '.join(COLUMNS)} |"
    assert lines[2].startswith("| todre | 16 | 4x4 | 4 | ") and lines[5].endswith(" | yes |")
    assert "batches of 2, keep 0.3" in lines[-1]
    printed = capsys.readouterr().out
    assert all(text in printed for text in (*COLUMNS, "2x2 + 4x4", "plain loop", "one by one"))


def test_every_plain_loop_agrees_with_its_method(tmp_path: Path) -> None:
    rows = run(tmp_path, ",".join(PLAIN), "--tokens", "81,125", "--keep", "0.3")["rows"]
    assert len(rows) == 2 * len(PLAIN)
    assert {(row["against"], row["equal"]) for row in rows} == {("plain loop", True)}


def test_a_plain_loop_is_found_by_what_a_spec_means() -> None:
    assert plain_loop(ToDRE(objective="k-center")) is PLAIN["todre(objective=k-center)"]
    assert plain_loop(METHODS.build("todre", {"objective": "max-sum"})) is PLAIN["todre"]
    assert plain_loop(METHODS.build("uniform", {})) is None


def test_every_method_is_measured_by_default() -> None:
    built_in = [METHODS.get(name).info for name in set(METHODS.names()) - set(METHODS.plugins())]  # type: ignore[attr-defined]
    expected = {card.name for card in built_in if card.stage == "pre_llm"}
    assert {Spec.parse(text).name for text in default_specs()} == expected
    assert set(PLAIN) <= set(default_specs())


def test_what_takes_too_long_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def endless(*_: Any) -> None:
        while True:
            time.sleep(0.01)

    before = signal.getsignal(signal.SIGALRM)
    monkeypatch.setitem(PLAIN, "divprune", endless)
    (row,) = run(tmp_path, "divprune", "--tokens", "16", "--limit", "0.7", "--keep", "4")["rows"]
    assert row["ms"] > 0 and row["kept"] == 4
    assert row["against_ms"] is None and row["ratio"] is None and row["equal"] is None
    assert "| plain loop | > 0.7 s |  |  |" in (tmp_path / "table.md").read_text()
    assert signal.getsignal(signal.SIGALRM) == before and signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_answers_that_differ_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PLAIN, "divprune", lambda item, budget, needs: torch.arange(budget))
    with pytest.raises(SystemExit, match="divprune at 16 tokens, divprune at 20 tokens"):
        run(tmp_path, "uniform,divprune", "--tokens", "16,20")
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [row["equal"] for row in rows] == [True, True, False, False]
    assert (tmp_path / "table.md").read_text().count(" | NO |") == 2


def test_what_needs_a_file_is_left_out(tmp_path: Path) -> None:
    record = run(tmp_path, "uniform,cdpruner,cdpruner(text_tower=/clip),specpc(draft=/small)", "--tokens", "16")
    assert [row["method"] for row in record["rows"]] == ["uniform"]
    assert record["left_out"] == {
        "cdpruner": "needs text_tower= or relevance=",
        "cdpruner(text_tower=/clip)": "reads the text tower of a CLIP",
        "specpc(draft=/small)": "reads what a draft model attends to",
    }
    assert "left out: cdpruner, needs text_tower= or relevance=." in (tmp_path / "table.md").read_text()


@pytest.mark.parametrize(
    ("methods", "arguments", "problem"),
    [
        ("todree", [], "unknown method 'todree'. Did you mean 'todre'?"),
        ("todre(goal=1)", [], "unknown option"),
        ("todre(keep=0.2)", [], "give --keep instead"),
        ("tome", [], "tome acts in stage 'encoder'"),
        ("todre", ["--tokens", "16,18"], "no item of 18 tokens"),
        ("todre", ["--tokens", "x"], "argument --tokens"),
        ("todre", ["--keep", "1.5"], "keep=1.5 is out of range"),
        ("todre", ["--images", "0"], "must be above 0"),
    ],
)
def test_a_wrong_request_fails_before_anything_is_measured(
    methods: str, arguments: list[str], problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path / "out", methods, *arguments)
    assert stopped.value.code == 2
    assert problem in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_help_shows_how(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "python -m mmcompress.evals.bench.selection --methods" in capsys.readouterr().out


def test_items_have_the_shapes_of_the_models() -> None:
    assert layout(576, "image")[2] == "24x24" and layout(16384, "image")[2] == "128x128"
    assert [layout(tokens, "video")[2] for tokens in (576, 2880, 16384)] == [
        "4 frames 12x12",
        "20 frames 12x12",
        "64 frames 16x16",
    ]
    grids, tiles, _ = layout(2880, "image")
    assert grids == ((24, 24), (48, 48)) and tiles.bincount().tolist() == [576] * 5
    plane = tiles[576:].view(48, 48)
    assert [int(plane[row, column]) for row in (0, 23, 24, 47) for column in (0, 23, 24, 47)] == [
        *(1, 1, 2, 2) * 2,
        *(3, 3, 4, 4) * 2,
    ]
    assert make_item(2880, Needs(), "image", 0, "cpu").crops == (2, 2)


def test_cosines_of_items_are_exact() -> None:
    item = make_item(16, ToDRE().needs(CLIP), "image", 3, "cpu")
    assert set(item.cls_rows) == {22} and item.cls_rows[22].shape == (16, 16)
    unit = normalize(item.embeddings, dim=-1)
    exact = item.embeddings.double() @ item.embeddings.double().T / item.embeddings.shape[1]
    assert torch.equal((unit @ unit.T).double(), exact) and len(exact.unique()) > 10
    other = make_item(16, Needs(), "image", 4, "cpu")
    assert not torch.equal(item.embeddings, other.embeddings)
