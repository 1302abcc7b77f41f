"""KV-cache policies beside each other on prompts with several pictures: `python -m mmcompress.evals.kv_comparison`."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.progress import track

import mmcompress
from mmcompress.errors import MMCompressError
from mmcompress.evals.bench.rows import publish
from mmcompress.evals.environment import environment, model_facts
from mmcompress.evals.loading import load_micro
from mmcompress.evals.micro import DEFAULT_MODEL, Question
from mmcompress.evals.micro.needle import Needle, make_needles
from mmcompress.evals.report import budget
from mmcompress.evals.runner import Answer
from mmcompress.evals.statistics import clustered_mean, paired_difference
from mmcompress.kv_policy import Quantiser
from mmcompress.registry import POLICIES
from mmcompress.spec import Spec

SEED, PICTURES = 4242, 2
PLACES = {"early": 0, "late": PICTURES - 1}
LONGEST_ANSWER = 6
COLUMNS = (
    "method",
    "keep",
    *(f"{place}{of}" for place in PLACES for of in ("", " vs random")),
    "invalid",
    "KV kB",
    "KV",
    "read",
)
NOTES = (
    f"Prompts have {PICTURES} pictures; the question is about the first (early) or the last (late), and the others "
    "cannot answer it. The last token of the prompt is read when entries have gone, so that all of an answer shows it.",
    "Accuracy: exact match in %, 95 % interval clustered by scene; vs random: points above random eviction at the same "
    "keep on the same questions, clustered standard error.",
    "KV: bytes that keys and values occupy per question when the answer is complete, padding, ranges and indices "
    "included, and their share of those without a policy; read: share of the entries seen that the last step reads.",
)


@dataclass(frozen=True)
class Result:
    """One policy at one budget; answers by place of the picture asked about, in the order of the questions."""

    policy: str | None
    keep: int | float | None
    answers: Mapping[str, list[Answer]]
    kv_bytes: float
    read: float


def evaluate(model: Any, processor: Any, scenes: int, runs: Sequence[Spec | None], batch: int = 32) -> list[Result]:
    """Ask every needle of `scenes` scenes under every one of `runs`; None stands for no policy.

    Raises:
        MMCompressError: a policy cannot act on the model; nothing was asked then.
    """
    for run in runs:
        if run is not None:
            mmcompress.wrap(model, kv=run).unwrap()
    needles = {place: _needles(scenes, number) for place, number in PLACES.items()}
    results = []
    full = 0.0
    for run in track(runs, description="policies"):
        answers: dict[str, list[Answer]] = {place: [] for place in PLACES}
        held, read = [], []
        for place, asked in needles.items():
            for first in range(0, len(asked), batch):
                some = asked[first : first + batch]
                texts, spent, share = _ask(model, processor, some, run)
                held += [spent]
                read += [share]
                answers[place] += [
                    Answer.grade(text, _question(needle)) for text, needle in zip(texts, some, strict=True)
                ]
        kv_bytes = sum(held) / sum(len(asked) for asked in needles.values())
        full = full or kv_bytes
        keep = None if run is None or run.keep is None else run.keep.keep
        name = None if run is None else str(replace(run, keep=None))
        results.append(Result(name, keep, answers, kv_bytes, sum(read) / len(read) if run else 1.0))
    return results


def _needles(scenes: int, place: int) -> list[Needle]:
    return [needle for index in range(scenes) for needle in make_needles(SEED, index, PICTURES, place)]


def _question(needle: Needle) -> Question:
    asked = needle.asked
    return Question(needle.scene, "", asked.question, asked.answer, asked.type, asked.form)


@torch.inference_mode()
def _ask(model: Any, processor: Any, needles: Sequence[Needle], run: Spec | None) -> tuple[list[str], int, float]:
    """Answers, bytes held at the end, and the share of the entries seen that the last step read."""
    content = [{"type": "image"}] * PICTURES
    texts = [
        processor.apply_chat_template(
            [{"role": "user", "content": [*content, {"type": "text", "text": needle.asked.question}]}],
            add_generation_prompt=True,
        )
        for needle in needles
    ]
    pictures = [[Image.fromarray(picture) for picture in needle.pictures] for needle in needles]
    inputs = processor(images=pictures, text=texts, padding=True, padding_side="left", return_tensors="pt")
    inputs = inputs.to(model.device, model.dtype)
    prompt = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with nullcontext() if run is None else mmcompress.wrap(model, kv=run) as handle:
        cache = model(**inputs | {name: part[:, :-1] for name, part in prompt.items()}).past_key_values
        said = model.generate(**prompt, past_key_values=cache, max_new_tokens=LONGEST_ANSWER, do_sample=False)
        heads = cache.layers[0].keys.shape[1]
        seen = cache.get_seq_length() * len(needles) * len(cache.layers) * heads
        stats = None if handle is None else handle.stats
        if stats is None:
            held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
            read = 1.0
        else:
            held = stats.kv_held
            entries = [layer.keys.shape[2] for layer in cache.layers]
            read = sum(stats.kv_read) / seen if stats.kv_read else sum(entries) * len(needles) * heads / seen
    answers = processor.batch_decode(said[:, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers, held, read


def every_policy(keeps: Sequence[int | float], options: Mapping[str, Mapping[str, Any]]) -> list[Spec | None]:
    """No policy, every policy that takes a budget at every one of `keeps`, random first, then all others."""
    budgeted: list[str] = []
    others: list[str] = []
    for name in POLICIES.names():
        policy: Any = POLICIES.build(name, options.get(name, {}))
        if policy.info.lacking(policy):
            continue
        (others if isinstance(policy, Quantiser) else budgeted).append(name)
    budgeted.sort(key=lambda name: name != "random")
    specs = [Spec.parse({"name": name, "keep": keep, **options.get(name, {})}) for keep in keeps for name in budgeted]
    return [None, *specs, *(Spec.parse({"name": name, **options.get(name, {})}) for name in others)]


def rows(results: Sequence[Result], scenes: Mapping[str, Sequence[int]]) -> list[list[str]]:
    """The cells of the table; `scenes` tells which questions belong together."""
    random = {result.keep: result for result in results if _is_random(result)}
    full = results[0].kv_bytes
    cells = []
    for result in results:
        answers = [answer for asked in result.answers.values() for answer in asked]
        row = [result.policy or "none", budget(result.keep)]
        for place, clusters in scenes.items():
            right = _right(result, place)
            accuracy = clustered_mean(right, clusters)
            row += [f"{100 * accuracy.value:.1f} ±{100 * accuracy.margin:.1f}", ""]
            if result.keep in random and result.policy is not None and not _is_random(result):
                against = paired_difference(right, _right(random[result.keep], place), clusters)
                row[-1] = f"{100 * against.value:+.1f} ±{100 * against.error:.1f}"
        row += [
            f"{100 * sum(not answer.valid for answer in answers) / len(answers):.1f}",
            f"{result.kv_bytes / 1e3:.0f}",
        ]
        cells.append([*row, f"{100 * result.kv_bytes / full:.0f}%", f"{100 * result.read:.0f}%"])
    return cells


def _is_random(result: Result) -> bool:
    return result.policy is not None and Spec.parse(result.policy).name == "random"


def _right(result: Result, place: str) -> list[float]:
    return [answer.score for answer in result.answers[place]]


def main(given: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m mmcompress.evals.kv_comparison",
        description="Accuracy and bytes of KV-cache policies on an embedded model, asked about one of two pictures.",
    )
    add = parser.add_argument
    add("--model", default=DEFAULT_MODEL, help="name of an embedded model (%(default)s)")
    add("--scenes", type=int, default=150, help="scenes asked about, about 2.7 questions each (%(default)s)")
    add("--keep", type=float, nargs="+", default=[0.5, 0.25, 0.1], help="budgets, as fractions (%(default)s)")
    add("--kv", nargs="+", metavar="SPEC", help="policies, with budgets (every one that needs no file)")
    add("--options", type=json.loads, default="{}", help='options by policy, as JSON: {"snapkv": {"window": 16}}')
    add("--threads", type=int, default=1, help="CPU threads (%(default)s)")
    add("--out", type=Path, default=Path("kv"), help="folder for results.json and table.md (%(default)s)")
    asked = parser.parse_args(given)
    try:
        torch.set_num_threads(asked.threads)
        asked.out.mkdir(parents=True, exist_ok=True)
        runs = [None, *map(Spec.parse, asked.kv)] if asked.kv else every_policy(asked.keep, asked.options)
        model, processor = load_micro(asked.model)
        results = evaluate(model, processor, asked.scenes, runs)
    except (MMCompressError, OSError) as error:
        parser.error(str(error))
    scenes = {place: [needle.scene for needle in _needles(asked.scenes, number)] for place, number in PLACES.items()}
    cells, facts = rows(results, scenes), environment() | model_facts(model)
    facts["command"] = f"python -m mmcompress.evals.kv_comparison {shlex.join(given or sys.argv[1:])}"
    notes = [*NOTES, ", ".join(f"{name} {value}" for name, value in facts.items())]
    record = {"environment": facts, "scenes": scenes, "runs": [asdict(result) for result in results]}
    publish(asked.out, COLUMNS, cells, notes, record, Console())


if __name__ == "__main__":
    main()
