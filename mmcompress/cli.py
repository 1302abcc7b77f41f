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
from mmcompress.errors import InputError, MMCompressError, SpecError, UnsupportedError, unknown_name
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

train_app = typer.Typer(no_args_is_help=True, help="Train a model for fewer visual tokens.")
app.add_typer(train_app, name="train")

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

        found = capabilities.measure([name for name in METHODS.names() if name not in plugins])
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
    suite: Annotated[
        str, typer.Option(help="Suites, separated by commas; mmcompress suites lists them.", metavar="SUITE,...")
    ] = "microvqa",
    method: Annotated[str, typer.Option(help="Methods or specs, separated by commas, or 'all'.")] = "all",
    keep: Annotated[
        str, typer.Option(help="Visual tokens per LLM layer: fractions or counts, separated by commas.")
    ] = "0.5,0.25,0.1,0.05",
    kv: Annotated[
        str | None,
        typer.Option(help="KV policies, separated by commas or joined by +; all else is asked without and with each."),
    ] = None,
    baselines: Annotated[bool, typer.Option(help="Ask with random and uniform tokens too.")] = True,
    data: Annotated[Path, typer.Option(help="Folder with a folder for every suite.")] = Path("data"),
    out: Annotated[Path, typer.Option(help="Directory for tables and answers; with answers in it, go on.")] = Path(
        "eval"
    ),
    limit: Annotated[
        int | None,
        typer.Option(help="Ask N questions of each suite, and the others about the same images.", metavar="N"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Draws the questions of --limit and resamples images.")] = 0,
    batch_size: Annotated[
        int | None, typer.Option(help="Questions asked at once; 64 of embedded models, 8 of others.", min=1)
    ] = None,
    threads: Annotated[int, typer.Option(help="CPU threads; more only help on idle cores.", min=1)] = 1,
) -> None:
    """Compare methods at equal numbers of tokens per LLM layer on benchmarks.

    A budget counts alike wherever tokens are removed: before the LLM it is what stays, inside the LLM the mean over
    its layers. Methods joined by + share the work: all but the last have a keep of their own. The unpruned model is
    always asked too, and so are random and uniform, unless --no-baselines. What a model or a budget does not allow is
    left out with the reason. A command that was stopped goes on where it was when it is given again.

    Try:

      mmcompress eval --method todre,vtc-cls --keep 0.25,0.1 --limit 100
      mmcompress eval micro-llava --method "fastv(layer=1),divprune(keep=0.5) + transprune" --keep 0.4
      mmcompress eval llava-hf/llava-1.5-7b-hf --suite gqa,pope --data /data --method todre --kv "snapkv(keep=64)"
      accelerate launch --num_processes 2 -m mmcompress.cli eval MODEL --suite textvqa
    """
    from mmcompress.evals import suites
    from mmcompress.evals.micro.notes import UNLEARNT
    from mmcompress.spec import split_specs

    keeps = [typing.cast("int | float", _keep(part)) for part in keep.split(",")]
    asked = [part.strip() for part in split_specs(method)]
    policies = [part.strip() for part in split_specs(kv)] if kv else []
    labels = list(dict.fromkeys(part.strip() for part in split_specs(suite)))
    unlearnt = UNLEARNT.get(model, frozenset())
    wanted_suites = [suites.configure(label, data, unlearnt=unlearnt) for label in labels]

    from mmcompress.evals import comparison
    from mmcompress.evals.processes import processes

    terms = comparison.Terms(model, seed, limit, batch_size or (64 if model in MODELS else 8), processes())
    read = [comparison.read(label, wanted, terms) for label, wanted in zip(labels, wanted_suites, strict=True)]
    loaded, processor = _load(model, terms.processes.device)

    import torch

    torch.set_num_threads(threads)
    every, refused = comparison.every_method(loaded) if "all" in asked else ([], {})
    controls = comparison.BASELINES if baselines else ()
    every = [name for name in every if baselines or name not in comparison.BASELINES]
    wanted = list(dict.fromkeys([*controls, *every, *(part for part in asked if part != "all")]))
    chosen = comparison.plan(loaded, wanted, keeps, policies)
    impossible = {part for part in asked if part != "all"} - {run.method for run in chosen.runs}
    impossible |= set(policies) - {run.kv for run in chosen.runs}
    if impossible:
        reasons = [f"{run}: {why}" for run, why in chosen.left_out.items() if any(part in run for part in impossible)]
        raise SpecError("; ".join(reasons))
    chosen = comparison.Comparison(chosen.runs, {**refused, **chosen.left_out})
    console = Console()
    try:
        comparison.compare(loaded, processor, read, chosen, terms, out, console)
    except KeyboardInterrupt:
        console.print(f"stopped: all answers so far are in {escape(str(out))}, and the same command goes on from there")
        raise typer.Exit(130) from None


@app.command()
def calibrate(
    model: Annotated[str, typer.Argument(help=_MODEL_HELP, metavar="MODEL")],
    out: Annotated[Path, typer.Option(help="The safetensors file to write.", metavar="FILE")],
    suite: Annotated[
        str, typer.Option(help="What is read: a suite, or 'jsonl(folder=...)' for your own; see mmcompress suites.")
    ] = "microvqa",
    data: Annotated[Path, typer.Option(help="Folder with a folder for every suite.")] = Path("data"),
    limit: Annotated[
        int, typer.Option(help="Read N questions, and the others about the same images.", metavar="N", min=1)
    ] = 16,
    bits: Annotated[int, typer.Option(help="Of a key or value: 2, 3 or 4.")] = 4,
    outliers: Annotated[float, typer.Option(help="Share of keys and values that are held as they are.")] = 0.01,
    seed: Annotated[int, typer.Option(help="Draws the questions, and the centroids that are tried first.")] = 0,
) -> None:
    """Calibrate the KV policy kvquant for a model.

    The model reads questions about pictures with their answers, and the file says, for every layer, which keys are
    outliers and which few numbers the others become: those with the least error where an error matters most to what
    the model predicts. It belongs to this model only. A few thousand tokens are enough, about 16 pictures; all keys
    and values of them, and their gradients, are held in memory meanwhile.

    Try:

      mmcompress calibrate micro-llava --out micro.safetensors
      mmcompress calibrate llava-hf/llava-1.5-7b-hf --suite gqa --data /data --bits 3 --out llava.safetensors
      mmcompress calibrate MODEL --suite "jsonl(folder=/data/mine)" --out mine.safetensors

    Then: mmcompress.wrap(model, kv="kvquant(calibration=mine.safetensors)")
    """
    from rich.progress import track

    from mmcompress.evals import suites
    from mmcompress.evals.suites.base import draw

    if not out.parent.is_dir():
        raise SpecError(f"--out {out}: the folder {out.parent} does not exist.")
    questions, _ = suites.configure(suite, data).read()
    loaded, processor = _load(model)
    from mmcompress.evals.calibrate import calibrate as run_calibrate

    run_calibrate(loaded, processor, draw(questions, limit, seed), out, bits, outliers, seed=seed, track=track)
    Console().print(f"wrote {out}", highlight=False)


@app.command("suites")
def list_suites(
    data: Annotated[Path, typer.Option(help="Folder with a folder for every suite.")] = Path("data"),
) -> None:
    """List the benchmarks, the files each needs and where to put them; nothing is downloaded.

    Try:

      mmcompress suites
      mmcompress suites --data /data
    """
    from mmcompress.evals.suites import SUITES, configure

    console = Console(highlight=False, soft_wrap=True)
    for name, suite in SUITES.items():
        wanted = configure(name, data)
        console.print(f"[bold]{name}[/]  {suite.scorer.metric}; prompts: {', '.join(suite.prompts)}")
        console.print(f"  {suite.summary}", markup=False)
        console.print(f"  invalid answers: {suite.scorer.invalid}", markup=False)
        for names in suite.files:
            state = "[green]there[/]  " if wanted.found(names) else "[red]missing[/]"
            console.print(f"  {state}  {escape(f'{wanted.folder}/{names}')}")


@app.command("report")
def write_report(
    runs: Annotated[list[Path], typer.Argument(help="Folders that mmcompress eval wrote.", metavar="RUNS...")],
    out: Annotated[
        Path, typer.Option(help="The file to write: .html for a page, .md for tables, .csv for all numbers.")
    ] = Path("report.html"),
) -> None:
    """Write one page, Markdown tables or a CSV about evaluations; a page needs no network.

    Try:

      mmcompress report eval --out report.html
      mmcompress report runs/llava runs/qwen --out both.csv
    """
    from mmcompress.evals import report, report_html
    from mmcompress.evals.record import load

    made = {
        ".html": lambda: report_html.page(runs),
        ".md": lambda: "\n".join(f"# {result['model']}\n\n{report.markdown(result)}" for result in map(load, runs)),
        ".csv": lambda: report.as_csv([load(path) for path in runs]),
    }
    if out.suffix not in made:
        raise SpecError(f"--out {out}: a report ends in {', '.join(made)}.")
    out.write_text(made[out.suffix](), encoding="utf-8")
    Console().print(f"wrote {out}", highlight=False)


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
    from PIL import Image

    from mmcompress.evals.overlay import original, overlay, side_by_side
    from mmcompress.evals.samples import as_seen
    from mmcompress.spec import split_specs

    configs = [_config(part, keep) for part in split_specs(method)]
    if not out.parent.is_dir():
        raise SpecError(f"--out {out}: the folder {out.parent} does not exist.")
    if Image.registered_extensions().get(out.suffix.lower()) not in ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"):
        raise SpecError(f"--out {out}: no picture format ends in {out.suffix!r}; use .png, .jpg or .webp.")
    picture = _open(image)
    loaded, processor = _load(model)
    picture = as_seen(loaded, processor, picture)
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


@train_app.command()
def matryoshka(
    model: Annotated[str, typer.Option(help=_MODEL_HELP)],
    budgets: Annotated[str, typer.Option(help="Visual tokens per tile to train, separated by commas.")],
    data: Annotated[Path, typer.Option(help="Folder of the questions.")],
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint, the log and the model.")],
    suite: Annotated[str, typer.Option(help="What the questions are written as; see mmcompress suites.")] = "jsonl",
    steps: Annotated[int, typer.Option(help="Optimiser steps.", min=1)] = 1000,
    batch: Annotated[int, typer.Option(help="Questions per step and process.", min=1)] = 8,
    learning_rate: Annotated[float, typer.Option(help="Of the projector, the tower and a full LLM.", min=0)] = 2e-5,
    llm: Annotated[str, typer.Option(help="What is trained of the LLM: full, lora or frozen.")] = "full",
    tower: Annotated[bool, typer.Option(help="Train the vision tower too.")] = False,
    seed: Annotated[int, typer.Option(help="Of the order of questions and budgets.")] = 0,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.", min=1)] = 200,
    workers: Annotated[int, typer.Option(help="Processes that read images ahead.", min=0)] = 0,
) -> None:
    """Teach a LLaVA to answer from nested numbers of visual tokens; run again with the same folder to go on.

    Every step draws one of the budgets. For several processes, start it with accelerate launch -m mmcompress.cli.

    Try:

      mmcompress train matryoshka --model micro-llava --budgets 64,16,4,1 --data questions --out micro-m3 \
--suite "jsonl(prompt=plain)"
    """
    from rich.progress import Progress

    from mmcompress.evals.matryoshka import Recipe, Trainer
    from mmcompress.evals.suites import configure

    try:
        scales = tuple(sorted(int(part) for part in budgets.split(",")))
    except ValueError:
        raise SpecError(f"--budgets {budgets!r}: write token counts separated by commas, as in 144,36,9,1.") from None
    if llm not in ("full", "lora", "frozen"):
        raise unknown_name("--llm", llm, ("full", "lora", "frozen"))
    recipe = Recipe(scales, steps, batch, learning_rate, llm=typing.cast(Any, llm), tower=tower, seed=seed)
    questions = dataclasses.replace(configure(suite, data), folder=data)
    loaded, processor = _load(model, "cpu")
    console = Console()
    trainer = Trainer(loaded, processor, questions, recipe, out)
    with Progress(console=console, disable=not trainer.leads) as progress:
        task = progress.add_task("training", total=steps, completed=trainer.step)

        def report(row: dict[str, Any]) -> None:
            progress.update(task, completed=row["step"], description=f"{row['budget']} tokens, loss {row['loss']:.3f}")

        trainer.run(report, save_every, workers)
    if trainer.leads:
        console.print(f"wrote {out}", highlight=False)


@app.command()
def doctor(
    vllm: Annotated[bool, typer.Option("--vllm", help="Check the vLLM plugin instead.")] = False,
    model: Annotated[str | None, typer.Option(help="With --vllm: what would it do for this model?")] = None,
    method: Annotated[str, typer.Option(help="With --vllm and --model: by which method.")] = "uniform(keep=0.25)",
) -> None:
    """Check the installation: versions, devices, attention, methods; exit code 1 if something is broken.

    Try:

      mmcompress doctor
      mmcompress doctor --vllm --model llava-hf/llava-1.5-7b-hf --method "hired(keep=0.2)"
    """
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
            check("model", lambda: engine.outlook(folder, {"method": method}))
    else:
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


def _load(name: str, device: str | None = None) -> tuple[Any, Any]:
    """A supported model and its processor, on `device` or else on the GPU if there is one.

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
            return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")), processor
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
    reads += [name for name in ("features", "text", "text_tower", "draft", "embeddings") if getattr(needs, name)]
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
    from mmcompress.registry import METHODS, MethodInfo

    for plugin in METHODS.plugins():
        METHODS.get(plugin)
    needed = {name: METHODS.get(name).info.requires for name in METHODS.names()}  # type: ignore[attr-defined]
    names = [name for name, options in needed.items() if name not in METHODS.plugins() and not options]
    model, processor = _load(DEFAULT_MODEL)

    def budget(name: str) -> float | None:
        card: MethodInfo = METHODS.get(name).info  # type: ignore[attr-defined]
        share = 0.25 if card.stage == "projector" else 0.7  # halves of a tile's sides are always among the scales
        return share if card.takes_keep else None

    evaluate(model, processor, load_microvqa(1), MICROVQA_PATH, [(name, budget(name)) for name in names])
    others = "".join(f"; {name} needs {' or '.join(options)}" for name, options in needed.items() if options)
    return f"{', '.join(names)}: each answered a question with the embedded model{others}"


if __name__ == "__main__":
    main()
