"""The tables of the embedded models that are under version control, and what makes each: `make results`."""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mmcompress.errors import MMCompressError, SpecError, unknown_name

RESULTS = Path("evals/results")
LIMITED = Path("build/results")
"""Where tables of few questions go, which must not take the place of whole ones."""


class Step(NamedTuple):
    """A command at the root of the sources, and the folder within the table's own that its `--out` is."""

    command: str
    into: str = "."


_CALIBRATION = "build/kvquant-micro-llava.safetensors"
_DRAFT = '"speckv": {"draft": "evals/micro/models/micro-llava-nodrop", "lookahead": 4}'
_KV_OPTIONS = f'{{{_DRAFT}, "kvquant": {{"calibration": "{_CALIBRATION}"}}}}'
_ASKED = "cdpruner(text_tower=evals/micro/models/micro-llava/text-tower)"
_IN_LLM = (
    "divprune,hiprune,fastv,fastv(layer=1),dart,dart(layer=1),pyramiddrop,sparsevlm,sparsevlm(version='2.0'),"
    "transprune,transprune(prune_layers=[1, 2]),divprune(keep=0.6) + transprune,hiprune(keep=0.6) + transprune,"
    "divprune(keep=0.4) + transprune,hiprune(keep=0.4) + transprune"
)
_VISUAL = [
    *(f"{policy}(keep={keep}, scope=visual)" for keep in (0.25, 0.1) for policy in ("random", "snapkv", "keydiff")),
    "tgv-kv(keep=0.1, scope=visual)",
]

TABLES: dict[str, Sequence[Step]] = {
    "micro-llava": [Step("mmcompress demo --model micro-llava")],
    "micro-llava-nodrop": [Step("mmcompress demo --model micro-llava-nodrop")],
    "micro-qwen2.5-vl": [Step("mmcompress demo --model micro-qwen2.5-vl")],
    "micro-llava-all": [Step(f"mmcompress eval --method 'all,{_ASKED}'")],
    "micro-llava-in-llm": [Step(f"mmcompress eval --method {shlex.quote(_IN_LLM)} --keep 0.75,0.5,0.4,0.3")],
    "micro-llava-m3": [
        Step("mmcompress eval micro-llava-m3 --method m3,todre,divprune --keep 64,16,4,1", "trained"),
        Step(f"mmcompress eval micro-llava --method 'm3,todre,divprune,{_ASKED}' --keep 64,16,4,1", "untrained"),
    ],
    "kv-micro-llava": [
        Step(f"mmcompress calibrate micro-llava --out {_CALIBRATION}"),
        Step(
            f"python -m mmcompress.evals.kv_comparison --scenes 40 --keep 0.25 0.1 --options {shlex.quote(_KV_OPTIONS)}"
        ),
        Step(f"python -m mmcompress.evals.kv_comparison --scenes 40 --kv {shlex.join(_VISUAL)}", "visual"),
    ],
}
QUESTIONS_OF_A_SCENE = 2.7
_PROGRAMS = {"mmcompress": [sys.executable, "-m", "mmcompress.cli"], "python": [sys.executable]}
_LEFT_BEHIND = ("**/answers-*.jsonl", "**/conditions.json", "**/report.html", "**/samples/*")


def arguments(step: Step, folder: Path, questions: int | None = None) -> list[str]:
    """The words of a command that writes to `folder`, and asks no more than about so many questions."""
    words = shlex.split(step.command)
    if "calibrate" in words:
        return words
    if questions is not None:
        scenes = max(1, round(questions / QUESTIONS_OF_A_SCENE))
        words += ["--limit", str(questions)] if words[0] == "mmcompress" else ["--scenes", str(scenes)]
    return [*words, "--out", str(folder / step.into)]


def make(name: str, out: Path, questions: int | None = None) -> float:
    """Make the table `name` in a folder of `out`; the seconds that it took.

    What `mmcompress eval` was stopped at goes on when it is made again; all else begins anew.

    Raises:
        SpecError: a command failed; it has said why.
    """
    began = time.monotonic()
    folder = out / name
    for step in TABLES[name]:
        words = arguments(step, folder, questions)
        print(f"$ {shlex.join(words)}", flush=True)
        program, *rest = words
        if subprocess.run([*_PROGRAMS[program], *rest], check=False).returncode:
            raise SpecError(f"{name}: {shlex.join(words)} failed; what it said is above.")
    for pattern in _LEFT_BEHIND:
        for path in folder.glob(pattern):
            path.unlink()
    return time.monotonic() - began


def main(given: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m mmcompress.evals.tables",
        description="Make the tables of the embedded models anew, each by the command that its results.json names.",
    )
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help=f"which: {', '.join(TABLES)} (all)")
    add("--questions", type=int, metavar="N", help=f"ask about N questions for each, and write to {LIMITED}")
    asked = parser.parse_args(given)
    out = RESULTS if asked.questions is None else LIMITED
    try:
        for name in asked.names:
            if name not in TABLES:
                raise unknown_name("table", name, TABLES)
        if asked.questions is not None and asked.questions < 1:
            raise SpecError(f"--questions {asked.questions} must be at least 1.")
        if not RESULTS.is_dir():
            raise SpecError(f"there is no {RESULTS} here: run it at the root of the sources.")
        LIMITED.mkdir(parents=True, exist_ok=True)
        took = {name: make(name, out, asked.questions) for name in asked.names or TABLES}
    except (MMCompressError, OSError) as error:
        parser.error(str(error))
    for name, seconds in took.items():
        print(f"{out / name}: {seconds / 60:.1f} min")


if __name__ == "__main__":
    main()
