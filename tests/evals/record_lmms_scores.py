"""Write what lmms-eval scores on `answer_pairs` to `lmms_scores.json`: `make .venv-lmms/.ready`, then run this in it.

.venv-lmms/bin/python tests/evals/record_lmms_scores.py
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from answer_pairs import METRICS, Pair, digest, pairs
from lmms_eval.api.metrics import anls, exact_match_hf_evaluate
from lmms_eval.tasks.ai2d import utils as ai2d
from lmms_eval.tasks.chartqa import utils as chartqa
from lmms_eval.tasks.mme import utils as mme
from lmms_eval.tasks.mmmu import utils as mmmu
from lmms_eval.tasks.ocrbench import utils as ocrbench
from lmms_eval.tasks.pope import utils as pope
from lmms_eval.tasks.scienceqa import utils as scienceqa
from lmms_eval.tasks.seedbench import utils as seedbench
from lmms_eval.tasks.textvqa import utils as textvqa
from lmms_eval.tasks.vizwiz_vqa import utils as vizwiz
from lmms_eval.tasks.vqav2 import utils as vqav2


def score_vqav2(pair: Pair) -> float:
    answers = [{"answer": answer, "answer_id": number} for number, answer in enumerate(pair["answers"])]
    return vqav2.vqav2_process_results({"answers": answers, "question_id": 0}, [pair["text"]])["exact_match"]


def score_textvqa(pair: Pair) -> float:
    doc = {"answers": list(pair["answers"]), "question_id": 0}
    return textvqa.textvqa_process_results(doc, [pair["text"]])["exact_match"]


def score_vizwiz(pair: Pair) -> float:
    doc = {"answers": list(pair["answers"]), "question_id": 0}
    return vizwiz.vizwiz_vqa_process_results(doc, [pair["text"]])["exact_match"]


def score_exactly(pair: Pair) -> float:
    found = exact_match_hf_evaluate([pair["text"]], pair["answers"], ignore_case=True, ignore_punctuation=True)
    return float(found["exact_match"])


def score_docvqa(pair: Pair) -> float:
    return float(anls(pair["answers"], [pair["text"]])["anls"])


def score_chartqa(pair: Pair) -> float:
    return float(chartqa.relaxed_correctness(pair["text"], pair["answers"][0]))


def score_ocrbench(pair: Pair) -> float:
    dataset = "HME100k" if pair["category"].startswith("Handwritten Math") else "IIIT5K"
    doc = {"answer": pair["answers"], "dataset": dataset, "question_type": pair["category"]}
    return float(ocrbench.ocrbench_process_results(doc, [pair["text"]])["ocrbench_accuracy"]["score"])


def _pope(pair: Pair) -> dict[str, Any]:
    return pope.pope_process_results({"answer": pair["answers"][0], "question_id": 0}, [pair["text"]])["pope_accuracy"]


def _mme(pair: Pair, number: int) -> dict[str, Any]:
    doc = {"answer": pair["answers"][0], "category": pair["category"], "question_id": number // 2}
    (found,) = mme.mme_process_results(doc, [pair["text"]]).values()
    return found


def score_scienceqa(pair: Pair) -> float:
    doc = {"choices": pair["choices"], "answer": "ABCDE".index(pair["answers"][0])}
    return scienceqa.sqa_process_results(doc, [pair["text"]])["exact_match"]


def score_seed(pair: Pair) -> float:
    doc = {"answer": pair["answers"][0], "data_type": "", "question_id": 0}
    return seedbench.seed_aggregation_result([seedbench.seed_process_result(doc, [pair["text"]])["seed_all"]])


def score_ai2d(pair: Pair) -> float:
    extract = ai2d.MultiChoiceRegexFilter(
        group_select=0, ignore_case=True, ignore_punctuation=True, regex_pattern=r"([A-Z])\."
    )
    return score_exactly({**pair, "text": extract.apply([[pair["text"]]], [{}])[0]})


def score_mmmu(pair: Pair) -> float:
    if "choices" not in pair:
        return float(mmmu.eval_open(pair["answers"], mmmu.parse_open_response(pair["text"])))
    letters = "ABCDE"[: len(pair["choices"])]
    named = dict(zip(letters, pair["choices"], strict=True))
    seen = {mmmu.parse_multi_choice_response(pair["text"], list(letters), named) for _ in range(40)}
    assert len(seen) == 1, f"{pair} is answered at random"
    return float(seen == {pair["answers"][0]})


EACH: dict[str, Callable[[Pair], float]] = {
    "vqav2": score_vqav2,
    "textvqa": score_textvqa,
    "vizwiz": score_vizwiz,
    "gqa": score_exactly,
    "docvqa": score_docvqa,
    "chartqa": score_chartqa,
    "ocrbench": score_ocrbench,
    "pope": lambda pair: _pope(pair)["score"],
    "scienceqa": score_scienceqa,
    "seed": score_seed,
    "ai2d": score_ai2d,
    "mmmu": score_mmmu,
}


def main() -> None:
    scores = {metric: [score(pair) for pair in pairs(metric)] for metric, score in EACH.items()}
    twice = [_mme(pair, number) for number, pair in enumerate(pairs("mme"))]
    scores["mme"] = [found["score"] for found in twice]
    assert scores.keys() == METRICS.keys()
    said = [_pope(pair) for pair in pairs("pope")]
    totals = {
        "pope": {
            "F1": pope.pope_aggregate_f1_score(said),
            "accuracy": pope.pope_aggregate_accuracy(said),
            "precision": pope.pope_aggregate_precision(said),
            "recall": pope.pope_aggregate_recall(said),
        },
        "mme": {"MME score": mme.mme_aggregate_results(twice)},
    }
    record = {"lmms_eval": metadata.version("lmms-eval"), "pairs": digest(), "scores": scores, "totals": totals}
    Path(__file__).with_name("lmms_scores.json").write_text(json.dumps(record) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
