"""The command `doctor`: whether the installation is sound."""

from __future__ import annotations

import platform
from collections.abc import Callable
from importlib import metadata
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import mmcompress
from mmcompress.cli._shared import complain, load_model
from mmcompress.errors import SpecError
from mmcompress.evals.micro import DEFAULT_MODEL, MODELS


def doctor(
    vllm: Annotated[bool, typer.Option("--vllm", help="Check the vLLM plugin instead.")] = False,
    model: Annotated[str | None, typer.Option(help="With --vllm: what would it do for this model?")] = None,
    method: Annotated[str | None, typer.Option(help="With --vllm and --model: by which method.")] = None,
    kv: Annotated[str | None, typer.Option(help="With --vllm and --model: by which KV policy.")] = None,
) -> None:
    """Check the installation: versions, devices, attention, methods; exit code 1 if something is broken.

    Try:

      mmcompress doctor
      mmcompress doctor --vllm --model llava-hf/llava-1.5-7b-hf --method "hired(keep=0.2)"
      mmcompress doctor --vllm --model llava-hf/llava-1.5-7b-hf --kv "streamingllm(keep=512)"
    """
    wanted = {name: value for name, value in (("method", method), ("kv", kv)) if value is not None}
    if not vllm and (model is not None or wanted):
        raise SpecError("--model, --method and --kv go with --vllm.")
    if model is None and wanted:
        raise SpecError("--method and --kv go with --vllm and --model: what they do depends on the model.")
    console = Console()
    problems: list[str] = []

    def check(what: str, look: Callable[[], str]) -> None:
        try:
            console.print(f"[bold]{what:<12}[/] {escape(look())}", highlight=False)
        except Exception as error:
            problems.append(f"{what}: {error or type(error).__name__}")
            console.print(f"[bold]{what:<12}[/] [red]broken[/]")

    if vllm:
        from mmcompress.integrations.vllm import doctor as engine

        check("vLLM", engine.installed)
        check("plugin", engine.plugin)
        if model is not None:
            folder = str(MODELS.get(model, model))
            check("model", lambda: engine.outlook(folder, wanted or {"method": "uniform(keep=0.25)"}))
    else:
        console.print(_versions(problems))
        check("devices", _devices)
        check("attention", _attention)
        check("methods", _self_test)
    for problem in problems:
        complain("broken", problem)
    if problems:
        raise typer.Exit(1)
    console.print("[green]all good[/]")


def _versions(problems: list[str]) -> Table:
    """Installed versions beside the supported range."""
    from packaging.requirements import Requirement

    required = {"python": Requirement(f"python{metadata.metadata('mmcompress')['Requires-Python']}").specifier}
    for line in metadata.requires("mmcompress") or ():
        requirement = Requirement(line)
        if requirement.marker is None:
            required[requirement.name] = requirement.specifier
    table = Table("package", "installed", "supported")
    table.add_row("mmcompress", mmcompress.__version__, "")
    optional = ("torchvision", "accelerate", "triton", "vllm", "flash-attn")
    for name in (*required, *optional):
        try:
            version = platform.python_version() if name == "python" else metadata.version(name)
        except metadata.PackageNotFoundError:
            version = ""
        allowed = required.get(name)
        if allowed is not None and (not version or not allowed.contains(version, prereleases=True)):
            problems.append(f"{name} {version or 'is missing'}: {allowed} is required")
        table.add_row(name, version or "not installed", str(allowed or ""))
    return table


def _devices() -> str:
    import torch

    from mmcompress.evals.environment import cpu_name

    found = [f"{cpu_name()}, {torch.get_num_threads()} threads"]
    found += [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return "; ".join(found)


def _attention() -> str:
    """The attention each part of the embedded model runs on while a method taps it."""
    from transformers.utils.import_utils import is_flash_attn_2_available

    model, _ = load_model(DEFAULT_MODEL)
    with mmcompress.wrap(model, "todre", keep=0.5) as handle:
        tapped = sorted({layer for layers in handle.needs.layers().values() for layer in layers})
        vision, text = (part._attn_implementation for part in (model.config.vision_config, model.config.text_config))
    flash = "installed" if is_flash_attn_2_available() else "not installed"
    return f"vision {vision} (todre reads layers {tapped} beside it), text {text}; FlashAttention {flash}"


def _self_test() -> str:
    """Answer one embedded question with every built-in method; those that need files and third-party ones just load."""
    from mmcompress.evals.micro import MICROVQA_PATH, load_microvqa
    from mmcompress.evals.runner import evaluate
    from mmcompress.registry import METHODS, MethodInfo

    for plugin in METHODS.plugins():
        METHODS.get(plugin)
    needed = {name: METHODS.get(name).info.requires for name in METHODS.names()}  # type: ignore[attr-defined]
    names = [name for name, options in needed.items() if name not in METHODS.plugins() and not options]
    model, processor = load_model(DEFAULT_MODEL)

    def budget(name: str) -> float | None:
        card: MethodInfo = METHODS.get(name).info  # type: ignore[attr-defined]
        share = 0.25 if card.stage == "projector" else 0.7  # halves of a tile's sides are always among the scales
        return share if card.takes_keep else None

    evaluate(model, processor, load_microvqa(1), MICROVQA_PATH, [(name, budget(name)) for name in names])
    others = "".join(f"; {name} needs {' or '.join(options)}" for name, options in needed.items() if options)
    return f"{', '.join(names)}: each answered a question with the embedded model{others}"
