"""The commands `bench` and `bench-serve`: what methods cost and gain."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.console import Console

from mmcompress.cli._shared import MODEL_HELP, load_model, parse_keep, quieten
from mmcompress.errors import SpecError, unknown_name

if TYPE_CHECKING:
    from torch import Tensor

    from mmcompress.evals.bench.shapes import Size


def bench(
    model: Annotated[str | None, typer.Argument(help=MODEL_HELP, metavar="MODEL", show_default=False)] = None,
    image: Annotated[
        str | None, typer.Option(help="Sizes of the picture, separated by commas, as in 672x672.", show_default=False)
    ] = None,
    batch: Annotated[str, typer.Option(help="Rows, separated by commas.")] = "1",
    method: Annotated[
        str | None, typer.Option(help="Methods or specs, separated by commas; joined by + they stack.")
    ] = None,
    keep: Annotated[
        str, typer.Option(help="Visual tokens per LLM layer: fractions or counts, separated by commas.")
    ] = "0.25",
    kv: Annotated[
        str | None, typer.Option(help="KV policies, separated by commas; all else is measured without and with each.")
    ] = None,
    random_weights: Annotated[
        str | None,
        typer.Option(help="Instead of MODEL: llava-1.5-7b, qwen3-vl-8b ...; a wrong one lists all.", metavar="NAME"),
    ] = None,
    layers: Annotated[
        int | None, typer.Option(help="With --random-weights: cut the LLM to N layers.", metavar="N")
    ] = None,
    new_tokens: Annotated[int, typer.Option(help="Tokens of an answer.", min=2)] = 8,
    repeats: Annotated[int, typer.Option(help="Measurements of each run.", min=1)] = 9,
    device: Annotated[str, typer.Option(help="Where to measure: cpu or cuda.")] = "cpu",
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32, bfloat16 or float16; the checkpoint's, bfloat16 of random weights.", metavar="TYPE"
        ),
    ] = None,
    threads: Annotated[int, typer.Option(help="CPU threads; more only help on idle cores.", min=1)] = 1,
    out: Annotated[Path, typer.Option(help="Folder for results.json and table.md.")] = Path("bench"),
) -> None:
    """Measure encoder, selection, prefill and decoding under methods, beside the unpruned model.

    All runs take turns in one process. Printed with them: the part of the speed-up that the saved FLOPs allow, and
    from how many visual tokens on a method pays. Pictures are noise; what times depend on is their size.

    Try:

      mmcompress bench micro-llava --method uniform,todre --keep 0.25
      mmcompress bench --random-weights llava-1.5-7b --layers 4 --method divprune,fastv --keep 0.5
      mmcompress bench --random-weights qwen3-vl-8b --device cuda --image 672x672,1344x1344 --batch 1,4,16 \
--method divprune --kv "snapkv(keep=0.25)"
    """
    if (model is None) == (random_weights is None):
        raise SpecError("give either a MODEL or --random-weights NAME.")
    if layers is not None and random_weights is None:
        raise SpecError("--layers cuts a model of --random-weights; a checkpoint stays whole.")
    if method is None and kv is None:
        raise SpecError("what should be measured beside the unpruned model? Give --method or --kv.")
    batches = [_count("--batch", part) for part in batch.split(",")]
    keeps = [cast("int | float", parse_keep(part)) for part in keep.split(",")]
    quieten()
    from mmcompress.evals.bench import latency
    from mmcompress.evals.bench.options import prepare, require_positive
    from mmcompress.spec import split_specs

    require_positive(layers=layers)
    prepare(device, threads, out)
    methods, policies = ([] if specs is None else split_specs(specs) for specs in (method, kv))
    terms = latency.Terms(methods, keeps, policies, batches, new_tokens, repeats)
    if random_weights is not None:
        loaded, prompts = _random(random_weights, image, layers, device, dtype)
    else:
        loaded, prompts = _trained(str(model), image, device, dtype)
    latency.bench(random_weights or str(model), loaded, prompts, terms, out, Console())


def bench_serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help=MODEL_HELP, metavar="MODEL")],
    method: Annotated[str | None, typer.Option(help="A method with its budget.")] = None,
    kv: Annotated[str | None, typer.Option(help="A KV policy with its budget.")] = None,
    image: Annotated[str, typer.Option(help="The size of pictures.")] = "672x672",
    clients: Annotated[str, typer.Option(help="Requests under way at once, separated by commas.")] = "1,2,4,8,16,32",
    requests: Annotated[int, typer.Option(help="Of each run.", min=1)] = 100,
    new_tokens: Annotated[int, typer.Option(help="Tokens of an answer.", min=2)] = 16,
    repeats: Annotated[int, typer.Option(help="Runs of each.", min=1)] = 3,
    out: Annotated[Path, typer.Option(help="Folder for results.json, table.md and logs.")] = Path("bench"),
) -> None:
    """Measure a vLLM server with compression beside one without, with vLLM's own serving benchmark.

    Both servers are up at once and take turns. Options that are not listed here are given to both; two engines share
    the memory, so give each its part.

    Try:

      mmcompress bench-serve micro-llava --method "hired(keep=0.2)" --gpu-memory-utilization 0.1
      mmcompress bench-serve llava-hf/llava-1.5-7b-hf --method "hired(keep=0.2)" --gpu-memory-utilization 0.45
    """
    wanted = {name: value for name, value in (("method", method), ("kv", kv)) if value is not None}
    if not wanted:
        raise SpecError("what should be measured beside the stock engine? Give --method or --kv.")
    levels = [_count("--clients", part) for part in clients.split(",")]
    from mmcompress.evals.bench import client
    from mmcompress.evals.bench.prompts import sizes
    from mmcompress.registry import METHODS, POLICIES
    from mmcompress.spec import CompressionConfig

    config = CompressionConfig.create(method, kv=kv)
    for spec, known in (*((spec, METHODS) for spec in config.methods), *((spec, POLICIES) for spec in config.kv)):
        known.build(spec.name, spec.options)
    terms = client.Terms(sizes(image)[0], levels, requests, new_tokens, repeats)
    out.mkdir(parents=True, exist_ok=True)
    client.bench(model, wanted, terms, context.args, out, Console())


def _random(
    name: str, image: str | None, layers: int | None, device: str, dtype: str | None
) -> tuple[Any, dict[Size, dict[str, Tensor]]]:
    from mmcompress.evals.bench.prompts import sizes
    from mmcompress.evals.bench.shapes import shape_of

    shape = shape_of(name)
    wanted = [shape.size] if image is None else sizes(image)
    loaded, _ = shape.build(layers, device, _dtype(dtype or "bfloat16"))
    return loaded, {size: shape.prompt(loaded, size) for size in wanted}


def _trained(name: str, image: str | None, device: str, dtype: str | None) -> tuple[Any, dict[Size, dict[str, Tensor]]]:
    from mmcompress.evals.bench.prompts import prompt_of, sizes

    wanted = sizes(image or "672x672")
    given = None if dtype is None else _dtype(dtype)
    loaded, processor = load_model(name, device)
    loaded.to(device, given)
    return loaded, {size: prompt_of(loaded, processor, size) for size in wanted}


def _dtype(name: str) -> Any:
    import torch

    from mmcompress.evals.bench.options import DTYPES

    if name not in DTYPES:
        raise unknown_name("--dtype", name, DTYPES)
    return getattr(torch, name)


def _count(option: str, text: str) -> int:
    if not re.fullmatch(r"\s*[1-9]\d*\s*", text):
        raise SpecError(f"{option} {text!r}: write counts above 0, separated by commas, as in 1,4,16.")
    return int(text)
