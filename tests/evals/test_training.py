"""The trainer: its shortcuts equal the stock forward passes, and interruptions change nothing."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, CLIPModel

from mmcompress.errors import InputError, SpecError
from mmcompress.evals.micro.card import trained_on
from mmcompress.evals.micro.masks import FONTS
from mmcompress.evals.micro.processing import load_processor
from mmcompress.evals.micro.questions import Asked
from mmcompress.evals.micro.scene import Box, Scene, Shape, Sign, Style, draw_scene
from mmcompress.evals.micro.training import export, trainer
from mmcompress.evals.micro.training.__main__ import main
from mmcompress.evals.micro.training.answering import answer, drop, keep_all, looking
from mmcompress.evals.micro.training.architectures import TOKEN_IDS, initialise_language_model
from mmcompress.evals.micro.training.batches import AnswersBatches, VisionBatches
from mmcompress.evals.micro.training.families import PATCH
from mmcompress.evals.micro.training.packing import NOTHING, pack, tokenize
from mmcompress.evals.micro.training.recipes import RECIPES, find_recipe
from mmcompress.evals.micro.training.stages import Modules
from mmcompress.evals.micro.training.targets import BACKGROUND, BLANK, CHARACTERS, IGNORE, SIGN, targets
from mmcompress.evals.micro.training.trainer import CHECKPOINT, CURVES, LOG, Trainer, rate

QUESTIONS = [("is there a red star ?", "yes"), ("what number is on the blue sign ?", "4 2"), ("how many moon ?", "3")]


def pictures(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (*shape, 3), dtype=torch.uint8, generator=generator)


def packed(length: int = 64) -> list[torch.Tensor]:
    drawn = iter([Asked("", question, said, "", number) for number, (question, said) in enumerate(QUESTIONS)])
    return [torch.from_numpy(column)[None] for column in pack(lambda: next(drawn, None), length)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Any, Any]]:
    """Recipe, untrained model and processor of one recipe of each family."""
    found = {}
    for name in ("micro-llava", "micro-llava-next", "micro-qwen2.5-vl"):
        recipe = find_recipe(name)
        modules = Modules.build(recipe)
        initialise_language_model(modules.model, 1.0)
        folder = tmp_path_factory.mktemp(name)
        export.write(modules, recipe, folder)
        found[name] = recipe, modules.model.eval(), load_processor(folder)
    return found


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("micro-llava", (1, 224, 224)),
        ("micro-llava-next", (1, 448, 224)),
        ("micro-llava-next", (1, 224, 672)),
        ("micro-llava-next", (1, 448, 448)),
        ("micro-qwen2.5-vl", (1, 224, 168)),
        ("micro-qwen2.5-vl", (2, 168, 280)),
    ],
)
@torch.no_grad()
def test_packed_questions_get_the_logits_of_the_stock_forward_pass(
    models: dict[str, tuple[Any, Any, Any]], name: str, shape: tuple[int, int, int]
) -> None:
    recipe, model, processor = models[name]
    shown = pictures(1, *shape)
    prefix, features = recipe.family.prefix(model, shown), recipe.family.features(model, shown)
    ids, block, offset, target, _ = packed()
    assert int(block.max()) == len(QUESTIONS) - 1
    logits: list[torch.Tensor] = []
    hook = model.lm_head.register_forward_hook(lambda module, inputs, output: logits.append(output))
    answer(model, features, prefix, keep_all(prefix, 1), ids, block, offset, target)
    hook.remove()

    image = processor.image_token if hasattr(processor, "image_token") else "<image>"
    wrapped = f"<|vision_start|>{image}<|vision_end|>" if "qwen" in name else f" {image}"
    images = [Image.fromarray(picture.numpy()) for picture in shown[0]]
    expected = []
    for question, said in QUESTIONS:
        text = f"<s> USER:{' ' if 'qwen' in name else ''}{len(images) * wrapped} {question} ASSISTANT: {said} </s>"
        inputs = processor(images=images, text=text, return_tensors="pt")
        assert inputs["input_ids"][0].tolist()[: len(prefix.ids)] == prefix.ids.tolist()
        expected.append(model(**inputs).logits[0, -len(tokenize(said)) - 2 : -1])
    torch.testing.assert_close(logits[0], torch.cat(expected), rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_positions_of_kept_tokens(models: dict[str, tuple[Any, Any, Any]]) -> None:
    recipe, model, _ = models["micro-llava"]
    prefix = recipe.family.prefix(model, pictures(2, 1, 224, 224))
    kept = drop(prefix, 2, 0.1, False, torch.Generator().manual_seed(0)).kept
    assert kept.shape == (2, 2 + round(0.1 * 256)) and not torch.equal(kept[0], kept[1])
    assert torch.equal(kept[:, :2], torch.tensor([[0, 1], [0, 1]])) and bool((kept.diff() > 0).all())
    seen: list[torch.Tensor] = []
    language_model = model.model.language_model
    hook = language_model.register_forward_pre_hook(
        lambda module, arguments, named: seen.append(named["position_ids"]), with_kwargs=True
    )
    features = recipe.family.features(model, pictures(2, 1, 224, 224))
    ids, block, offset, target, _ = (column.repeat(2, 1) for column in packed())
    for renumbered in (False, True):
        dropout = drop(prefix, 2, 0.1, renumbered, torch.Generator().manual_seed(0))
        answer(model, features, prefix, dropout, ids, block, offset, target)
    hook.remove()
    original, contiguous = seen
    assert torch.equal(original[:, : kept.shape[1]], kept) and original[0, kept.shape[1]] == 258
    assert torch.equal(contiguous[0, : kept.shape[1] + 1], torch.arange(kept.shape[1] + 1))


def test_newlines_stay(models: dict[str, tuple[Any, Any, Any]]) -> None:
    recipe, model, _ = models["micro-llava-next"]
    prefix = recipe.family.prefix(model, pictures(1, 1, 448, 224))
    assert int(prefix.visual.sum()) == 256 + 32 * 17 and int(prefix.droppable.sum()) == 256 + 32 * 16
    newlines = (prefix.visual & ~prefix.droppable).nonzero()[:, 0]
    kept = drop(prefix, 1, 0.05, False, torch.Generator().manual_seed(0)).kept[0]
    assert set(newlines.tolist()) < set(kept.tolist())


@torch.no_grad()
def test_patches_come_in_raster_order(models: dict[str, tuple[Any, Any, Any]]) -> None:
    """Changing one patch changes the state of that patch most."""
    for name in ("micro-llava", "micro-qwen2.5-vl"):
        recipe, model, _ = models[name]
        shown = pictures(1, 1, 224, 224)
        states = recipe.family.hidden(model, shown).patches[0]
        for row, column in ((0, 1), (3, 12), (9, 4), (15, 15)):
            changed = shown.clone()
            changed[0, 0, row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH] = 255
            difference = (recipe.family.hidden(model, changed).patches[0] - states).norm(dim=-1)[0]
            assert int(difference.argmax()) == row * 16 + column


def test_patch_labels() -> None:
    shape, sign = Shape("red", "star", Box(14, 28, 20, 20)), Sign("blue", "CAT", FONTS[0], 15, Box(100, 100, 40, 20))
    labels, owners, summary = targets(Scene(224, 168, (shape,), (sign,)), PATCH)
    assert labels.shape[1:] == owners.shape == (12, 16)
    assert owners[2, 1] == 0 and owners[0, 0] == -1 and owners[7, 8] == 1
    kind, color, *characters, column, row, glyph = labels[:, 7, 8]
    assert (kind, color) == (SIGN, 2)
    assert characters == [*(CHARACTERS.index(letter) for letter in "CAT"), BLANK, BLANK]
    assert glyph == CHARACTERS.index("A") and labels[-1, 7, 7] == CHARACTERS.index("C")
    assert (column, row) == (12 * 120 // 224, 12 * 110 // 168)
    assert labels[0, 0, 0] == BACKGROUND and set(labels[1:, 0, 0]) == {IGNORE}
    assert summary.sum() == 1 + 1


def test_small_objects_have_a_patch() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        scene = draw_scene(rng, Style(shapes=(6, 6)))
        owners = targets(scene, PATCH).owners
        assert set(range(len(scene.objects))) == set(owners.ravel().tolist()) - {-1}


def test_packing_leaves_out_what_does_not_fit() -> None:
    ids, block, offset, target, referent = (column[0].tolist() for column in packed(length=18))
    first, third = tokenize("yes </s>"), tokenize("3 </s>")
    assert block == 9 * [0] + 7 * [1] + 2 * [-1]
    assert offset == [*range(9), *range(7), 0, 0]
    assert ids[:9] == tokenize("is there a red star ? ASSISTANT: yes </s>") and ids[16:] == 2 * [TOKEN_IDS["<pad>"]]
    assert target == [*6 * [IGNORE], *first, IGNORE, *4 * [IGNORE], *third, *3 * [IGNORE]]
    assert referent == [*6 * [NOTHING], 0, *6 * [NOTHING], 2, *4 * [NOTHING]]


def test_looking_asks_for_the_object_when_an_answer_is_due() -> None:
    referent = torch.tensor([[NOTHING, 3], [1, NOTHING]])
    owners = torch.tensor([[3, -1, 3, 0], [0, 0, -1, 0]])  # what the second question is about shows nowhere
    look = torch.full((2, 2, 2, 4), 0.25)
    look[0, 0, 1] = torch.tensor([0.6, 0.1, 0.2, 0.1])
    assert looking(look, referent, owners).item() == pytest.approx(-(math.log(0.8) + math.log(0.5)) / 2)
    look[1], look[0, :, 0] = 0, 0  # neither where nothing is shown nor where nothing is asked
    assert looking(look, referent, owners).item() == pytest.approx(-(math.log(0.8) + math.log(0.5)) / 2)


@torch.no_grad()
def test_what_is_watched_is_attention_from_questions_to_the_prompt(models: dict[str, tuple[Any, Any, Any]]) -> None:
    recipe, model, _ = models["micro-llava"]
    model.set_attn_implementation("eager")
    shown = pictures(2, 1, 224, 224)
    prefix, features = recipe.family.prefix(model, shown), recipe.family.features(model, shown)
    inputs = [column.repeat(2, 1) for column in packed()[:4]]
    looks = answer(model, features, prefix, keep_all(prefix, 2), *inputs, watched=True).looks
    assert len(looks) == 4 and looks[0].shape == (2, 4, 64, 258)
    begins = (inputs[2][0] == 0) & (inputs[1][0] >= 0)
    first = looks[1].sum(3)[:, :, begins]  # the first token of a question sees the prompt and itself only
    assert bool(((first < 1) & (first > 0.9)).all())


def test_batches_depend_on_their_number_only() -> None:
    for data in (
        VisionBatches(find_recipe("micro-llava"), 9),
        AnswersBatches(find_recipe("micro-video"), "answers", 9),
    ):
        first, again, other = data[3], data[3], data[4]
        assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
        assert not torch.equal(first.pictures[0, 0, :168, :168], other.pictures[0, 0, :168, :168])


def test_learning_rate() -> None:
    assert rate(0, 1000) < rate(75, 1000) < rate(150, 1000) > rate(600, 1000) > rate(999, 1000) > 0.029
    assert rate(0, 1) == 1
    assert rate(124, 1000, still=125) == 0 < rate(125, 1000, still=125) < rate(249, 1000, still=125) == rate(249, 1000)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> float:
    """A scale at which the answers stage of micro-llava-draft takes four steps, each a line of the log."""
    monkeypatch.setattr(trainer, "_LOG_EVERY", 1)
    return 4 / find_recipe("micro-llava-draft").answers.steps


@pytest.fixture(scope="module")
def llava(models: dict[str, tuple[Any, Any, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start")
    export.write(Modules.build(find_recipe("micro-llava")), find_recipe("micro-llava"), folder)
    return folder


def test_an_interrupted_run_is_the_run_it_would_have_been(llava: Path, tiny: float, tmp_path: Path) -> None:
    whole = Trainer("micro-llava-draft", tmp_path / "whole", start=llava, scale=tiny)
    assert whole.run()
    parts = 1
    while not Trainer("micro-llava-draft", tmp_path / "parts", start=llava, scale=tiny).run(seconds=1e-3):
        parts += 1
        assert parts < 9
    assert parts > 2

    def curve(folder: Path) -> list[dict[str, Any]]:
        rows = [json.loads(row) for row in (folder / LOG).read_text().splitlines()]
        return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]

    assert [row["stage"] for row in curve(tmp_path / "whole")] == [*4 * ["answers"], "pruned"]
    assert curve(tmp_path / "whole") == curve(tmp_path / "parts")
    weights = [load_file(tmp_path / folder / "model.safetensors") for folder in ("whole", "parts")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert (tmp_path / "whole" / CURVES).exists()


def test_a_draft_takes_the_encoder_and_leaves_it_alone(llava: Path, tiny: float, tmp_path: Path) -> None:
    assert Trainer("micro-llava-draft", tmp_path, start=llava, scale=tiny / 4).run()
    start, draft = (
        AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).model.vision_tower.state_dict()
        for folder in (llava, tmp_path)
    )
    assert all(torch.equal(start[name], draft[name]) for name in start)


def test_the_twin_is_the_model_before_its_last_stage(tmp_path: Path) -> None:
    runs = {name: Trainer(name, tmp_path / name, scale=1e-6) for name in ("micro-llava", "micro-llava-nodrop")}
    assert all(run.run() for run in runs.values())
    stages = {name: [(row["stage"], row["loss"]) for row in run.rows] for name, run in runs.items()}
    assert [stage for stage, _ in stages["micro-llava"]] == ["vision", "answers", "pruned"]
    assert stages["micro-llava-nodrop"] == stages["micro-llava"][:2]


@pytest.mark.parametrize("stage", ["vision", "answers"])
def test_training_on_begins_with_the_weights_and_leaves_them_until_heads_are_learnt(
    llava: Path, tmp_path: Path, stage: str
) -> None:
    trained_on = Trainer("micro-llava", tmp_path, source=llava, steps={stage: 1})
    heads = trained_on.modules.heads if stage == "vision" else trained_on.modules.token_heads
    assert heads is not None
    fresh = {name: weight.clone() for name, weight in heads.state_dict().items()}
    assert trained_on.run()
    assert not any(torch.equal(fresh[name], weight) for name, weight in heads.state_dict().items() if "1." in name)
    for file in ("model.safetensors", f"{export.TEXT_TOWER}/model.safetensors"):
        before, after = load_file(llava / file), load_file(tmp_path / file)
        # The CLIP's own encoder is the model's, from the first step on.
        names = {name for name in before if not name.startswith("vision_model")}
        assert names and before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in names)


def test_training_on_goes_on_with_the_log_on_other_scenes(llava: Path, tmp_path: Path) -> None:
    first = Trainer("micro-llava", tmp_path / "first", source=llava, steps={"answers": 1})
    assert first.run()
    second = Trainer("micro-llava", tmp_path / "second", source=tmp_path / "first", steps={"pruned": 1})
    assert second.run()
    rows = [json.loads(row) for row in (tmp_path / "second" / LOG).read_text().splitlines()]
    assert [(row["stage"], row["from"]) for row in rows] == [("answers", llava.name), ("pruned", "first")]
    assert rows[1]["seconds"] >= rows[0]["seconds"]
    assert len({find_recipe("micro-llava").seed, first.recipe.seed, second.recipe.seed}) == 3
    lines = trained_on(rows)
    assert len(lines) == 1 and f"1 steps of stage answers from `{llava.name}`, 1 steps of stage pruned" in lines[0]


def test_training_on_without_a_text_tower_makes_none(llava: Path, tmp_path: Path) -> None:
    shutil.copytree(llava, tmp_path / "start", ignore=shutil.ignore_patterns(export.TEXT_TOWER))
    assert Trainer("micro-llava", tmp_path / "run", source=tmp_path / "start", steps={"answers": 1}).run()
    assert not (tmp_path / "run" / export.TEXT_TOWER).exists()
    assert Trainer("micro-llava", tmp_path / "run", source=tmp_path / "start", steps={"answers": 1}).run()


def test_what_cannot_betrained_on_is_refused(
    models: dict[str, Any],
    llava: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(InputError, match=r"holds a LlavaForConditionalGeneration, .* is a Qwen2_5_VLForCond"):
        Trainer("micro-qwen2.5-vl", tmp_path, source=llava)
    with pytest.raises(InputError, match="does not fit"):
        Trainer("micro-llava-draft", tmp_path, source=llava)
    with pytest.raises(InputError, match="no model to start from"):
        Trainer("micro-llava", tmp_path, source=tmp_path / "none")
    with pytest.raises(SpecError, match="Did you mean 'vision'"):
        Trainer("micro-llava", tmp_path, source=llava, steps={"visions": 1})
    with pytest.raises(SpecError, match="at least 1 step"):
        Trainer("micro-llava", tmp_path, source=llava, steps={"vision": 0})
    Trainer("micro-llava", tmp_path, source=llava, steps={"answers": 1}).run()
    with pytest.raises(SpecError, match="of another run"):
        Trainer("micro-llava", tmp_path, source=llava, steps={"answers": 2})
    monkeypatch.setattr("sys.argv", ["", "micro-llava", "--steps", "vision"])
    with pytest.raises(SystemExit):
        main()
    assert "vision=2000" in capsys.readouterr().err


def test_bad_starts_are_refused(llava: Path, tiny: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SpecError, match="Did you mean 'micro-llava'"):
        Trainer("micro-lava", tmp_path)
    monkeypatch.setattr(export, "MODELS", {})
    with pytest.raises(SpecError, match="--start"):
        Trainer("micro-llava-draft", tmp_path)
    with pytest.raises(InputError, match="no model to start from"):
        Trainer("micro-llava-draft", tmp_path, start=tmp_path / "none")
    Trainer("micro-llava-draft", tmp_path, start=llava, scale=tiny).run(seconds=1e-3)
    with pytest.raises(SpecError, match="of another run"):
        Trainer("micro-llava-draft", tmp_path, scale=1.0)
    (tmp_path / CHECKPOINT).write_bytes(b"torn")
    with pytest.raises(InputError, match="cannot be read"):
        Trainer("micro-llava-draft", tmp_path, scale=tiny)


def test_a_checkpoint_of_another_generator_is_refused(
    llava: Path, tiny: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Trainer("micro-llava-draft", tmp_path, start=llava, scale=tiny).run(seconds=1e-3)
    monkeypatch.setattr(trainer, "GENERATOR_VERSION", 99)
    with pytest.raises(SpecError, match="generator"):
        Trainer("micro-llava-draft", tmp_path, scale=tiny)


@pytest.mark.slow
def test_sixty_seconds_from_scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `make micro MODEL=micro-llava SECONDS=60` does: the loss falls, and what is left loads."""
    monkeypatch.setattr("sys.argv", ["", "micro-llava", "--out", str(tmp_path), "--seconds", "60", "--threads", "1"])
    main()
    losses = [json.loads(row)["loss"] for row in (tmp_path / LOG).read_text().splitlines()]
    assert len(losses) >= 2 and losses[-1] < 0.8 * losses[0]
    model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    processor = load_processor(tmp_path)
    inputs = processor(
        images=Image.new("RGB", (224, 224)),
        text="<s> USER: <image> is there a red star ? ASSISTANT:",
        return_tensors="pt",
    )
    assert model.generate(**inputs, max_new_tokens=2).shape[1] > inputs["input_ids"].shape[1]
    CLIPModel.from_pretrained(tmp_path / "text-tower")
    resumed = Trainer("micro-llava", tmp_path)
    assert resumed.step > 0
    shutil.rmtree(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, recipe in RECIPES.items() if recipe.vision is None])
def test_every_recipe_with_a_start_trains(name: str, models: dict[str, Any], llava: Path, tmp_path: Path) -> None:
    """A few steps of each, from untrained weights."""
    source = find_recipe(name).start
    assert source is not None
    export.write(Modules.build(find_recipe(source)), find_recipe(source), tmp_path / "start")
    scale = 1 / find_recipe(name).answers.steps
    assert Trainer(name, tmp_path / "run", start=tmp_path / "start", scale=scale).run()
    AutoModelForImageTextToText.from_pretrained(tmp_path / "run")
