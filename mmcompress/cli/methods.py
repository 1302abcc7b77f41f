"""The commands `list` and `info`: what there is, and what each method is."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mmcompress.cli._shared import quieten


def list_methods(
    matrix: Annotated[bool, typer.Option("--matrix", help="Say which works on which model family.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Write the matrix as Markdown.")] = False,
) -> None:
    """List the methods and KV policies, or what each can do on each model family and in vLLM.

    Try:

      mmcompress list
      mmcompress list --matrix
    """
    from mmcompress.registry import METHODS, POLICIES, Registry

    if matrix or markdown:
        quieten()
        from mmcompress.evals import capabilities

        def own(registry: Registry) -> list[str]:
            return [name for name in registry.names() if name not in registry.plugins()]

        found, policies = capabilities.measure(own(METHODS)), capabilities.measure_policies(own(POLICIES))
        if markdown:
            typer.echo(capabilities.markdown(found, policies), nl=False)
            return
        for part, registry in ((found, METHODS), (policies, POLICIES)):
            table, reasons = capabilities.table(part, registry)
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
    quieten()
    from mmcompress.integrations.hf.capability import capability, models

    for family, model in models():
        found = capability(model, spec)
        no = f"[red]no:[/] {escape(found.reason)}"
        families.add_row(family, no if found.needs is None else _reads(found.needs, found.llm_needs))
    console.print(families)


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
