"""The shape of the repository: what imports what, what ships, what the linters catch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import mmcompress

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
CONTRACTS = {contract["name"]: contract for contract in PYPROJECT["tool"]["importlinter"]["contracts"]}
OPS = sorted(f"mmcompress.kernels.{path.parent.name}" for path in (ROOT / "kernels").glob("*/__init__.py"))
LINKS = ("kernels", "integrations", "evals")
FACADES = {"mmcompress.__init__", "mmcompress.cli"}


Completed = subprocess.CompletedProcess[str]


def run(*command: str | Path, cwd: Path, path: Path | None = None, check: bool = True) -> Completed:
    """Run a command, with `path` as the PYTHONPATH."""
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    environment.pop("PYTHONPATH", None)
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def python(script: str, cwd: Path, path: Path | None = None, *flags: str) -> str:
    """What `script` prints."""
    return run(sys.executable, *flags, "-c", script, cwd=cwd, path=path).stdout.strip()


def copy_tree(target: Path, *extra: str) -> Path:
    """A checkout in `target`, without what building or running left behind."""
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("mmcompress", *LINKS, *extra):
        shutil.copytree(ROOT / name, target / name, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target / name)
    return target


# --- layout


def test_the_real_folders_are_linked_into_the_package() -> None:
    for name in LINKS:
        link = ROOT / "mmcompress" / name
        assert link.is_symlink() and os.readlink(link) == f"../{name}"


def test_the_top_level_kernels_folder_is_no_package() -> None:
    # transformers looks for a distribution called `kernels`; a package here would be taken for it.
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert OPS


def test_transformers_works_in_the_checkout() -> None:
    script = """
import sys
from transformers import LlavaForConditionalGeneration
kernels = sys.modules.get("kernels")
print(LlavaForConditionalGeneration.__name__, getattr(kernels, "__file__", None))
"""
    name, file = python(script, ROOT).split(maxsplit=1)
    assert name == "LlavaForConditionalGeneration"
    assert file == "None" or not Path(file).is_relative_to(ROOT)


def test_importing_the_package_imports_no_engine() -> None:
    script = "import sys, mmcompress; print({'torch', 'transformers', 'vllm', 'numpy'} & set(sys.modules))"
    assert python(script, ROOT) == "set()"


def test_the_package_offers_what_it_lists() -> None:
    assert {"wrap", "Handle", "CompressionConfig", "register", "METHODS", "SpecError"} <= set(mmcompress.__all__)
    for name in mmcompress.__all__:
        assert getattr(mmcompress, name) is not None
    with pytest.raises(AttributeError, match="module 'mmcompress' has no attribute 'warp'"):
        _ = mmcompress.warp


def test_the_package_runs_from_a_checkout(tmp_path: Path) -> None:
    script = """
import mmcompress.kernels.attention_rows.naive, mmcompress.integrations, mmcompress.evals
from mmcompress import methods, ops
print(mmcompress.__file__, mmcompress.evals.__file__)
"""
    package = ROOT / "mmcompress"
    assert python(script, tmp_path, ROOT) == f"{package / '__init__.py'} {package / 'evals' / '__init__.py'}"


# --- the wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    source = copy_tree(tmp_path_factory.mktemp("checkout"), "tests")
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, source, cwd=out)
    (built,) = out.glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        yield archive


def test_the_wheel_holds_every_source_and_all_data(wheel: zipfile.ZipFile) -> None:
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    expected = {"mmcompress/py.typed"}
    data = set()
    for folder in ("mmcompress", *(f"mmcompress/{name}" for name in LINKS)):
        sources = (path for path in (ROOT / folder).rglob("*.py") if "__pycache__" not in path.parts)
        expected |= {str(path.relative_to(ROOT)) for path in sources}
    for pattern in ("models/micro-llava/*", "microvqa/*", "microvqa/images/*"):
        files = (path for path in (ROOT / "evals/micro").glob(pattern) if path.is_file())
        data |= {f"mmcompress/{path.relative_to(ROOT)}" for path in files}
    assert names == expected | data
    micro = "mmcompress/evals/micro"
    assert {f"{micro}/models/micro-llava/model.safetensors", f"{micro}/microvqa/questions.jsonl"} < data
    assert all(wheel.read(name) == (ROOT / name).read_bytes() for name in data)


def test_the_wheel_holds_nothing_else(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0].split("-")[0] for name in wheel.namelist()}
    assert tops == {"mmcompress"}
    assert not [name for name in wheel.namelist() if "test" in name or "golden" in name or name.endswith(".pyc")]


def test_the_wheel_works_alone(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path / "site")
    script = """
import mmcompress.kernels.greedy_select.naive, mmcompress.integrations
from mmcompress import METHODS
from mmcompress.evals.micro import load_microvqa
print(mmcompress.__file__, [METHODS.get(name).__name__ for name in METHODS.names()])
print(len(load_microvqa()))
"""
    first, second = python(script, tmp_path, tmp_path / "site").splitlines()
    assert first.startswith(str(tmp_path / "site")) and "VTCCLS" in first
    assert int(second) > 0


# --- linters


@pytest.mark.parametrize("module", LINKS)
@pytest.mark.parametrize("form", ["import {}", "from {} import something", "import {}.something as other"])
def test_ruff_bans_the_second_name_of_a_module(module: str, form: str) -> None:
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format", "concise", "--stdin-filename"]
    for file in ("mmcompress/planted.py", "tests/planted.py"):
        done = subprocess.run(
            [*command, file, "-"], input=form.format(module) + "\n", cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 1
        assert f"TID251 `{module}" in done.stdout
        assert f"import mmcompress.{module}" in done.stdout


def lint_imports(folder: Path) -> tuple[bool, str]:
    """Whether import-linter passes, and what it says."""
    done = run(Path(sys.executable).parent / "lint-imports", "--no-cache", cwd=folder, path=folder, check=False)
    return done.returncode == 0, done.stdout + done.stderr


def test_imports_point_down() -> None:
    passed, output = lint_imports(ROOT)
    assert passed, output
    for name in CONTRACTS:
        assert f"{name} KEPT" in output


@pytest.mark.parametrize(
    ("file", "planted", "contract"),
    [
        ("mmcompress/methods/uniform.py", "import transformers", "Methods and the core know no engine"),
        ("mmcompress/spec.py", "import mmcompress.evals", "Methods and the core know no engine"),
        ("kernels/greedy_select/reference.py", "import transformers", "Kernels know nothing above them"),
        ("kernels/attention_rows/naive.py", "from mmcompress import ops", "Kernels know nothing above them"),
        ("integrations/hf/taps.py", "import mmcompress.evals", "Engines do not know evals"),
        (
            "mmcompress/methods/todre.py",
            "from mmcompress.kernels.greedy_select import naive",
            "Only ops opens the door to the kernels",
        ),
        (
            "integrations/hf/vision.py",
            "import mmcompress.kernels.attention_rows.reference",
            "Only ops opens the door to the kernels",
        ),
    ],
)
def test_a_planted_import_breaks_its_contract(tmp_path: Path, file: str, planted: str, contract: str) -> None:
    source = copy_tree(tmp_path) / file
    source.write_text(source.read_text() + f"\n{planted}\n")
    passed, output = lint_imports(tmp_path)
    assert not passed
    assert f"{contract} BROKEN" in output


def test_every_kernel_is_under_contract() -> None:
    linter = PYPROJECT["tool"]["importlinter"]
    assert sorted(linter["root_packages"]) == sorted(["mmcompress", *OPS])
    assert sorted(CONTRACTS["Kernels know nothing above them"]["source_modules"]) == OPS
    assert sorted(CONTRACTS["Only ops opens the door to the kernels"]["forbidden_modules"]) == OPS


def test_every_module_of_the_core_is_under_contract() -> None:
    files = {f"mmcompress.{path.stem}" for path in (ROOT / "mmcompress").glob("*.py")}
    folders = {
        f"mmcompress.{path.name}"
        for path in (ROOT / "mmcompress").iterdir()
        if path.is_dir() and not path.is_symlink() and (path / "__init__.py").exists()
    }
    assert set(CONTRACTS["Methods and the core know no engine"]["source_modules"]) == (files | folders) - FACADES
