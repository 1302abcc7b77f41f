"""Tasks of lmms-eval on the embedded questions, and `lmms_eval` run on them offline."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from mmcompress.evals.micro import MICROVQA_PATH, load_microvqa

QUESTIONS = load_microvqa(48, without=("letters", "word", "relation", "side"))
ROWS = """
dataset_path: json
dataset_kwargs:
  data_files:
    test: {rows}
test_split: test
doc_to_target: answer
doc_to_visual: !function utils.doc_to_visual
doc_to_text: !function utils.doc_to_text
"""
PLAIN = """
task: microvqa_local
include: rows.yaml_part
output_type: generate_until
generation_kwargs:
  max_new_tokens: 8
  until:
    - "\\n"
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
metadata:
  - version: 1.0
"""
OWN = """
task: microvqa_own
include: rows.yaml_part
output_type: generate_until
doc_to_messages: !function utils.doc_to_messages
process_results: !function utils.process_results
generation_kwargs:
  max_new_tokens: 8
  until:
    - "e"
filter_list:
  - name: shouted
    filter:
      - function: uppercase
      - function: take_first
metric_list:
  - metric: submission
    aggregation: !function utils.submit
    higher_is_better: true
  - metric: color_score
    aggregation: !function utils.aggregate_once
    higher_is_better: true
metadata:
  - version: 1.0
"""
UTILS = """
from PIL import Image


def doc_to_visual(doc):
    with Image.open(doc["image"]) as image:
        return [image.convert("RGB")]


def seldom(doc):
    return [] if doc["question"].startswith("how many") else doc_to_visual(doc)


def video(doc):
    return ["nowhere.mp4"]


def doc_to_text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]


def marked(doc, lmms_eval_specific_kwargs=None):
    return doc["question"].replace("is there", "is <image> there")


def doc_to_messages(doc, lmms_eval_specific_kwargs=None):
    content = [{"type": "text", "text": "what"}, {"type": "image", "url": doc_to_visual(doc)[0]}]
    return [{"role": "user", "content": [*content, {"type": "text", "text": doc["question"]}]}]


def process_results(doc, results):
    assert results[0] == results[0].upper()
    score = float(doc["answer"].split("e")[0].upper() == results[0])
    if doc["question"].startswith("how many"):
        return {"submission": doc["question"]}
    return {"color_score": {"name": doc["image"] + doc["question"], "score": score}}


def aggregate_once(results):
    print("aggregated")
    names = {result["name"] for result in results}
    assert len(names) == len(results)
    return 100 * sum(result["score"] for result in results) / len(results)


def submit(results):
    return None


def ask_judge(results):
    import openai

    return openai.judge(results)
"""


def write(folder: Path) -> None:
    """The tasks as files."""
    rows = folder / "rows.jsonl"
    asked = [
        {"image": str(MICROVQA_PATH / row.image), "question": row.question, "answer": row.answer} for row in QUESTIONS
    ]
    rows.write_text("".join(json.dumps(row) + "\n" for row in asked))
    (folder / "rows.yaml_part").write_text(ROWS.format(rows=rows))
    (folder / "plain.yaml").write_text(PLAIN)
    (folder / "own.yaml").write_text(OWN)
    (folder / "utils.py").write_text(UTILS)


def offline(folder: Path) -> dict[str, str]:
    """An environment in which nothing is downloaded or kept elsewhere."""
    alone = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder), "OMP_NUM_THREADS": "1"}
    return {**os.environ, **alone}


def lmms_eval(tasks: Path, out: Path, arguments: str, task: str = "microvqa_local") -> subprocess.CompletedProcess[str]:
    """What `lmms_eval` says of a local task, with a model of these arguments."""
    command = [sys.executable, "-m", "lmms_eval", "--model", "mmcompress", "--model_args", arguments]
    command += ["--tasks", task, "--include_path", str(tasks), "--batch_size", "16"]
    command += ["--device", "cpu", "--output_path", str(out), "--log_samples"]
    return subprocess.run(command, env=offline(tasks), capture_output=True, text=True, timeout=300)


def results(out: Path) -> tuple[dict[str, Any], dict[int, str]]:
    """The summary, and the answer to each question of the task by its number."""
    (summary,), (samples,) = out.rglob("*_results.json"), out.rglob("*_samples_*.jsonl")
    answers = {}
    for line in samples.read_text().splitlines():
        sample = json.loads(line)
        answers[int(sample["doc_id"])] = sample["filtered_resps"]
    return json.loads(summary.read_text()), answers
