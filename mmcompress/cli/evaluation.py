"""The commands `demo`, `eval`, `suites` and `report`: methods compared on questions."""

from __future__ import annotations

import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from mmcompress.cli._shared import MODEL_HELP, load_model, parse_keep, quieten
from mmcompress.errors import SpecError, unknown_name
from mmcompress.evals.micro import DEFAULT_MODEL, MODELS

if typing.TYPE_CHECKING:
    from mmcompress.evals.backends import Backend
    from mmcompress.evals.comparison import Readable

BACKENDS = ("hf", "vllm", "lmms")
LIMIT_HELP = "Ask N questions of each suite, and the others about the same images."


def demo(
    out: Annotated[Path, typer.Option(help="Directory for the table, the picture and all answers.")] = Path("demo"),
    limit: Annotated[int | None, typer.Option(help=LIMIT_HELP, metavar="N")] = None,
    threads: Annotated[int, typer.Option(help="CPU threads; more only help on idle cores.", min=1)] = 1,
    model: Annotated[str, typer.Option(help=f"An embedded model: {', '.join(MODELS)}.")] = DEFAULT_MODEL,
) -> None:
    """Compare five methods at four budgets on an embedded model, offline, in a few minutes.

    Try:

      mmcompress demo
      mmcompress demo --limit 100 --out /tmp/demo
    """
    quieten()
    from mmcompress.evals.demo import demo as run_demo

    run_demo(out, limit, threads, Console(), model)


def evaluate(
    model: Annotated[str, typer.Argument(help=MODEL_HELP, metavar="MODEL")] = DEFAULT_MODEL,
    suite: Annotated[
        str,
        typer.Option(
            help="Suites, separated by commas; mmcompress suites lists them. With --backend lmms tasks of lmms-eval.",
            metavar="SUITE,...",
        ),
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
    data: Annotated[
        Path, typer.Option(help="Folder with a folder for every suite; with lmms, one with tasks of your own.")
    ] = Path("data"),
    out: Annotated[Path, typer.Option(help="Directory for tables and answers; with answers in it, go on.")] = Path(
        "eval"
    ),
    limit: Annotated[int | None, typer.Option(help=LIMIT_HELP, metavar="N")] = None,
    seed: Annotated[int, typer.Option(help="Draws the questions of --limit and resamples images.")] = 0,
    batch_size: Annotated[
        int | None, typer.Option(help="Questions asked at once; 64 of embedded models, 8 of others.", min=1)
    ] = None,
    threads: Annotated[int, typer.Option(help="CPU threads; more only help on idle cores.", min=1)] = 1,
    backend: Annotated[
        str,
        typer.Option(
            help="What answers: hf, which is transformers, vllm, or lmms, transformers to tasks of lmms-eval."
        ),
    ] = "hf",
    engine: Annotated[
        str | None,
        typer.Option(help="With vllm, arguments of its LLM as JSON, such as tensor_parallel_size.", metavar="JSON"),
    ] = None,
) -> None:
    """Compare methods at equal numbers of tokens per LLM layer on benchmarks.

    A budget counts alike wherever tokens are removed: before the LLM it is what stays, inside the LLM the mean over
    its layers. Methods joined by + share the work: all but the last have a keep of their own. The unpruned model is
    always asked too, and so are random and uniform, unless --no-baselines. What a model or a budget does not allow is
    left out with the reason. A command that was stopped goes on where it was when it is given again. vLLM gets an
    engine for every method and budget, one after another; its time is booked as one, under prefill. Tasks of lmms-eval
    have its prompts, settings and scores; it downloads what the environment allows and its cache lacks.

    Try:

      mmcompress eval --method todre,vtc-cls --keep 0.25,0.1 --limit 100
      mmcompress eval micro-llava --method "fastv(layer=1),divprune(keep=0.5) + transprune" --keep 0.4
      mmcompress eval llava-hf/llava-1.5-7b-hf --suite gqa,pope --data /data --method todre --kv "snapkv(keep=64)"
      accelerate launch --num_processes 2 -m mmcompress.cli eval MODEL --suite textvqa
      mmcompress eval MODEL --suite gqa --method divprune --backend vllm --engine '{"tensor_parallel_size": 2}'
      mmcompress eval MODEL --suite gqa,pope --backend lmms --method todre --keep 0.25
    """
    from mmcompress.spec import split_specs

    given = [typing.cast("int | float", parse_keep(part)) for part in keep.split(",")]
    keeps = list({repr(budget): budget for budget in given}.values())  # 1 and 1.0 are different ones
    asked = [part.strip() for part in split_specs(method)]
    policies = list(dict.fromkeys(part.strip() for part in split_specs(kv))) if kv else []
    labels = list(dict.fromkeys(part.strip() for part in split_specs(suite)))

    from mmcompress.evals import comparison
    from mmcompress.evals.backends import Terms
    from mmcompress.evals.processes import processes

    answering, sources = _backend(backend, engine, model, labels, data)
    terms = Terms(model, seed, limit, batch_size or (64 if model in MODELS else 8), processes())
    read = [comparison.read(label, source, terms) for label, source in sources.items()]
    loaded, processor = load_model(model, answering.place(terms.processes))

    import torch

    torch.set_num_threads(threads)
    every, refused = comparison.every_method(loaded, answering) if "all" in asked else ([], {})
    controls = comparison.BASELINES if baselines else ()
    every = [name for name in every if baselines or name not in comparison.BASELINES]
    wanted = list(dict.fromkeys([*controls, *every, *(part for part in asked if part != "all")]))
    chosen = comparison.plan(loaded, wanted, keeps, policies, answering)
    impossible = {part for part in asked if part != "all"} - {run.method for run in chosen.runs}
    impossible |= set(policies) - {run.kv for run in chosen.runs}
    if impossible:
        reasons = [f"{run}: {why}" for run, why in chosen.left_out.items() if any(part in run for part in impossible)]
        raise SpecError("; ".join(reasons))
    chosen = comparison.Comparison(chosen.runs, {**refused, **chosen.left_out})
    console = Console()
    try:
        comparison.compare(loaded, processor, read, chosen, terms, out, console, answering)
    except KeyboardInterrupt:
        console.print(f"stopped: all answers so far are in {escape(str(out))}, and the same command goes on from there")
        raise typer.Exit(130) from None


def _backend(
    name: str, engine: str | None, model: str, labels: Sequence[str], data: Path
) -> tuple[Backend, Mapping[str, Readable]]:
    """What answers, and where its questions come from."""
    if name not in BACKENDS:
        raise unknown_name("backend", name, BACKENDS)
    if engine is not None and name != "vllm":
        raise SpecError("--engine goes with --backend vllm.")
    if name == "lmms":
        from mmcompress.evals.backend_lmms import LMMS

        asking = LMMS.load(labels, data)
        return asking, asking.tasks
    from mmcompress.evals import suites
    from mmcompress.evals.micro.notes import UNLEARNT

    unlearnt = UNLEARNT.get(model, frozenset())
    found = {label: suites.configure(label, data, unlearnt=unlearnt) for label in labels}
    if name == "vllm":
        from mmcompress.evals.backend_vllm import VLLM

        return VLLM.parse(engine), found
    from mmcompress.evals.backend_hf import TRANSFORMERS

    return TRANSFORMERS, found


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


def write_report(
    runs: Annotated[list[Path], typer.Argument(help="Folders that mmcompress eval or bench wrote.", metavar="RUNS...")],
    out: Annotated[
        Path, typer.Option(help="The file to write: .html for a page, .md for tables, .csv for all numbers.")
    ] = Path("report.html"),
) -> None:
    """Write one page, Markdown tables or a CSV about evaluations and benchmarks; a page needs no network.

    Try:

      mmcompress report eval --out report.html
      mmcompress report eval bench --out report.html
      mmcompress report runs/llava runs/qwen --out both.csv
    """
    from mmcompress.evals import report_file

    report_file.write(runs, out)
    Console().print(f"wrote {out}", highlight=False)
