"""vLLM's own serving benchmark against a server that compresses images and one that does not."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.progress import track

from mmcompress.errors import InputError
from mmcompress.evals.bench.rows import publish
from mmcompress.evals.bench.servers import Server, beside_stock
from mmcompress.evals.bench.shapes import Size
from mmcompress.evals.bench.timing import spread
from mmcompress.evals.environment import environment
from mmcompress.evals.micro import MODELS

TEXT_TOKENS = 32
COLUMNS = ("method", "clients", "requests/s", "±", "x", "TTFT ms", "x", "TPOT ms", "x", "failed")
NOTES = (
    f"vLLM's own client: every request has a picture of noise and {TEXT_TOKENS} random words. Both servers are up at "
    "once and take turns, prefix and image caches emptied before each; medians of runs, within a run of requests; ±: "
    "half of what lies between the quartiles of runs.",
    "x: above 1, better than the stock engine: requests per second over its, its TTFT and TPOT over those of the row; "
    "none where tokens came in one piece, so that no time between them was seen.",
)


@dataclass(frozen=True)
class Terms:
    """What is asked.

    Args:
        image: width and height of pictures.
        clients: how many requests are under way at once.
        requests: of each run.
        new_tokens: of each answer.
        repeats: runs of each.
    """

    image: Size
    clients: Sequence[int]
    requests: int
    new_tokens: int
    repeats: int


@dataclass(frozen=True)
class Row:
    """A server under so many clients: requests per second, milliseconds, and ratios above 1 where it is the better.

    A ratio is None where a time was too short to be seen.
    """

    method: str
    clients: int
    rate: float
    rate_spread: float
    ttft: float
    tpot: float
    rate_ratio: float
    ttft_ratio: float | None
    tpot_ratio: float | None
    failed: int

    def cells(self) -> list[str]:
        """The row as text, in the order of `COLUMNS`."""
        seconds = ((self.ttft, self.ttft_ratio), (self.tpot, self.tpot_ratio))
        numbers = [self.rate, self.rate_spread, self.rate_ratio, *(number for pair in seconds for number in pair)]
        shown = ["" if number is None else f"{number:.2f}" for number in numbers]
        return [self.method, str(self.clients), *shown, str(self.failed)]


def summarise(clients: int, runs: Sequence[Mapping[str, Mapping[str, Any]]]) -> list[Row]:
    """The rows of what vLLM's client says of every server, run by run."""
    rows: list[Row] = []
    for name in runs[0]:
        said = [run[name] for run in runs]
        rate, rate_spread = spread([one["request_throughput"] for one in said])
        ttft, tpot = (median(one[f"median_{what}_ms"] for one in said) for what in ("ttft", "tpot"))
        stock = rows[0] if rows else None
        rows.append(
            Row(
                method=name,
                clients=clients,
                rate=rate,
                rate_spread=rate_spread,
                ttft=ttft,
                tpot=tpot,
                rate_ratio=rate / stock.rate if stock else 1.0,
                ttft_ratio=_times(stock.ttft if stock else ttft, ttft),
                tpot_ratio=_times(stock.tpot if stock else tpot, tpot),
                failed=sum(one["failed"] for one in said),
            )
        )
    return rows


def _times(longer: float, shorter: float) -> float | None:
    return longer / shorter if longer and shorter else None


def load(server: Server, model: Path, terms: Terms, clients: int, seed: int, log: Path) -> dict[str, Any]:
    """Let vLLM's client ask a server whose caches are empty; what it prints is added to `log`.

    Raises:
        InputError: no request was answered.
    """
    # `vllm bench serve` does no more, but looks for a package called vllm, which its build for CPUs is not.
    from vllm.benchmarks.serve import add_cli_args, main
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    server.forget()
    with log.open("a", encoding="utf-8") as written, redirect_stdout(written), redirect_stderr(written):
        found: dict[str, Any] = main(parser.parse_args(arguments(server.address, model, terms, clients, seed)))
    if not found["completed"]:
        raise InputError(f"no request was answered; {log} says why.")
    return found


def arguments(address: str, model: Path, terms: Terms, clients: int, seed: int) -> list[str]:
    """What vLLM's client is given."""
    width, height = terms.image
    options: dict[str, Any] = {
        "backend": "openai-chat",
        "endpoint": "/v1/chat/completions",
        "base-url": address,
        "model": model,
        "dataset-name": "random-mm",
        "random-input-len": TEXT_TOKENS,
        "random-output-len": terms.new_tokens,
        "random-mm-limit-mm-per-prompt": json.dumps({"image": 1, "video": 0}),
        "random-mm-bucket-config": str({(height, width, 1): 1.0}),
        "num-prompts": terms.requests,
        "max-concurrency": clients,
        "percentile-metrics": "ttft,tpot",
        "seed": seed,
    }
    named = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    return [*named, "--ignore-eos", "--disable-tqdm"]


def bench(
    name: str, wanted: Mapping[str, Any], terms: Terms, given: Sequence[str], out: Path, console: Console
) -> list[Row]:
    """Measure a model with and without what is `wanted` of mmcompress; print it, and write it to the folder `out`.

    `given` are arguments of both servers.

    Raises:
        SpecError: a server did not start.
        InputError: no request was answered.
    """
    model, label = MODELS.get(name, Path(name)), " + ".join(map(str, wanted.values()))
    rows: list[Row] = []
    with beside_stock(model, wanted, label, out, given) as servers:

        def turn(clients: int, seed: int) -> dict[str, dict[str, Any]]:
            return {
                label: load(server, model, terms, clients, seed, out / "client.log")
                for label, server in servers.items()
            }

        turn(max(terms.clients), 0)
        for clients in track(terms.clients, "measuring", console=console, transient=True):
            rows += summarise(clients, [turn(clients, seed) for seed in range(1, terms.repeats + 1)])
    import vllm

    facts = environment() | {"vllm": vllm.__version__}
    width, height = terms.image
    notes = [f"{name}, {terms.requests} requests, pictures of {width}x{height}, {terms.new_tokens} new tokens, "]
    notes[0] += f"{terms.repeats} runs."
    notes += [*NOTES, ", ".join(f"{fact} {value}" for fact, value in facts.items())]
    record = {"environment": facts, "model": name, **wanted, **asdict(terms), "rows": [asdict(row) for row in rows]}
    publish(out, COLUMNS, [row.cells() for row in rows], notes, record, console)
    return rows
