"""The runner answers as the plain model does, counts what it spends, and leaves no trace."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import mmcompress
from mmcompress.errors import InputError, SpecError
from mmcompress.evals.loading import load_micro
from mmcompress.evals.micro import DEFAULT_MODEL, MICROVQA_PATH, Question, load_microvqa
from mmcompress.evals.micro.notes import UNLEARNT
from mmcompress.evals.runner import UNPRUNED, Answer, Run, evaluate, open_image, prompt
from mmcompress.evals.statistics import paired_difference

QUESTIONS = load_microvqa(30)


@pytest.fixture(scope="module")
def micro() -> tuple[Any, Any]:
    return load_micro()


def answers(micro: tuple[Any, Any], runs: list[Run], questions: list[Question], **options: Any) -> list[list[str]]:
    results = evaluate(*micro, questions, MICROVQA_PATH, runs, **options)
    return [[answer.text for answer in result.answers] for result in results]


def test_unpruned_is_the_plain_model(micro: tuple[Any, Any]) -> None:
    model, processor = micro
    plain = []
    for asked in QUESTIONS:
        inputs = processor(
            images=open_image(MICROVQA_PATH / asked.image), text=prompt(processor, asked.question), return_tensors="pt"
        )
        output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        plain.append(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    assert answers(micro, [(None, 1.0)], QUESTIONS) == [plain]


def test_unpruned_logits_are_the_plain_model_s(micro: tuple[Any, Any]) -> None:
    model, processor = micro
    batch = QUESTIONS[:5]
    inputs = processor(
        images=[[open_image(MICROVQA_PATH / asked.image)] for asked in batch],
        text=[prompt(processor, asked.question) for asked in batch],
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )
    real = inputs["attention_mask"].bool()
    assert not real.all()  # the rows differ in length
    method, keep = UNPRUNED
    with torch.inference_mode():
        plain = model(**inputs).logits
        with mmcompress.wrap(model, method, keep=keep):
            wrapped = model(**inputs).logits
    assert torch.equal(plain[real], wrapped[real])


def test_an_answer_does_not_depend_on_its_batch(micro: tuple[Any, Any]) -> None:
    runs: list[Run] = [("todre", 0.1), ("random", 0.25), ("pool", 9), ("vtc-cls", 0.05), (None, 1.0)]
    together = answers(micro, runs, QUESTIONS)
    assert together == answers(micro, runs, QUESTIONS, batch_size=7)
    assert together == answers(micro, runs, QUESTIONS, batch_size=1)


def test_an_answer_does_not_depend_on_other_runs(micro: tuple[Any, Any]) -> None:
    runs: list[Run] = [("vtc-cls", 0.05), ("todre", 0.25), (None, 1.0), ("vtc-cls", 0.5), ("uniform", 0.1)]
    alone = [answers(micro, [run], QUESTIONS)[0] for run in runs]
    assert answers(micro, runs, QUESTIONS) == alone


def test_costs_follow_from_what_was_kept(micro: tuple[Any, Any]) -> None:
    told: list[int] = []
    runs: list[Run] = [(None, 1.0), ("uniform", 0.25), ("uniform", 25), ("divprune", 0.25)]
    results = evaluate(*micro, QUESTIONS, MICROVQA_PATH, runs, batch_size=8, progress=told.append)
    assert sum(told) == len(runs) * len(QUESTIONS)
    assert [(result.method, result.keep) for result in results] == runs
    assert [result.cost.kept for result in results] == [256, 64, 25, 64]
    model, processor = micro
    config = model.config.text_config
    words = [len(processor.tokenizer(prompt(processor, asked.question))["input_ids"]) - 1 for asked in QUESTIONS]
    for result in results:
        cost = result.cost
        assert cost.tokens == 256 and cost.tokens_per_layer == cost.kept
        kept = cost.kept + sum(words) / len(words)
        per_token = 2 * 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        assert cost.kv_bytes == pytest.approx(kept * per_token)
        assert min(vars(cost.seconds).values()) > 0
    flops = [result.cost.prefill_flops for result in results]
    assert flops[0] > 3 * flops[1] > 3 * flops[2] and flops[1] == flops[3]


def test_budgets_are_tokens_per_layer(micro: tuple[Any, Any]) -> None:
    """Wherever tokens are removed, and whoever shares the work; a rule of its own has no budget."""
    methods = ("uniform", "fastv(layer=1)", "uniform(keep=0.5) + fastv(layer=1)")
    runs: list[Run] = [*((method, 0.375) for method in methods), ("todre-stage2", None)]
    *alike, ruled = evaluate(*micro, QUESTIONS[:8], MICROVQA_PATH, runs)
    assert [result.cost.kept for result in alike] == [96, 256, 128]
    for result in alike:
        assert result.cost.tokens_per_layer == pytest.approx(96, abs=0.75)
    assert ruled.keep is None and ruled.cost.kept == 256
    with pytest.raises(SpecError, match="need a keep= that is a fraction"):
        evaluate(*micro, QUESTIONS[:8], MICROVQA_PATH, [("uniform + fastv", 0.5)])


def test_the_model_is_left_as_it_was(micro: tuple[Any, Any]) -> None:
    model, _ = micro
    evaluate(*micro, QUESTIONS[:2], MICROVQA_PATH, [("todre", 0.1)])
    mmcompress.wrap(model, "todre", keep=0.1).unwrap()
    with pytest.raises(SpecError, match="nope"):
        evaluate(*micro, QUESTIONS[:2], MICROVQA_PATH, [("todre", 0.1), ("nope", 0.1)])
    with pytest.raises(SpecError, match="out of range"):
        evaluate(*micro, QUESTIONS[:2], MICROVQA_PATH, [("todre", 0.1), ("todre", 2.0)])
    mmcompress.wrap(model, "todre", keep=0.1).unwrap()


def test_bad_input_is_named(micro: tuple[Any, Any], tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="at least one question"):
        evaluate(*micro, [], MICROVQA_PATH, [(None, 1.0)])
    with pytest.raises(SpecError, match="batch_size"):
        evaluate(*micro, QUESTIONS, MICROVQA_PATH, [(None, 1.0)], batch_size=0)
    with pytest.raises(InputError, match=r"none\.png does not exist"):
        evaluate(*micro, [replace(QUESTIONS[0], image="none.png")], tmp_path, [(None, 1.0)])


@pytest.mark.parametrize(
    ("kind", "right", "text", "correct", "valid"),
    [
        ("exist", "yes", " Yes ", True, True),
        ("exist", "yes", "no", False, True),
        ("spatial", "no", "left", False, False),
        ("attribute", "red", "green", False, True),
        ("attribute", "star", "star", True, True),
        ("attribute", "star", "star star", False, False),
        ("count", "2", "2", True, True),
        ("count", "2", "", False, False),
        ("count", "2", "two", False, False),
        ("read", "2 0", "2 0", True, True),
        ("read", "2 0", "2 0 0", False, True),
        ("read", "2 0", "2 red", False, False),
        ("read", "2 0", "20", False, False),
        ("read", "2 0", "", False, False),
        ("read", "S T O P", "s t o p", True, True),
        ("read", "S T O P", "S T O 9", False, True),
        ("read", "S T O P", "STOP", False, False),
        ("choice", "A", "a", True, True),
        ("choice", "A", "red", False, False),
        ("choice", "A", "E", False, False),
        ("compose", "yes", "No", False, True),
        ("compose", "red", "red", True, True),
        ("compose", "star", "moon", False, True),
        ("compose", "star", "3", False, False),
    ],
)
def test_grading(kind: str, right: str, text: str, correct: bool, valid: bool) -> None:
    graded = Answer.grade(text, Question(0, "", "", right, kind))
    assert (graded.text, graded.correct, graded.valid) == (text.strip(), correct, valid)


def test_an_unknown_type_of_question_is_refused() -> None:
    with pytest.raises(SpecError, match="exist"):
        Answer.grade("yes", Question(0, "", "", "yes", "exists"))


@pytest.mark.slow
def test_diversity_beats_random_on_the_whole_split(micro: tuple[Any, Any]) -> None:
    questions = load_microvqa(without=UNLEARNT[DEFAULT_MODEL])
    random, todre = evaluate(*micro, questions, MICROVQA_PATH, [("random", 0.1), ("todre", 0.1)])
    images = [asked.image for asked in questions]
    difference = paired_difference(*([answer.score for answer in run.answers] for run in (todre, random)), images)
    assert difference.value > 3 * difference.error


@pytest.mark.parametrize("mode", ["I;16", "P", "LA", "RGBA", "CMYK", "L", "1"])
def test_pictures_of_every_mode_keep_their_content(mode: str, tmp_path: Path) -> None:
    ramp = np.tile(np.linspace(0, 255, 64).astype(np.uint8), (64, 1))
    wide = Image.fromarray(ramp.astype(np.uint16) * 257)
    picture = wide if mode == "I;16" else Image.fromarray(ramp).convert("RGB").convert(mode)
    path = tmp_path / ("picture.tiff" if mode == "CMYK" else "picture.png")
    picture.save(path)
    seen = np.asarray(open_image(path), dtype=float)[..., 0]
    halves = seen[:, :32].mean(), seen[:, 32:].mean()
    assert halves == pytest.approx((ramp[:, :32].mean(), ramp[:, 32:].mean()), abs=16 if mode == "1" else 4)
