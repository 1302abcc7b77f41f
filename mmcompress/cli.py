"""The command line. Everything heavy is imported by the command that needs it."""

from __future__ import annotations

import dataclasses
import inspect
import platform
import re
import typing
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.core import TyperGroup

import mmcompress
from mmcompress.errors import InputError, MMCompressError, SpecError, UnsupportedError
from mmcompress.evals.micro import DEFAULT_MODEL, MODELS

if typing.TYPE_CHECKING:
    from PIL.Image import Image

    from mmcompress.spec import CompressionConfig


class _Commands(TyperGroup):
    """Commands whose user errors become one red line and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise
        except (MMCompressError, OSError) as error:
            _complain("error", str(error))
            raise typer.Exit(2) from error
        except ImportError as error:
            _complain("error", f"{error}; mmcompress doctor says what is missing")
            raise typer.Exit(2) from error


def _complain(what: str, message: str) -> None:
    line = f"[bold red]{what}:[/] [red]{escape(' '.join(message.split()))}[/]"
    Console(stderr=True, soft_wrap=True).print(line, highlight=False)


app = typer.Typer(
    cls=_Commands,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

_KEEP_HELP = "What stays per image: a fraction such as 0.25, or a token count such as 36 (1 is one token, 1.0 all)."
_MODEL_HELP = f"A Hugging Face folder or hub name; '{DEFAULT_MODEL}' is the model inside the package."


def main() -> None:
    """Run the command line."""
    app(prog_name="mmcompress")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mmcompress {mmcompress.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Fewer visual tokens in the vision-language models you already run.

    [bold]See it work[/], offline and without a GPU:

      mmcompress demo

    [bold]Choose a method[/]:

      mmcompress list
      mmcompress info todre

    [bold]Try it[/] on a picture of yours:

      mmcompress show photo.jpg --method random,vtc-cls,todre --keep 0.1 --out kept.png
      mmcompress run llava-hf/llava-1.5-7b-hf --image photo.jpg --question "What is this?" --method todre --keep 0.25

    [bold]Check the installation[/]:

      mmcompress doctor
    """


@app.command("list")
def list_methods(
    matrix: Annotated[bool, typer.Option("--matrix", help="Say which method works on which model family.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Write the matrix as Markdown.")] = False,
) -> None:
    """List the methods and KV policies, or what each method can do on each model family.

    Try:

      mmcompress list
      mmcompress list --matrix
    """
    from mmcompress.registry import METHODS, POLICIES, Registry

    plugins = METHODS.plugins()
    if matrix or markdown:
        _quieten()
        from mmcompress.evals import capabilities
        from mmcompress.integrations.hf.capability import matrix as measure

        found = measure([name for name in METHODS.names() if name not in plugins])
        if markdown:
            typer.echo(capabilities.markdown(found), nl=False)
        else:
            table, reasons = capabilities.table(found)
            Console().print(table)
            Console().print(*reasons, sep="\n", highlight=False, markup=False)
        return

    def cards(registry: Registry) -> Table:
        table = Table(registry.kind, "class", "stage", "summary", "paper")
        for column in table.columns:
            column.overflow = "fold"
        for name in registry.names():
            if name in registry.plugins():
                # Third-party code is imported only when it is named.
                where = f"{registry.plugins()[name]}; see mmcompress info {name}"
                table.add_row(name, "third-party", "", where, "")
                continue
            card = registry.get(name).info  # type: ignore[attr-defined]
            table.add_row(name, card.family, card.stage, escape(card.summary), escape(card.paper))
        return table

    Console().print(cards(METHODS), cards(POLICIES))


@app.command()
def info(
    method: Annotated[str, typer.Argument(help="A name, or a spec with options.", metavar="METHOD")],
    kv: Annotated[bool, typer.Option("--kv", help="It is a KV policy, where a method has the same name.")] = False,
) -> None:
    """Show the card of a method or KV policy: options, source, and what a method needs of each model family.

    Try:

      mmcompress info todre
      mmcompress info "vtc-cls(score=received)"
      mmcompress info snapkv
    """
    from mmcompress.registry import METHODS, POLICIES
    from mmcompress.spec import Spec

    spec = Spec.parse(method)
    is_policy = kv or (spec.name in POLICIES.names() and spec.name not in METHODS.names())
    configured = (POLICIES if is_policy else METHODS).build(spec.name, spec.options)
    card = configured.info
    console = Console()
    console.print(f"[bold]{escape(str(spec))}[/]  {card.family}, stage {card.stage}\n{card.summary}\n")
    console.print(inspect.getdoc(type(configured)), markup=False, highlight=False)
    if not is_policy:
        console.print(
            f"\ncount    {'exactly the budget' if configured.exact_count else 'by a rule of its own, see above'}"
        )
    console.print(f"cite     {escape(card.paper) or 'nothing to cite'}", highlight=False)
    authors = f"; the authors' code: {card.licence}" if card.licence else ""
    console.print(f"licence  Apache-2.0, written from the paper{authors}\n" if card.paper else "licence  Apache-2.0\n")

    options = Table("option", "type", "default", "set to", title="options", title_justify="left")
    hints = typing.get_type_hints(type(configured))
    for option in dataclasses.fields(configured):
        kind = escape(inspect.formatannotation(hints[option.name]))
        options.add_row(option.name, kind, repr(option.default), repr(getattr(configured, option.name)))
    console.print(options if options.row_count else "no options")
    if is_policy:
        return

    families = Table("model family", "reads", title="on each model family, at its default size", title_justify="left")
    _quieten()
    from mmcompress.integrations.hf.capability import capability, models

    for family, model in models():
        found = capability(model, spec)
        no = f"[red]no:[/] {escape(found.reason)}"
        families.add_row(family, no if found.needs is None else _reads(found.needs, found.llm_needs))
    console.print(families)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Directory for the table, the picture and all answers.")] = Path("demo"),
    limit: Annotated[int | None, typer.Option(help="Ask only the first N questions.", metavar="N")] = None,
    threads: Annotated[int, typer.Option(help="CPU threads; more only help on idle cores.", min=1)] = 1,
    model: Annotated[str, typer.Option(help=f"An embedded model: {', '.join(MODELS)}.")] = DEFAULT_MODEL,
) -> None:
    """Compare five methods at four budgets on an embedded model, offline, in a few minutes.

    Try:

      mmcompress demo
      mmcompress demo --limit 100 --out /tmp/demo
    """
    _quieten()
    from mmcompress.evals.demo import demo as run_demo

    run_demo(out, limit, threads, Console(), model)


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(help=_MODEL_HELP, metavar="MODEL")] = DEFAULT_MODEL,
    method: Annotated[str, typer.Option(help="Methods or specs, separated by commas, or 'all'.")] = "all",
    keep: Annotated[
        str, typer.Option(help="Visual tokens per LLM layer: fractions or counts, separated by commas.")
    ] = "0.5,0.25,0.1,0.05",
    out: Annotated[Path, typer.Option(help="Directory for the table and all answers.")] = Path("eval"),
    limit: Annotated[int | None, typer.Option(help="Ask only the first N questions.", metavar="N")] = None,
    threads: Annotated[int, typer.Option(help="CPU threads; more only help on idle cores.", min=1)] = 1,
) -> None:
    """Compare methods at equal numbers of tokens per LLM layer on the embedded suite.

    A budget counts alike wherever tokens are removed: before the LLM it is what stays, inside the LLM the mean over
    its layers. Methods joined by + share the work: all but the last have a keep of their own. random and uniform are
    always asked too, and what a model or a budget does not allow is left out with the reason.

    Try:

      mmcompress eval --method todre,vtc-cls --keep 0.25,0.1 --limit 100
      mmcompress eval micro-llava --method "fastv(layer=1),divprune(keep=0.5) + transprune" --keep 0.4
      mmcompress eval micro-qwen2.5-vl --out /tmp/all
    """
    from mmcompress.spec import split_specs

    keeps = [typing.cast("int | float", _keep(part)) for part in keep.split(",")]
    asked = [part.strip() for part in split_specs(method)]
    loaded, processor = _load(model)

    import torch

    from mmcompress.evals import comparison
    from mmcompress.evals.micro import MICROVQA_PATH, load_microvqa
    from mmcompress.evals.micro.notes import UNLEARNT

    torch.set_num_threads(threads)
    questions = load_microvqa(limit, without=UNLEARNT.get(model, ()))
    every, refused = comparison.every_method(loaded) if "all" in asked else ([], {})
    wanted = list(dict.fromkeys([*comparison.BASELINES, *every, *(part for part in asked if part != "all")]))
    chosen = comparison.plan(loaded, wanted, keeps)
    impossible = {part for part in asked if part != "all"} - {run[0] for run in chosen.runs}
    if impossible:
        refusals = chosen.left_out.items()
        reasons = [f"{run}: {reason}" for run, reason in refusals if run.rpartition(" at ")[0] in impossible]
        raise SpecError("; ".join(reasons))
    out.mkdir(parents=True, exist_ok=True)
    console = Console()
    results = comparison.measure(loaded, processor, questions, MICROVQA_PATH, chosen.runs, console)
    comparison.write(out, results, questions, {**refused, **chosen.left_out}, console)


@app.command()
def run(
    model: Annotated[str, typer.Argument(help=_MODEL_HELP, metavar="MODEL")],
    image: Annotated[list[Path], typer.Option(help="A picture; may be given several times.")],
    question: Annotated[str, typer.Option(help="What to ask about it.")],
    method: Annotated[str, typer.Option(help="A method or spec, as in 'todre(objective=k-center)'.")],
    keep: Annotated[str | None, typer.Option(help=_KEEP_HELP)] = None,
    positions: Annotated[
        str | None, typer.Option(help="How kept tokens are numbered: renumber or original (default: by model).")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="The longest answer.", min=1)] = 64,
) -> None:
    """Ask a model one question with and without compression, and show what it saved.

    Try:

      mmcompress run micro-llava --image scene.png --question "what color is the star ?" --method todre --keep 0.1
      mmcompress run llava-hf/llava-1.5-7b-hf --image a.jpg --image b.jpg --question "What differs?" \
--method vtc-cls --keep 128
    """
    from mmcompress.evals.runner import UNPRUNED
    from mmcompress.spec import CompressionConfig

    config = _config(method, keep, positions)
    pictures = [_open(path) for path in image]
    loaded, processor = _load(model)
    inputs = _prompt(loaded, processor, pictures, question)
    unpruned = CompressionConfig.create(UNPRUNED[0], keep=UNPRUNED[1])
    console = Console()
    mmcompress.wrap(loaded, config).unwrap()  # whatever is impossible shows before the work begins
    columns = []
    for label, wanted in (("unpruned", unpruned), (str(config), config)):
        with mmcompress.wrap(loaded, wanted) as handle:
            loaded.generate(**inputs, max_new_tokens=1, do_sample=False)  # the first pass of each kind is slow
            output = loaded.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
            stats = handle.stats
        assert stats is not None  # there is at least one picture
        answer = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]
        console.print(f"[bold]{escape(label)}[/]\n{escape(answer.strip())}\n", highlight=False)
        columns.append(
            {
                "visual tokens": f"{stats.kept} of {stats.tokens}",
                "prefill GFLOP": f"{stats.prefill_flops / 1e9:.3g}",
                "KV cache MB": f"{stats.kv_bytes / 1e6:.3g}",
                **{f"{stage} ms": f"{1000 * seconds:.1f}" for stage, seconds in vars(stats.seconds).items()},
            }
        )
    table = Table("", "unpruned", escape(str(config)))
    for quantity in columns[0]:
        table.add_row(quantity, *(column[quantity] for column in columns))
    console.print(table)


@app.command()
def show(
    image: Annotated[Path, typer.Argument(help="A picture.", metavar="IMAGE")],
    method: Annotated[str, typer.Option(help="Methods or specs, separated by commas.")],
    keep: Annotated[str | None, typer.Option(help=_KEEP_HELP)] = None,
    out: Annotated[Path, typer.Option(help="The picture to write; its ending says the format.")] = Path("kept.png"),
    model: Annotated[str, typer.Option(help=_MODEL_HELP)] = DEFAULT_MODEL,
) -> None:
    """Draw the tokens that methods keep over a picture, side by side.

    Try:

      mmcompress show scene.png --method random,pool,todre --keep 0.1
      mmcompress show photo.jpg --method "vtc-cls,todre(objective=k-center)" --keep 128 --out kept.jpg \
--model llava-hf/llava-1.5-7b-hf
    """
    import torch
    from PIL import Image, ImageOps

    from mmcompress.evals.overlay import original, overlay, side_by_side
    from mmcompress.spec import split_specs

    configs = [_config(part, keep) for part in split_specs(method)]
    if not out.parent.is_dir():
        raise SpecError(f"--out {out}: the folder {out.parent} does not exist.")
    if Image.registered_extensions().get(out.suffix.lower()) not in ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"):
        raise SpecError(f"--out {out}: no picture format ends in {out.suffix!r}; use .png, .jpg or .webp.")
    picture = _open(image)
    loaded, processor = _load(model)
    crop = processor.image_processor
    if loaded.config.model_type == "llava" and getattr(crop, "do_center_crop", False):
        # This family sees no more than the centre; others see all of the picture.
        picture = ImageOps.fit(picture, (crop.crop_size["width"], crop.crop_size["height"]))
    inputs = _prompt(loaded, processor, [picture], "What is in the picture ?")
    panels = [original(picture)]
    for config in configs:
        with mmcompress.wrap(loaded, config) as handle, torch.inference_mode():
            loaded(**inputs)
            traces = handle.trace
        if len(traces) != 1:
            raise UnsupportedError(f"{type(loaded).__name__} makes {len(traces)} items of a picture; one can be drawn.")
        label = str(dataclasses.replace(config.methods[0], keep=None))
        panels.append(overlay(picture, traces[0].grids, traces[0].selection, label))
    side_by_side(panels).save(out)
    Console().print(f"wrote {out}", highlight=False)


@app.command()
def doctor() -> None:
    """Check the installation: versions, devices, attention, methods; exit code 1 if something is broken.

    Try: mmcompress doctor
    """
    console = Console()
    problems: list[str] = []

    def check(what: str, look: Callable[[], str]) -> None:
        try:
            console.print(f"[bold]{what:<12}[/] {escape(look())}", highlight=False)
        except Exception as error:
            problems.append(f"{what}: {error or type(error).__name__}")
            console.print(f"[bold]{what:<12}[/] [red]broken[/]")

    console.print(_versions(problems))
    check("devices", _devices)
    check("attention", _attention)
    check("methods", _self_test)
    for problem in problems:
        _complain("broken", problem)
    if problems:
        raise typer.Exit(1)
    console.print("[green]all good[/]")


def _keep(text: str | None) -> int | float | None:
    """The budget as written: digits alone are a count, everything else must be a fraction."""
    if text is None:
        return None
    try:
        return int(text) if re.fullmatch(r"[+-]?\d+", text.strip()) else float(text)
    except ValueError:
        raise SpecError(f"--keep {text!r} is no number: write a fraction such as 0.25 or a count such as 36.") from None


def _config(method: str, keep: str | None, positions: str | None = None) -> CompressionConfig:
    """What is asked for, checked as far as it can be before a model is loaded."""
    from mmcompress.registry import METHODS
    from mmcompress.spec import CompressionConfig

    config = CompressionConfig.create(method, keep=_keep(keep), positions=typing.cast(Any, positions))
    spec = config.methods[0]
    METHODS.build(spec.name, spec.options)
    if spec.keep is None:
        raise SpecError(f"how much of the image should {spec.name} keep? Add --keep 0.25 or --keep 36.")
    return config


def _open(path: Path) -> Image:
    from mmcompress.evals.runner import open_image

    return open_image(path)


def _quieten() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _load(name: str) -> tuple[Any, Any]:
    """A supported model and its processor, on the GPU if there is one.

    Raises:
        UnsupportedError: it cannot be loaded, or its family is not supported.
    """
    _quieten()
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    from mmcompress.integrations.hf.families import FAMILIES

    if name in MODELS:
        from mmcompress.evals.demo import load_micro

        return load_micro(name)
    if name.startswith((".", "/", "~")) and not Path(name).is_dir():
        raise UnsupportedError(f"model folder {name} does not exist.")
    try:
        kind = AutoConfig.from_pretrained(name).model_type
        if kind in FAMILIES:
            model = AutoModelForImageTextToText.from_pretrained(name, dtype="auto").eval()
            processor = AutoProcessor.from_pretrained(name)
            return model.to("cuda" if torch.cuda.is_available() else "cpu"), processor
    except Exception as error:  # there are as many ways as there are broken folders
        raise UnsupportedError(f"cannot load model {name!r}: {' '.join(str(error).split())}") from error
    raise UnsupportedError(f"model {name!r} is of type {kind!r}; supported families: {', '.join(sorted(FAMILIES))}.")


def _prompt(model: Any, processor: Any, pictures: list[Image], question: str) -> Any:
    """The model's inputs for one question about `pictures`, in its own chat format."""
    if not processor.chat_template:
        raise UnsupportedError("the model's processor has no chat template, so its prompt format is not known.")
    content = [*({"type": "image", "image": picture} for picture in pictures), {"type": "text", "text": question}]
    try:
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
    except ValueError as error:  # a question with an image placeholder in it, for one
        raise InputError(f"the model's processor cannot encode this question: {error}") from error
    return inputs.to(model.device, model.dtype)


def _reads(needs: Any, llm_needs: Any) -> str:
    """What a method reads of a model, in words."""

    def layered(name: str, layers: typing.Sequence[int]) -> str:
        return f"{name} of layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}"

    reads = [layered(name, layers) for name, layers in needs.layers().items()]
    reads += [name for name in ("features", "text", "text_tower", "embeddings") if getattr(needs, name)]
    if llm_needs is not None:
        inside = {
            "queries and keys of the layer before": llm_needs.previous,
            "queries and keys of the layer to come": llm_needs.upcoming,
            "input embeddings": llm_needs.inputs,
            "normed states": llm_needs.normed,
            "rotary embeddings": llm_needs.rotary,
        }
        reads += [f"LLM {name}" for name, read in inside.items() if read]
        reads += [layered("LLM transitions", llm_needs.transitions)] if llm_needs.transitions else []
    return "; ".join(reads) or "nothing"


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

    model, _ = _load(DEFAULT_MODEL)
    with mmcompress.wrap(model, "todre", keep=0.5) as handle:
        tapped = sorted({layer for layers in handle.needs.layers().values() for layer in layers})
        vision, text = (part._attn_implementation for part in (model.config.vision_config, model.config.text_config))
    flash = "installed" if is_flash_attn_2_available() else "not installed"
    return f"vision {vision} (todre reads layers {tapped} beside it), text {text}; FlashAttention {flash}"


def _self_test() -> str:
    """Answer one embedded question with every built-in method; those that need files and third-party ones just load."""
    from mmcompress.evals.micro import MICROVQA_PATH, load_microvqa
    from mmcompress.evals.runner import evaluate
    from mmcompress.registry import METHODS

    for plugin in METHODS.plugins():
        METHODS.get(plugin)
    needed = {name: METHODS.get(name).info.requires for name in METHODS.names()}  # type: ignore[attr-defined]
    names = [name for name, options in needed.items() if name not in METHODS.plugins() and not options]
    model, processor = _load(DEFAULT_MODEL)

    def budget(name: str) -> float | None:
        return 0.7 if METHODS.get(name).info.takes_keep else None  # type: ignore[attr-defined]

    evaluate(model, processor, load_microvqa(1), MICROVQA_PATH, [(name, budget(name)) for name in names])
    others = "".join(f"; {name} needs {' or '.join(options)}" for name, options in needed.items() if options)
    return f"{', '.join(names)}: each answered a question with the embedded model{others}"


if __name__ == "__main__":
    main()
