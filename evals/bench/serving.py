"""How many requests a vLLM server answers per second, images compressed and not, and whether all answers are right."""

from __future__ import annotations

import argparse
import base64
import io
import json
import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from PIL import Image
from rich.console import Console

from mmcompress.errors import MMCompressError
from mmcompress.evals.bench.options import DEVICES, require_positive
from mmcompress.evals.bench.rows import publish
from mmcompress.evals.bench.servers import STOCK, Server, beside_stock
from mmcompress.evals.environment import bench_environment
from mmcompress.evals.micro import DEFAULT_MODEL, MICROVQA_PATH, MODELS, load_microvqa

SHARES = {"picture": 0.7, "two pictures": 0.1, "text": 0.15, "broken": 0.05}
SIDES = (112, 224, 448, 640)
TOKENS = 8
COLUMNS = ("method", "clients", "requests/s", "x", "right")
NOTES = (
    f"{', '.join(f'{share:.0%} {kind}' for kind, share in SHARES.items())}; sides of {SIDES[0]} to {SIDES[-1]} pixels, "
    f"{TOKENS} tokens at most; medians of runs over all requests, taken in turns, prefix and image caches emptied "
    "before each. x: requests per second over those of the stock engine.",
    "right: every sound request got the text it gets alone, and every broken one a 400.",
)


@dataclass(frozen=True)
class Row:
    """A server under so many clients."""

    method: str
    clients: int
    rate: float
    ratio: float
    right: bool

    def cells(self) -> list[str]:
        """The row as text, in the order of `COLUMNS`."""
        return [self.method, str(self.clients), f"{self.rate:.2f}", f"{self.ratio:.2f}", "yes" if self.right else "NO"]


def requests(count: int) -> tuple[list[dict[str, Any]], set[int]]:
    """As many chats, the same every time: one picture, two, none or one that is broken; and which are broken."""
    draw = random.Random(0)
    questions = load_microvqa()
    chats, broken = [], set()
    for number in range(count):
        kind = draw.choices(list(SHARES), list(SHARES.values()))[0]
        rows = draw.sample(questions, 2 if kind == "two pictures" else 1)
        pictures = [] if kind == "text" else [_png(MICROVQA_PATH / row.image, draw) for row in rows]
        if kind == "broken":
            pictures = [pictures[0][: len(pictures[0]) // 2]]
            broken.add(number)
        urls = [f"data:image/png;base64,{base64.b64encode(picture).decode()}" for picture in pictures]
        content = [*({"type": "image_url", "image_url": {"url": url}} for url in urls)]
        content.append({"type": "text", "text": rows[0].question})
        chats.append({"messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": TOKENS})
    return chats, broken


def _png(path: Path, draw: random.Random) -> bytes:
    file = io.BytesIO()
    with Image.open(path) as image:
        image.convert("RGB").resize((draw.choice(SIDES), draw.choice(SIDES))).save(file, "png")
    return file.getvalue()


def say(server: Server, chat: dict[str, Any]) -> str | int:
    """What a server answers, or the status if it does not."""
    status, content = server.post("/v1/chat/completions", chat)
    return str(json.loads(content)["choices"][0]["message"]["content"]) if status == 200 else status


def ask(server: Server, chats: Sequence[dict[str, Any]], clients: int) -> tuple[float, list[str | int]]:
    """Requests per second of a server with empty caches, and all answers."""
    server.forget()
    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(partial(say, server), chats))
    return len(chats) / (time.perf_counter() - start), answers


def bench(settings: argparse.Namespace, arguments: Sequence[str], console: Console) -> list[Row]:
    """Measure what the command line asks for, print it, and write it to `settings.out`.

    Raises:
        SpecError: a number is out of the question, or a server did not start.
        OSError: the folder cannot be written to.
    """
    require_positive(requests=settings.requests, repeats=settings.repeats, clients=min(settings.clients))
    settings.out.mkdir(parents=True, exist_ok=True)
    model = MODELS.get(settings.model, Path(settings.model))
    chats, broken = requests(settings.requests)
    rows: list[Row] = []
    wanted = {"method": settings.method}
    with beside_stock(model, wanted, settings.method, settings.out, arguments) as servers:
        alone = {name: ask(server, chats, 1)[1] for name, server in servers.items()}
        for clients in settings.clients:
            runs = [  # in turns, so that what else the machine does slows both
                {name: ask(server, chats, clients) for name, server in servers.items()} for _ in range(settings.repeats)
            ]
            stock = median(run[STOCK][0] for run in runs)
            for name, server in servers.items():
                rate = median(run[name][0] for run in runs)
                right = server.is_up() and _sound(alone[name], broken)
                right = right and all(run[name][1] == alone[name] for run in runs)
                rows.append(Row(name, clients, rate, rate / stock, right))
    facts = bench_environment("serving", settings.device)
    notes = [f"{settings.model}, {settings.requests} requests, {settings.repeats} runs.", *NOTES]
    notes.append(", ".join(f"{name} {value}" for name, value in facts.items()))
    cells = [row.cells() for row in rows]
    record = {"environment": facts, "rows": [asdict(row) for row in rows]}
    publish(settings.out, COLUMNS, cells, notes, record, console)
    return rows


def _sound(answers: Sequence[str | int], broken: set[int]) -> bool:
    """Whether all requests got a text but the `broken` ones, which got a 400."""
    return all(answer == 400 if number in broken else isinstance(answer, str) for number, answer in enumerate(answers))


def main(given: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m mmcompress.evals.bench.serving",
        description="Time a vLLM server under mixed requests with compressed images, beside the stock one. "
        "Arguments that are not listed here are vLLM's.",
    )
    add = parser.add_argument
    add("--model", default=DEFAULT_MODEL, help="an embedded model or a folder (%(default)s)")
    add("--method", default="hired(keep=0.2)", help="what compresses (%(default)s)")
    add("--requests", type=int, default=500, help="how many (%(default)s)")
    add("--clients", type=int, nargs="+", default=[1, 4, 16], help="how many ask at once (1 4 16)")
    add("--repeats", type=int, default=3, help="runs of each (%(default)s)")
    add("--device", choices=DEVICES, default="cpu", help="where vLLM runs (%(default)s)")
    add("--out", type=Path, default=Path("bench"), help="folder for results.json and table.md (%(default)s)")
    settings, arguments = parser.parse_known_args(given)
    try:
        bench(settings, arguments, Console())
    except (MMCompressError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
