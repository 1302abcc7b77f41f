"""Matryoshka training: what is learnt, what is kept when it stops, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from PIL import Image
from tiny_models import save_tiny_model
from transformers import AutoModelForImageTextToText, AutoProcessor
from typer.testing import CliRunner

import mmcompress
from mmcompress import InputError, SpecError, UnsupportedError, cli
from mmcompress.evals import matryoshka
from mmcompress.evals.conversations import IGNORED, _chat, batch, grouped, readable
from mmcompress.evals.matryoshka import CHECKPOINT, LOG, Recipe, Trainer
from mmcompress.evals.suites import configure
from mmcompress.evals.suites.base import Suite

COLORS = ("red", "blue", "green", "yellow")
RECIPE = Recipe((1, 4, 16), steps=6, batch=2, learning_rate=1e-2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    save_tiny_model("llava", path)
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Four pictures of one color each, all asked alike; two share a question about both."""
    path = tmp_path / "data"
    path.mkdir()
    rows: list[dict[str, Any]] = []
    for color in COLORS:
        Image.new("RGB", (80, 60), color).save(path / f"{color}.png")
        rows.append({"image": f"{color}.png", "question": "what color is the circle ?", "answers": color})
    rows.append(
        {"image": ["red.png", "blue.png"], "question": "what color is it ?", "answers": ["red", "blue", "blue"]}
    )
    write(path, rows)
    return path


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    (path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def suite(data: Path) -> Suite:
    return dataclasses.replace(configure("jsonl(prompt=plain)", data), folder=data)


def trainer(folder: Path, data: Path, out: Path, recipe: Recipe = RECIPE) -> Trainer:
    model = AutoModelForImageTextToText.from_pretrained(folder)
    return Trainer(model, AutoProcessor.from_pretrained(folder), suite(data), recipe, out)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForImageTextToText.from_pretrained(folder).state_dict()


def test_a_batch_is_padded_on_the_left_and_only_answers_count(folder: Path, data: Path) -> None:
    processor = AutoProcessor.from_pretrained(folder)
    inputs = batch(processor, [[asked] for asked in readable(suite(data))[3:]])
    assert inputs["pixel_values"].shape[0] == 3
    ids, labels, mask = inputs["input_ids"], inputs["labels"], inputs["attention_mask"]
    assert mask[0, 0] == 0 and mask[1].all() and mask[:, -1].all()
    said = [processor.tokenizer.decode(row[row != IGNORED]).split() for row in labels]
    assert said == [["yellow", "</s>"], ["blue", "</s>"]]
    assert torch.equal(ids[labels != IGNORED], labels[labels != IGNORED])


def test_questions_about_the_same_images_come_in_one_conversation(folder: Path, data: Path) -> None:
    rows = [{"image": "red.png", "question": f"what {word} is it ?", "answers": word} for word in ("color", "shape")]
    write(data, [*rows, {"image": "blue.png", "question": "what is it ?", "answers": "blue"}])
    processor = AutoProcessor.from_pretrained(folder)
    conversations = grouped(readable(suite(data)), turns=2, seed=0)
    red, blue = sorted(conversations, key=len, reverse=True)
    assert {asked.images[0].name for asked in red} == {"red.png"} and len(red) == 2 and len(blue) == 1
    assert [len(part) for part in grouped(red, turns=1, seed=0)] == [1, 1]
    inputs = batch(processor, [red])
    assert inputs["pixel_values"].shape[0] == 1
    said = processor.tokenizer.decode(inputs["input_ids"][0])
    assert said.count("USER:") == said.count("</s>") == 2 and said.count("<s>") == 1
    labels = inputs["labels"][0]
    answers = " </s> ".join(asked.answers[0] for asked in red)
    assert processor.tokenizer.decode(labels[labels != IGNORED]) == f"{answers} </s>"
    alone = batch(processor, [[red[0]]])["input_ids"][0]
    assert torch.equal(inputs["input_ids"][0][: len(alone)], alone)


def test_a_template_that_writes_conversations_anew_is_refused(folder: Path, data: Path) -> None:
    processor = AutoProcessor.from_pretrained(folder)
    processor.chat_template = "{{ messages | length }}"
    red = readable(suite(data))[:1]
    with pytest.raises(UnsupportedError, match="train with turns=1"):
        batch(processor, [red * 2])


@pytest.mark.parametrize(("blank", "end"), [(" ", ""), ("", "</s>"), ("", "</s>\n")])
def test_answers_end_as_generation_does(data: Path, blank: str, end: str) -> None:
    """Templates as LLaVA-1.5's have only a blank behind an answer."""

    class Tokenizer:
        eos_token, eos_token_id = "</s>", 0

        def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
            return {"input_ids": [ord(letter) for letter in text.replace("</s>", "\0")]}

    class Processor:
        tokenizer = Tokenizer()

        def apply_chat_template(self, turns: list[dict[str, Any]], add_generation_prompt: bool = False) -> str:
            said = (turn["role"] + ":" + turn["content"][-1]["text"] for turn in turns)
            ends = "".join(part + (blank + end if part.startswith("a") else " ") for part in said)
            return ends + "assistant:" * add_generation_prompt

    _, parts = _chat(Processor(), readable(suite(data))[:1] * 2)
    answers = ["".join(map(chr, ids)) for ids, is_answer in parts if is_answer]
    assert answers == ["red\0" + end.removeprefix("</s>")] * 2
    assert [is_answer for _, is_answer in parts] == [True, False, True]


def test_the_tower_learns_at_a_rate_of_its_own(folder: Path, data: Path, tmp_path: Path) -> None:
    recipe = dataclasses.replace(RECIPE, steps=1, tower=True, llm="frozen", tower_learning_rate=0.0)
    run = trainer(folder, data, tmp_path / "out", recipe)
    assert {group["highest"] for group in run.optimizer.param_groups} == {0.0, recipe.learning_rate}
    run.run()
    before, after = weights(folder), weights(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("multi_modal_projector" in name for name in changed)


def test_budgets_and_questions_depend_on_the_step_alone() -> None:
    recipe = Recipe((1, 4), steps=10, batch=3, seed=5)
    assert {budget for step in range(50) for budget in recipe.drawn(step)} == {1, 4}
    assert all(len(recipe.drawn(step)) == 1 for step in range(50))
    assert sorted(dataclasses.replace(recipe, draws=2).drawn(3)) == [1, 4]
    together = [recipe.dealt(7, step, rank, 2) for step in range(7) for rank in range(2)]
    dealt = [question for part in together for question in part]
    for epoch in range(6):
        assert sorted(dealt[7 * epoch : 7 * epoch + 7]) == list(range(7))
    assert dealt[:7] != dealt[7:14]
    assert recipe.dealt(2, 4, 1, 2) == recipe.dealt(2, 4, 1, 2) and len(recipe.dealt(2, 4, 1, 2)) == 3


@pytest.mark.parametrize("llm", ["full", "lora", "frozen"])
def test_it_learns_and_leaves_a_model_that_knows_its_scales(folder: Path, data: Path, tmp_path: Path, llm: Any) -> None:
    recipe = dataclasses.replace(RECIPE, budgets=(1, 16), steps=20, batch=4, llm=llm, lora_learning_rate=1e-2)
    run = trainer(folder, data, tmp_path / "out", recipe)
    run.run()
    losses = [row["loss"] for row in run.rows]
    assert len(losses) == 20 and sum(losses[-5:]) < sum(losses[:5])
    assert {row["budget"] for row in run.rows} == {1, 16}
    before, after = weights(folder), weights(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    inside = {name for name in changed if "language_model" in name}
    assert any("multi_modal_projector" in name for name in changed) and not any("vision_tower" in n for n in changed)
    assert bool(inside) == (llm != "frozen")
    assert (tmp_path / "out" / "model.safetensors").is_file()
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    with mmcompress.wrap(model, "m3", keep=16) as handle:
        assert handle.dial.budgets() == (1, 16)
    with pytest.raises(SpecError, match="M3 has no budget 4: it takes 1, 16"):
        mmcompress.wrap(model, "m3", keep=4)


def test_a_step_of_all_budgets_is_their_mean_and_encodes_images_once(
    folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matryoshka, "_MAX_GRADIENT", 1e9)  # clipped gradients have no mean

    def gradients(budgets: tuple[int, ...]) -> tuple[dict[str, torch.Tensor], int, dict[int, float]]:
        """Of one step at a learning rate that changes nothing, by AdamW's first moment; calls of the tower; losses."""
        recipe = Recipe(budgets, steps=1, batch=2, draws=len(budgets), tower=True, seed=1)
        recipe = dataclasses.replace(recipe, learning_rate=0.0, tower_learning_rate=0.0)
        run = trainer(folder, data, tmp_path / str(budgets), recipe)
        calls = list[Any]()
        run.model.model.vision_tower.embeddings.register_forward_hook(lambda *_: calls.append(1))
        run.run()
        states = {name: run.optimizer.state[weight] for name, weight in run.trained.items()}
        moments = {name: state["exp_avg"] for name, state in states.items() if state}
        return moments, len(calls), {row["budget"]: row["loss"] for row in run.rows}

    both, calls, losses = gradients((4, 16))
    parts = [gradients((budget,)) for budget in (4, 16)]
    assert calls == 1 and losses == parts[0][2] | parts[1][2]
    assert any("vision_tower" in name for name in both)
    for name, moment in both.items():
        torch.testing.assert_close(moment, (parts[0][0][name] + parts[1][0][name]) / 2, rtol=1e-4, atol=1e-7)


def test_an_interrupted_run_ends_like_one_that_was_not(folder: Path, data: Path, tmp_path: Path) -> None:
    whole = trainer(folder, data, tmp_path / "whole")
    whole.run()

    def stop(row: dict[str, Any]) -> None:
        if row["step"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer(folder, data, tmp_path / "parts").run(stop)
    assert not (tmp_path / "parts" / "model.safetensors").exists()
    rest = trainer(folder, data, tmp_path / "parts")
    assert rest.step == 3
    rest.run()
    assert (tmp_path / "parts" / LOG).read_text() == (tmp_path / "whole" / LOG).read_text()
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    for name in one:
        torch.testing.assert_close(one[name], other[name])


def test_an_image_that_breaks_on_the_way_leaves_what_was_learnt(folder: Path, data: Path, tmp_path: Path) -> None:
    run = trainer(folder, data, tmp_path / "out")
    late = run.conversations[RECIPE.dealt(5, 2, 0, 1)[0]][0].images[0].path
    assert late is not None
    first = {shown for step in (0, 1) for i in RECIPE.dealt(5, step, 0, 1) for shown in run.conversations[i][0].images}
    late.write_bytes(b"no picture")
    with pytest.raises(InputError, match="cannot be read"):
        run.run()
    state = torch.load(tmp_path / "out" / CHECKPOINT, weights_only=True)
    assert state["step"] == (0 if any(picture.path == late for picture in first) else 2)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "what ?", "answers": "red"}, "1 rows of .* are malformed"),
        ({"image": "gone.png", "question": "what ?", "answers": "red"}, r"image gone\.png does not exist"),
        ({"image": "../red.png", "question": "what ?", "answers": "red"}, "leads out of"),
        ({"image": "red.png", "question": "what ?"}, "1 rows of .* are malformed"),
    ],
)
def test_rows_that_cannot_be_learnt_from_are_refused_at_once(
    folder: Path, data: Path, tmp_path: Path, row: dict[str, Any], message: str
) -> None:
    write(data, [{"image": "red.png", "question": "what ?", "answers": "red"}, row])
    with pytest.raises(InputError, match=message):
        trainer(folder, data, tmp_path / "out")


def test_other_runs_are_refused(folder: Path, data: Path, tmp_path: Path) -> None:
    recipe = dataclasses.replace(RECIPE, steps=1)
    trainer(folder, data, tmp_path / "out", recipe).run()
    with pytest.raises(SpecError, match=r"is of another run, with steps 1 instead of 6\."):
        trainer(folder, data, tmp_path / "out")
    model = AutoModelForImageTextToText.from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    with pytest.raises(SpecError, match=r"is of another run, with model [0-9a-f]+ instead of"):
        Trainer(model, AutoProcessor.from_pretrained(folder), suite(data), recipe, tmp_path / "out")
    write(data, [{"image": "red.png", "question": "what ?", "answers": "red"}])
    with pytest.raises(SpecError, match=r"is of another run, with questions [0-9a-f]+ instead of"):
        trainer(folder, data, tmp_path / "out", recipe)


@pytest.mark.parametrize("lost", ["conditions", "weights", "optimizer", "rows"])
def test_torn_checkpoints_are_refused(folder: Path, data: Path, tmp_path: Path, lost: str) -> None:
    recipe = dataclasses.replace(RECIPE, steps=1)
    trainer(folder, data, tmp_path, recipe).run()
    state = torch.load(tmp_path / CHECKPOINT, weights_only=True)
    del state[lost]
    torch.save(state, tmp_path / CHECKPOINT)
    with pytest.raises(InputError, match=rf"checkpoint\.pt cannot be read \('{lost}'\)"):
        trainer(folder, data, tmp_path, recipe)
    (tmp_path / CHECKPOINT).write_bytes(b"torn")
    with pytest.raises(InputError, match=r"checkpoint\.pt cannot be read"):
        trainer(folder, data, tmp_path, recipe)


def test_settings_of_accelerate_that_would_be_ignored_are_refused(
    folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    with pytest.raises(UnsupportedError, match="gather gradients over 4 steps; choose a larger batch"):
        trainer(folder, data, tmp_path / "out")
    monkeypatch.undo()
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.FSDP)
    with pytest.raises(UnsupportedError, match="shards no models, but accelerate is set to FSDP"):
        trainer(folder, data, tmp_path / "out")


def test_budgets_must_be_possible(folder: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="m3 cannot pool 4x4 tokens evenly to 9"):
        trainer(folder, data, tmp_path / "out", dataclasses.replace(RECIPE, budgets=(1, 9)))
    with pytest.raises(SpecError, match="training needs budgets"):
        Recipe((), steps=1)
    with pytest.raises(SpecError, match="a step cannot draw 3 of 2 budgets"):
        Recipe((1, 4), steps=1, draws=3)
    with pytest.raises(SpecError, match="a budget is given twice: 4, 4"):
        Recipe((4, 4), steps=1)


def test_families_without_such_a_projector_are_refused(data: Path, tmp_path: Path) -> None:
    save_tiny_model("qwen2_5_vl", tmp_path / "qwen")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "qwen")

    class Processor:
        chat_template = "any"

    with pytest.raises(UnsupportedError, match="m3 pools the tokens of whole tiles"):
        Trainer(model, Processor(), suite(data), RECIPE, tmp_path / "out")


def test_processes_that_read_ahead_change_nothing(folder: Path, data: Path, tmp_path: Path) -> None:
    trainer(folder, data, tmp_path / "none").run()
    trainer(folder, data, tmp_path / "two").run(workers=2)
    assert (tmp_path / "two" / LOG).read_text() == (tmp_path / "none" / LOG).read_text()
    one, other = weights(tmp_path / "none"), weights(tmp_path / "two")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_help_has_an_example() -> None:
    shown = CliRunner(env={"COLUMNS": "160"}).invoke(cli.app, ["train", "matryoshka", "--help"]).stdout
    assert "mmcompress train matryoshka --model micro-llava" in shown.partition("Try:")[2]


def test_the_command_trains_and_goes_on(folder: Path, data: Path, tmp_path: Path) -> None:
    def command(*extra: str) -> Any:
        given = ["train", "matryoshka", "--model", str(folder), "--data", str(data), "--out", str(tmp_path / "out")]
        given += ["--suite", "jsonl(prompt=plain)", "--steps", "2", "--batch", "2", *extra]
        return CliRunner(env={"COLUMNS": "160"}).invoke(cli.app, given)

    done = command("--budgets", "16,4,1")
    assert done.exit_code == 0, (done.output, done.exception)
    assert "wrote" in done.stdout and len((tmp_path / "out" / LOG).read_text().splitlines()) == 2
    assert command("--budgets", "16,4,1").exit_code == 0
    for budgets, message in (("16,x", "write token counts"), ("16,5", "cannot pool"), ("16,4", "another run")):
        failed = command("--budgets", budgets)
        assert failed.exit_code == 2 and message in " ".join(failed.stderr.split())
    failed = command("--budgets", "16,4,1", "--suite", f"jsonl(folder={data})")
    assert failed.exit_code == 2 and "is what --data says" in " ".join(failed.stderr.split())
    failed = command("--budgets", "16", "--llm", "lor")
    assert failed.exit_code == 2 and "Did you mean 'lora'" in " ".join(failed.stderr.split())


@pytest.mark.slow
def test_two_processes_learn_what_one_learns_from_both_their_shares(folder: Path, data: Path, tmp_path: Path) -> None:
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    for name, launcher, batch_size in (("one", [], "4"), ("two", [*launch, "--mixed_precision", "no"], "2")):
        given = ["--model", str(folder), "--data", str(data), "--suite", "jsonl(prompt=plain)", "--budgets", "16,4,1"]
        given += ["--draws", "2", "--tower", "--steps", "3", "--batch", batch_size, "--out", str(tmp_path / name)]
        done = subprocess.run(
            [sys.executable, *launcher, "-m", "mmcompress.cli", "train", "matryoshka", *given],
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    one, two = ([json.loads(row) for row in (tmp_path / name / LOG).open()] for name in ("one", "two"))
    assert [(row["step"], row["budget"]) for row in one] == [(row["step"], row["budget"]) for row in two]
    assert [row["loss"] for row in one] == pytest.approx([row["loss"] for row in two], abs=1e-2)
