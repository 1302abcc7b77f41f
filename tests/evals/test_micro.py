"""MicroVQA, the embedded split: reproducible, of this generator, small, and answered by the embedded model."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmcompress.errors import SpecError
from mmcompress.evals.micro import GENERATOR_VERSION, MICROVQA_PATH, Question, load_microvqa
from mmcompress.evals.micro import build as module
from mmcompress.evals.micro.build import MICROVQA_IMAGES, MICROVQA_SEED, Sample, build, make_sample
from mmcompress.evals.micro.questions import TYPES
from mmcompress.evals.micro.scene import Style
from mmcompress.evals.micro.vocabulary import TOKENS


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return [make_sample(MICROVQA_SEED, index) for index in range(MICROVQA_IMAGES)]


def test_the_committed_split_is_what_the_generator_makes(samples: list[Sample]) -> None:
    expected = []
    for index, sample in enumerate(samples):
        name = f"images/{index:03d}.png"
        with Image.open(MICROVQA_PATH / name) as image:
            assert image.mode == "RGB" and image.size == (224, 224)
            assert np.array_equal(np.asarray(image), sample.picture), f"picture {index} differs"
        for asked in sample.questions:
            expected.append(Question(len(expected), name, asked.question, asked.answer, asked.type, asked.form))
    assert load_microvqa() == expected


def test_build_writes_the_committed_files_again(tmp_path: Path) -> None:
    questions = build(tmp_path / "split", images=2)
    committed = (MICROVQA_PATH / "questions.jsonl").read_text().splitlines()
    assert (tmp_path / "split" / "questions.jsonl").read_text().splitlines() == committed[: len(questions)]
    assert sorted(path.name for path in (tmp_path / "split" / "images").iterdir()) == ["000.png", "001.png"]
    assert load_microvqa(path=tmp_path / "split") == questions


def test_the_command_writes_a_split_and_says_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--out", str(tmp_path / "wide"), "--width", "336", "--height", "168", "--images", "2", "--seed", "9"]
    monkeypatch.setattr(sys, "argv", ["build", *arguments])
    module.main()
    meta = json.loads((tmp_path / "wide" / "meta.json").read_text())
    assert (meta["generator_version"], meta["seed"], meta["images"]) == (GENERATOR_VERSION, 9, 2)
    assert (meta["style"]["width"], meta["style"]["height"]) == (336, 168)
    with Image.open(tmp_path / "wide" / "images" / "001.png") as image:
        assert np.array_equal(np.asarray(image), make_sample(9, 1, Style(336, 168)).picture)


@pytest.mark.parametrize("arguments", [["--width", "100"], ["--images", "0"], ["--seed", "-1"]])
def test_the_command_refuses_what_it_cannot_build(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["build", "--out", str(tmp_path / "new"), *arguments])
    with pytest.raises(SystemExit):
        module.main()
    assert "must" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_split_of_another_generator_is_refused(tmp_path: Path) -> None:
    build(tmp_path / "split", images=1)
    meta = tmp_path / "split" / "meta.json"
    meta.write_text(json.dumps({**json.loads(meta.read_text()), "generator_version": 1}))
    with pytest.raises(SpecError, match=r"version 1.*version 2.*python -m mmcompress\.evals\.micro\.build"):
        load_microvqa(path=tmp_path / "split")
    meta.unlink()
    with pytest.raises(SpecError, match="unknown"):
        load_microvqa(path=tmp_path / "split")


def test_bad_arguments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="seed"):
        make_sample(-1, 0)
    with pytest.raises(SpecError, match="limit"):
        load_microvqa(0)
    (tmp_path / "keep.txt").write_text("")
    with pytest.raises(SpecError, match="not empty"):
        build(tmp_path, images=1)
    assert [path.name for path in tmp_path.iterdir()] == ["keep.txt"]


def test_limit_gives_the_first_questions() -> None:
    assert load_microvqa(9) == load_microvqa()[:9] and len(load_microvqa(9)) == 9


def test_rows_hold_exactly_the_six_fields() -> None:
    for line in (MICROVQA_PATH / "questions.jsonl").read_text().splitlines():
        assert list(json.loads(line)) == ["question_id", "image", "question", "answer", "type", "form"]


def test_every_type_is_asked_about_as_often_as_possible() -> None:
    questions = load_microvqa()
    counts = Counter(question.type for question in questions)
    assert set(counts) == set(TYPES)
    assert min(counts[kind] for kind in ("exist", "count", "read", "choice")) >= 0.755 * MICROVQA_IMAGES
    assert min(counts[kind] for kind in ("attribute", "spatial")) >= 1.7 * MICROVQA_IMAGES
    assert counts["compose"] >= 0.3 * MICROVQA_IMAGES
    for kind in ("exist", "spatial"):
        answers = Counter(question.answer for question in questions if question.type == kind)
        assert set(answers) == {"yes", "no"}
        assert 0.35 < answers["yes"] / counts[kind] < 0.65
    letters = Counter(question.answer for question in questions if question.type == "choice")
    assert set(letters) == set("ABCD") and min(letters.values()) >= 10


def test_every_word_is_a_token() -> None:
    words = {word for row in load_microvqa() for word in f"{row.question} {row.answer}".split(" ")}
    assert words <= set(TOKENS)


def test_the_data_is_small() -> None:
    files = [path for path in MICROVQA_PATH.rglob("*") if path.is_file()]
    assert len(files) == MICROVQA_IMAGES + 2
    assert sum(path.stat().st_size for path in files) <= 5_000_000


def test_importing_the_package_needs_no_drawing_library() -> None:
    code = """
import sys
import mmcompress.evals
before = set(sys.modules)
import mmcompress.evals.micro
mmcompress.evals.micro.load_microvqa()
print(sorted({"matplotlib", "PIL", "torch"} & (set(sys.modules) - before)))
"""
    root = MICROVQA_PATH.parents[3]
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_the_default_model_answers() -> None:
    from mmcompress.evals.loading import load_micro
    from mmcompress.evals.runner import evaluate

    questions = [row for row in load_microvqa(100) if row.type == "attribute"]
    (result,) = evaluate(*load_micro(), questions, MICROVQA_PATH, [(None, 1.0)])
    assert np.mean([answer.correct for answer in result.answers]) >= 0.75
