"""The command line. Everything heavy is imported by the command that needs it."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import mmcompress
from mmcompress.cli import bench, doctor, evaluation, methods, pictures, training
from mmcompress.cli._shared import complain
from mmcompress.errors import MMCompressError


class _Commands(TyperGroup):
    """Commands whose user errors become one red line and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise
        except (MMCompressError, OSError) as error:
            complain("error", str(error))
            raise typer.Exit(2) from error
        except ImportError as error:
            complain("error", f"{error}; mmcompress doctor says what is missing")
            raise typer.Exit(2) from error


app = typer.Typer(
    cls=_Commands,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


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


app.command("list")(methods.list_methods)
app.command()(methods.info)
app.command()(evaluation.demo)
app.command("eval")(evaluation.evaluate)
app.command()(training.calibrate)
app.command()(bench.bench)
app.command("bench-serve", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(
    bench.bench_serve
)
app.command("suites")(evaluation.list_suites)
app.command("report")(evaluation.write_report)
app.command()(pictures.run)
app.command()(pictures.show)
app.command()(doctor.doctor)

train = typer.Typer(no_args_is_help=True, help="Train a model for fewer visual tokens.")
train.command()(training.matryoshka)
app.add_typer(train, name="train")


def main() -> None:
    """Run the command line."""
    app(prog_name="mmcompress")
