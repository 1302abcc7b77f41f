"""Every command on the embedded model, and every way to get it wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import transformers
from PIL import Image
from typer.testing import CliRunner, Result

import mmcompress
from mmcompress import cli
from mmcompress.budget import Budget
from mmcompress.errors import SpecError
from mmcompress.evals.demo import KEEPS
from mmcompress.evals.demo import METHODS as DEMO_METHODS
from mmcompress.evals.micro import MICROVQA_PATH, model_path
from mmcompress.evals.overlay import SIDE
from mmcompress.registry import METHODS, POLICIES

PICTURE = MICROVQA_PATH / "images" / "000.png"
QUESTION = "what color is the star ?"
COMMANDS = (
    "list",
    "info",
    "demo",
    "eval",
    "calibrate",
    "bench",
    "bench-serve",
    "suites",
    "report",
    "run",
    "show",
    "doctor",
)


def invoke(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "160"}).invoke(cli.app, [str(argument) for argument in arguments])


def succeed(*arguments: object) -> str:
    result = invoke(*arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    return " ".join(result.stdout.split())


def fail(*arguments: object) -> str:
    result = invoke(*arguments)
    assert result.exit_code == 2, (result.output, result.exception)
    assert "Traceback" not in result.output
    return result.stderr


def ask(*arguments: object) -> tuple[object, ...]:
    return ("run", "micro-llava", "--image", PICTURE, "--question", QUESTION, *arguments)


def test_version() -> None:
    assert succeed("--version") == f"mmcompress {mmcompress.__version__}"


def test_help_teaches_with_examples() -> None:
    for text in (succeed("--help"), invoke().output):
        assert all(command in text for command in COMMANDS)
        assert "mmcompress show photo.jpg --method" in " ".join(text.split())


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_shows_how_it_is_used(command: str) -> None:
    usage, _, examples = succeed(command, "--help").partition("Try:")
    assert usage and f"mmcompress {command}" in examples


@pytest.mark.parametrize(("arguments", "absent"), [("--help", "torch"), ("list", "transformers")])
def test_what_is_not_needed_is_not_imported(arguments: str, absent: str) -> None:
    code = f"""
import sys
from mmcompress import cli
try:
    cli.app({[arguments]!r})
except SystemExit:
    print({absent!r} in sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split()[-1] == "False"


def test_list_shows_every_method() -> None:
    text = succeed("list")
    for name in set(METHODS.names()) - set(METHODS.plugins()):
        assert f"{name} │ {METHODS.get(name).info.family}" in text.replace("  ", " ")  # type: ignore[attr-defined]


def test_list_does_not_import_third_party_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(METHODS, "plugins", lambda: {"fancy": "nowhere.to.be.found:Fancy"})
    monkeypatch.setattr(METHODS, "names", lambda: ["fancy", "todre"])
    text = succeed("list")
    assert "third-party" in text and "nowhere.to.be.found:Fancy" in text and "todre" in text


@pytest.mark.parametrize("name", METHODS.names())
def test_info_is_a_complete_card(name: str) -> None:
    text = succeed("info", name)
    assert METHODS.get(name).info.summary in text  # type: ignore[attr-defined]
    assert "cite" in text and "licence" in text
    assert all(family in text for family in ("llava_next", "qwen2_5_vl", "smolvlm"))


def test_info_says_what_a_method_needs_of_every_family() -> None:
    todre, received = succeed("info", "todre"), succeed("info", "vtc-cls(score=received)")
    assert "arXiv:2505.18757" in todre and "exactly the budget" in todre and "'max-sum'" in todre
    assert "cls_rows of layer 22; embeddings" in todre
    assert "CLS token" in succeed("info", "vtc-cls")
    assert "received_attention of layers 23, 31" in received
    assert "by a rule of its own" in succeed("info", "pool") and "no options" in succeed("info", "pool")


def test_run_prints_both_answers_and_the_savings() -> None:
    text = succeed(*ask("--method", "todre", "--keep", "0.1"))
    assert "unpruned red todre(keep=0.1) red" in text
    assert "256 of 256 │ 25 of 256" in text and "encoder ms" in text and "GFLOP" in text


@pytest.mark.parametrize(("keep", "kept"), [("1", 1), ("1.0", 256), ("64", 64), ("0.25", 64), (".05", 12)])
def test_digits_are_a_count_and_everything_else_a_fraction(keep: str, kept: int) -> None:
    assert f"│ {kept} of 256 │" in succeed(*ask("--method", "uniform", "--keep", keep))


def test_run_takes_several_images_positions_and_a_budget_in_the_spec() -> None:
    text = succeed(*ask("--image", PICTURE, "--method", "todre(keep=0.25)", "--positions", "original"))
    assert "512 of 512 │ 128 of 512" in text


def test_show_draws_what_was_kept(tmp_path: Path) -> None:
    out = tmp_path / "kept.png"
    succeed("show", PICTURE, "--method", "uniform,todre(objective=k-center)", "--keep", 64, "--out", out)
    with Image.open(out) as image, Image.open(PICTURE) as source:
        drawn, picture = image.convert("RGB"), source.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    gap = 10
    assert drawn.width == 3 * SIDE + 2 * gap and SIDE < drawn.height < SIDE + 60
    panels = [drawn.crop((x, 0, x + SIDE, SIDE)) for x in (0, SIDE + gap)]
    assert panels[0].tobytes() == picture.tobytes()
    kept = {(2 * step + 1) * 256 // 128 for step in range(Budget(64).tokens(256))}
    cell = SIDE // 16
    for token in range(256):
        row, column = divmod(token, 16)
        inside = (column * cell + 2, row * cell + 2, (column + 1) * cell - 2, (row + 1) * cell - 2)
        same = panels[1].crop(inside).tobytes() == picture.crop(inside).tobytes()
        assert same == (token in kept)


def test_demo_writes_table_answers_and_picture(tmp_path: Path) -> None:
    text = succeed("demo", "--limit", 9, "--out", tmp_path / "new" / "demo")
    written = tmp_path / "new" / "demo"
    runs = 1 + len(KEEPS) * len(DEMO_METHODS)
    assert "unpruned" in text and text.count("todre") == 4
    assert sum(line.startswith("|") for line in (written / "table.md").read_text().splitlines()) == 2 + runs
    record = json.loads((written / "results.json").read_text())
    assert len(record["suites"]["microvqa"]["questions"]) >= 9 and len(record["runs"]) == runs
    found = [run["suites"]["microvqa"] for run in record["runs"]]
    assert all(len(run["answers"]) >= 9 and run["cost"]["kept"] <= 256 for run in found)
    assert f"wrote {written}/report.html" in text and "</html>" in (written / "report.html").read_text()
    assert record["environment"]["transformers"] == transformers.__version__
    assert {"mmcompress", "python", "torch", "cpu", "threads", "command"} <= set(record["environment"])
    with Image.open(written / "overlay.png") as image:
        assert image.width > 3 * SIDE and image.height > 2 * SIDE
    assert len(DEMO_METHODS) + 1 == 6  # what the picture has room for


def test_demo_begins_anew_in_its_own_folder_alone(tmp_path: Path) -> None:
    own, other = tmp_path / "own", tmp_path / "other"
    demo = ("demo", "--limit", 1, "--out")
    succeed(*demo, own)
    before = (own / "answers-0.jsonl").read_text()
    (own / "answers-1.jsonl").write_text(before)
    succeed(*demo, own)
    assert not (own / "answers-1.jsonl").exists()
    assert (own / "answers-0.jsonl").read_text().count("\n") == before.count("\n")
    ask = ("eval", "--method", "todre", "--no-baselines", "--keep", 0.5, "--limit", 1, "--out")
    assert "command was demo, is eval" in fail(*ask, own)
    succeed(*ask, other)
    for name in ("conditions.json", "answers-0.jsonl"):
        kept = {path.name: path.read_bytes() for path in other.iterdir() if path.is_file()}
        assert "did not write: choose another --out" in fail(*demo, other)
        assert kept == {path.name: path.read_bytes() for path in other.iterdir() if path.is_file()}
        (other / name).unlink()
    succeed(*demo, other)


def test_doctor_finds_nothing() -> None:
    text = succeed("doctor")
    assert "all good" in text and transformers.__version__ in text and "sdpa" in text
    assert all(name in text for name in METHODS.names())


def test_limits_are_told_alike() -> None:
    for command in ("demo", "eval"):
        assert "Ask N questions of each suite, and the others about the same images." in succeed(command, "--help")


def test_doctor_names_what_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    version = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "5.0.0" if name == "transformers" else version(name))
    monkeypatch.setattr(cli.doctor, "_attention", lambda: 1 / 0)
    result = invoke("doctor")
    assert result.exit_code == 1
    assert "transformers 5.0.0: >=5.17 is required" in result.stderr
    assert "attention: division by zero" in result.stderr
    assert "all good" not in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("info", "todree"), "Did you mean 'todre'"),
        (("info", "todre(objectiv=max-sum)"), "Did you mean 'objective'"),
        (("info", "todre("), "cannot read"),
        (("info", "vtc-cls(first_layer=two)"), "must be int or None"),
        (("demo", "--limit", 0), "limit must be at least 1"),
        (("demo", "--out", PICTURE), "File exists"),
        (("doctor", "--model", "micro-llava"), "--model, --method and --kv go with --vllm"),
        (("doctor", "--method", "todre(keep=0.2)"), "go with --vllm"),
        (("doctor", "--kv", "snapkv(keep=8)"), "go with --vllm"),
        (("doctor", "--vllm", "--method", "todre(keep=0.2)"), "--method and --kv go with --vllm and --model"),
        (("doctor", "--vllm", "--kv", "snapkv(keep=8)"), "--method and --kv go with --vllm and --model"),
        (ask("--method", "nope", "--keep", 0.5), "unknown method 'nope'"),
        (ask("--method", "todre", "--keep", 1.5), "keep=1.5 is out of range"),
        (ask("--method", "todre", "--keep", 0), "keep=0 is no token count"),
        (ask("--method", "todre", "--keep", "nan"), "out of range"),
        (ask("--method", "todre", "--keep", "half"), "--keep 'half' is no number"),
        (ask("--method", "todre"), "Add --keep 0.25"),
        (ask("--method", "todre(keep=0.5)", "--keep", 0.5), "keep is given twice"),
        (ask("--method", "todre", "--keep", 0.5, "--positions", "random"), "Available: original, renumber"),
        (ask("--method", "vtc-cls(first_layer=9)", "--keep", 0.5), "layers 0..4"),
        (("show", PICTURE, "--method", "todre,nope", "--keep", 0.5), "unknown method 'nope'"),
        (("show", PICTURE, "--method", "todre", "--keep", 0.5, "--out", "x.doc"), "no picture format"),
        (("show", PICTURE, "--method", "todre", "--keep", 0.5, "--out", "no/x.png"), "folder no does not exist"),
        (("show", "none.png", "--method", "todre", "--keep", 0.5), "none.png does not exist"),
        (("show", MICROVQA_PATH, "--method", "todre", "--keep", 0.5), "cannot be read"),
    ],
)
def test_a_mistake_gets_one_clear_line(arguments: tuple[object, ...], message: str) -> None:
    stderr = fail(*arguments)
    assert message in stderr
    assert stderr.startswith("error: ") and stderr.count("\n") == 1


@pytest.mark.parametrize("content", [b"", b"not a picture", PICTURE.read_bytes()[:1000]])
def test_a_corrupt_image_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.png").write_bytes(content)
    picture = tmp_path / "bad.png"
    stderr = fail("run", "micro-llava", "--image", picture, "--question", "?", "--method", "todre", "--keep", 9)
    assert "bad.png cannot be read" in stderr


def test_a_folder_without_a_supported_model_is_named(tmp_path: Path) -> None:
    def refuse(model: Path) -> str:
        return fail("show", PICTURE, "--method", "todre", "--keep", 0.5, "--model", model)

    assert "does not exist" in refuse(tmp_path / "none")
    assert f"cannot load model '{tmp_path}'" in refuse(tmp_path)
    transformers.LlamaConfig().save_pretrained(tmp_path)
    assert "is of type 'llama'; supported families: internvl, llava" in refuse(tmp_path)
    for name in ("config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((model_path() / name).read_bytes())
    assert "cannot load model" in refuse(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((model_path() / "model.safetensors").read_bytes()[:1000])
    assert "cannot load model" in refuse(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((model_path() / "model.safetensors").read_bytes())
    assert "has no chat template" in refuse(tmp_path)


def test_a_model_folder_works_like_the_embedded_model(tmp_path: Path) -> None:
    out = tmp_path / "kept.png"
    succeed("show", PICTURE, "--method", "todre", "--keep", 0.5, "--model", model_path(), "--out", out)
    assert out.exists()


@pytest.mark.parametrize("arguments", [("frobnicate",), ("run", "micro-llava"), ("demo", "--threads", "0"), ("info",)])
def test_wrong_usage_points_to_the_help(arguments: tuple[str, ...]) -> None:
    assert "-h" in fail(*arguments)


def test_the_console_script_speaks_without_traceback() -> None:
    script = Path(sys.executable).with_name("mmcompress")
    result = subprocess.run([script, "info", "nope"], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("error: unknown method 'nope'")


def test_calibrate_writes_what_kvquant_reads(tmp_path: Path) -> None:
    path = tmp_path / "calibration.safetensors"
    assert "wrote" in succeed("calibrate", "micro-llava", "--limit", 1, "--bits", 2, "--out", path)
    policy = POLICIES.build("kvquant", {"calibration": str(path)})
    policy.require(layers=4, kv_heads=2, head_dim=64)
    with pytest.raises(SpecError, match="is for 4 layers"):
        policy.require(layers=5, kv_heads=2, head_dim=64)
    assert "folder" in fail("calibrate", "micro-llava", "--out", tmp_path / "nowhere" / "file")


def test_eval_compares_at_equal_tokens_per_layer(tmp_path: Path) -> None:
    methods = "fastv(layer=1),divprune(keep=0.5) + fastv(layer=1)"
    text = succeed("eval", "--method", methods, "--keep", "0.4,0.2", "--limit", 8, "--out", tmp_path)
    assert "left out fastv(layer=1) at 20%" in text
    record = json.loads((tmp_path / "results.json").read_text())
    runs = [(run["method"], run["keep"]) for run in record["runs"]]
    assert runs[:4] == [(None, 1.0), ("random", 0.4), ("uniform", 0.4), ("fastv(layer=1)", 0.4)]
    assert ("divprune(keep=0.5) + fastv(layer=1)", 0.2) in runs and ("fastv(layer=1)", 0.2) not in runs
    assert "left out: fastv(layer=1) at 20%" in (tmp_path / "table.md").read_text()
    assert "cannot leave 10.0%" in fail("eval", "--method", "fastv", "--keep", "0.1", "--limit", 8)
    assert "out of range" in fail("eval", "--method", "todre", "--keep", "1.5", "--limit", 8)
