"""The report shows what the result says, lets nothing of it act, and needs nothing from elsewhere."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from test_cli import fail, succeed

from mmcompress.evals import record, report, report_stages
from mmcompress.evals.bench import latency
from mmcompress.evals.report_file import page
from mmcompress.evals.report_svg import MOST_TICKS, Curve, Point, front, pareto, ticks

VOID = {"meta", "br", "img"}
EVIL = '<script>alert("x")</script> & <img src=x onerror=1>'


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report") / "micro"
    succeed("eval", "--method", "todre,pool", "--keep", "0.25,25", "--limit", 20, "--out", out)
    return out


@pytest.fixture
def poisoned(evaluated: Path, tmp_path: Path) -> Path:
    """The same with markup wherever a suite, a model or a user could have put it."""
    shutil.copytree(evaluated, tmp_path / "evil")
    result = record.load(evaluated)
    suite = result["suites"].pop("microvqa")
    for asked in suite["questions"]:
        asked["prompt"], asked["answers"] = EVIL, [EVIL]
    suite["problems"] = [{"where": EVIL, "reason": EVIL}]
    result["suites"][EVIL] = suite
    for run in result["runs"]:
        found = run["suites"].pop("microvqa")
        found["answers"] = [EVIL] * len(found["answers"])
        run["suites"][EVIL] = found
        run["label"] = EVIL
    result["samples"] = [sample | {"suite": EVIL} for sample in result["samples"]]
    result["model"] = result["environment"]["cpu"] = result["environment"]["command"] = EVIL
    result["left_out"] = {EVIL: EVIL}
    record.save(result, tmp_path / "evil" / "results.json")
    return tmp_path / "evil"


class Outline(HTMLParser):
    """Every tag with its attributes; tags that do not match are an error."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID and not (self.get_starttag_text() or "").endswith("/>"):
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_page_is_whole_and_needs_no_network(evaluated: Path) -> None:
    outline = Outline(page([evaluated]))
    tags = [tag for tag, _ in outline.tags]
    assert tags.count("svg") == 3 and not {"script", "link", "iframe", "object"} & set(tags)
    for tag, attributes in outline.tags:
        assert not [name for name in attributes if name.startswith("on") or name == "href"], tag
        source = attributes.get("src")
        assert source is None or source.startswith("data:image/jpeg;base64,")
    policy = next(attributes for _, attributes in outline.tags if "http-equiv" in attributes)
    assert "default-src 'none'" in str(policy["content"])
    assert "http" not in " ".join(outline.text)


def test_the_page_says_what_the_result_says(evaluated: Path) -> None:
    result = record.load(evaluated)
    outline = Outline(page([evaluated]))
    text = " ".join(outline.text)
    for run in result["runs"][1:]:
        share = run["suites"]["microvqa"]["retained"]
        assert (run["method"] or "unpruned") in text and f"{100 * share['value']:.1f}" in text
    assert result["environment"]["command"] in text and result["environment"]["cpu"] in text
    sample = result["samples"][0]
    methods = {run["method"] for run in result["runs"]}
    assert len(sample["panels"]) == len(methods) == 5
    number = [asked["id"] for asked in result["suites"]["microvqa"]["questions"]].index(sample["question"])
    unpruned = result["runs"][0]["suites"]["microvqa"]["answers"][number]
    assert outline.text.count("unpruned:") == sum(len(one["panels"]) - 1 for one in result["samples"])
    for panel in sample["panels"]:
        assert result["runs"][panel["run"]]["suites"]["microvqa"]["answers"][number] in text and unpruned in text
        assert panel["note"] in text and (not panel["note"]) == (panel["run"] == 0)
        with Image.open(evaluated / panel["file"]) as image:
            assert image.width >= 300
    assert sum(tag == "img" for tag, _ in outline.tags) == sum(len(one["panels"]) for one in result["samples"])


def test_markup_is_escaped(poisoned: Path) -> None:
    outline = Outline(page([poisoned]))
    assert "script" not in [tag for tag, _ in outline.tags]
    assert not [attributes for _, attributes in outline.tags if "onerror" in attributes]
    assert " ".join(outline.text).count(EVIL) > 20


def test_panels_stay_in_their_folder(poisoned: Path) -> None:
    result = record.load(poisoned)
    result["samples"][0]["panels"][0]["file"] = "../../../etc/hostname"
    record.save(result, poisoned / "results.json")
    assert "leads out of" in fail("report", poisoned, "--out", poisoned / "report.html")
    result["samples"][0]["panels"][0]["file"] = "samples/gone.jpg"
    record.save(result, poisoned / "results.json")
    assert "samples/gone.jpg is missing" in page([poisoned])


def test_tables_and_csv(evaluated: Path, tmp_path: Path) -> None:
    result = record.load(evaluated)
    found = [run["suites"]["microvqa"] for run in result["runs"]]
    succeed("report", evaluated, "--out", tmp_path / "report.md")
    lines = [line for line in (tmp_path / "report.md").read_text().splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(result["runs"]) and len({line.count("|") for line in lines}) == 1
    succeed("report", evaluated, evaluated, "--out", tmp_path / "report.csv")
    rows = list(csv.DictReader(io.StringIO((tmp_path / "report.csv").read_text())))
    assert len(rows) == 2 * len(result["runs"])
    for row, run, suite in zip(rows, result["runs"], found, strict=False):
        assert (row["method"], row["keep"]) == (run["method"] or "unpruned", str(run["keep"]))
        assert float(row["value"]) == suite["metrics"]["exact match"]
        assert float(row["retained"]) == suite["retained"]["value"]
        assert float(row["kv_bytes"]) == suite["cost"]["kv_bytes"]
    cells = [dict(zip((name for name, _ in report.columns(result, "microvqa")), row, strict=True))
             for row in report.rows(result, "microvqa")]  # fmt: skip
    assert [row["keep"] for row in cells][:2] == ["100%", "25%"] and cells[-1]["keep"] == "25"
    assert cells[0]["retained"] == "100.0" and cells[0]["vs random"] == cells[1]["vs random"] == ""
    assert cells[3]["exact match"].startswith(f"{100 * found[3]['metrics']['exact match']:.1f} ±")


COMMITTED = sorted(
    path.parent
    for path in (Path(__file__).parents[2] / "evals" / "results").glob("*/results.json")
    if json.loads(path.read_text()).get("format") in (record.FORMAT, latency.FORMAT)
)


@pytest.mark.parametrize("folder", COMMITTED, ids=lambda folder: folder.name)
def test_committed_results_can_be_reported(folder: Path) -> None:
    Outline(page([folder]))
    if json.loads((folder / "results.json").read_text())["format"] == record.FORMAT:
        assert report.markdown(record.load(folder)) == (folder / "table.md").read_text()


def test_reports_of_nothing_are_refused(tmp_path: Path, evaluated: Path) -> None:
    assert "does not exist" in fail("report", tmp_path / "gone", "--out", tmp_path / "report.html")
    assert "a report ends in .html, .md, .csv" in fail("report", evaluated, "--out", tmp_path / "report.pdf")


def test_bars_show_the_stages_of_the_record(evaluated: Path) -> None:
    result = record.load(evaluated)
    groups = report_stages.by_budget(result)
    assert list(groups) == ["25%", "25"] and [bar.name for bar in groups["25%"]][:2] == ["unpruned", "random"]
    for bar, run in zip(groups["25%"][1:], result["runs"][1:], strict=False):
        seconds = run["suites"]["microvqa"]["cost"]["seconds"]
        assert bar.seconds == seconds and bar.name == run["method"]
        assert (
            bar.said == f"{1000 * (sum(seconds.values()) - seconds['decode']):.1f} + {1000 * seconds['decode']:.1f} ms"
        )
    widths = [float(width) for width in re.findall(r"width: ([\d.]+)%", report_stages.html(groups["25%"]))]
    stages = len(result["runs"][0]["suites"]["microvqa"]["cost"]["seconds"])
    lengths = [sum(widths[first : first + stages]) for first in range(0, len(widths), stages)]
    assert len(lengths) == len(groups["25%"]) and max(lengths) == pytest.approx(100, abs=0.1)


def test_a_model_that_scores_nothing_has_no_shares(evaluated: Path, tmp_path: Path) -> None:
    result = record.load(evaluated)
    for run in result["runs"]:
        run["retained"] = run["suites"]["microvqa"]["retained"] = None
    result["samples"] = []
    record.save(
        {name: part for name, part in result.items() if name not in ("format", "version")}, tmp_path / "results.json"
    )
    text = page([tmp_path])
    assert "nothing can be said" in text and "<svg" not in text and report.markdown(result)


# --- charts


def test_the_front_is_what_nothing_beats() -> None:
    points = {name: Point(x, y, 0.0, name) for name, x, y in (("a", 1, 50), ("b", 2, 80), ("c", 2, 70), ("d", 4, 80))}
    assert front(list(points.values())) == {points["a"], points["b"]}
    twice = [Point(1, 50, 0.0, "a"), Point(1, 50, 0.0, "b")]
    assert front(twice) == set(twice)


def test_charts_place_points_by_logarithm() -> None:
    curve = Curve("m", "#000000", [Point(x, 90.0, 2.0, f"at {x}") for x in (0.1, 0.2, 0.4)])
    drawn = pareto([curve], "share", percent=True)
    left, middle, right = (float(x) for x in re.findall(r'<circle class="dot" cx="([\d.]+)"', drawn))
    assert math.isclose(middle - left, right - middle, abs_tol=0.2) and right > left
    assert ">10%<" in drawn and ">20%<" in drawn and "at 0.2: 90.0" in drawn
    assert "nan" not in pareto([Curve("m", "#000", [Point(1.0, 100.0, 0.0, "only")])], "one point")


@pytest.mark.parametrize(("low", "high"), [(40, 80), (72, 140), (0.04, 1.1), (3, 10), (90, 110), (0.6, 1.6), (1, 2e4)])
def test_ticks_are_round_and_not_too_many(low: float, high: float) -> None:
    found = ticks(low, high)
    assert 2 <= len(found) <= MOST_TICKS and all(low <= tick <= high for tick in found) and found == sorted(found)
    assert all(len(f"{tick:.6g}".strip("0.").replace(".", "")) <= 3 for tick in found)


@pytest.mark.slow
def test_a_browser_shows_the_page(evaluated: Path, tmp_path: Path) -> None:
    """Needs Chromium, a package of the distribution; without it this fails."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    assert browser, "install Chromium: apt-get install chromium"
    succeed("report", evaluated, "--out", tmp_path / "report.html")

    def seen(width: int, *more: str) -> Image.Image:
        shot = tmp_path / "report.png"
        flags = (
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            f"--window-size={width},1600",
            *more,
        )
        profile = f"--user-data-dir={tmp_path}/profile"
        command = [browser, *flags, profile, f"--screenshot={shot}", (tmp_path / "report.html").as_uri()]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        with Image.open(shot) as image:
            assert image.size == (width, 1600)
            return image.convert("RGB")

    def colours(image: Image.Image) -> set[Any]:
        return {colour for _, colour in image.getcolors(image.width * image.height) or ()}

    for width in (1280, 480):
        light = seen(width)
        assert light.getpixel((1, 1)) == (255, 255, 255) and len(colours(light)) > 500
        assert {(11, 110, 153), (217, 72, 15)} <= colours(light)  # the curves of two methods
        # What is too wide scrolls by itself, so that nothing reaches the edge of the page.
        edge = light.crop((width - 8, 0, width, 1600))
        assert colours(edge) == {(255, 255, 255)}
    dark = seen(1280, "--blink-settings=preferredColorScheme=0")
    assert dark.getpixel((1, 1)) == (20, 24, 29) and {(77, 171, 247), (255, 146, 43)} <= colours(dark)
