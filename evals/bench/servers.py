"""vLLM servers that run side by side, with and without compression."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from mmcompress.errors import SpecError

START_SECONDS = 600
STOCK = "stock"
"""The name of the server that compresses nothing."""


class Server:
    """A running server, as its clients see it."""

    def __init__(self, port: int) -> None:
        self.address = f"http://127.0.0.1:{port}"

    def post(self, path: str, body: Any = None) -> tuple[int, bytes]:
        """Status and content of the answer."""
        data = b"" if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=600) as response:
                return response.status, response.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def is_up(self) -> bool:
        """Whether it takes requests."""
        try:
            return bool(urllib.request.urlopen(f"{self.address}/health", timeout=5).status == 200)
        except OSError:
            return False

    def forget(self) -> None:
        """Empty its caches of prefixes and images."""
        for cache in ("prefix", "mm", "encoder"):
            self.post(f"/reset_{cache}_cache")


@contextmanager
def serve(model: Path, wanted: dict[str, Any], log: Path, arguments: Sequence[str]) -> Iterator[Server]:
    """A server with `wanted` in its additional config that is gone afterwards.

    Raises:
        SpecError: it did not start.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--port", str(port)]
    command += ["--additional-config", json.dumps(wanted), *arguments]
    with log.open("w", encoding="utf-8") as written:
        process = subprocess.Popen(
            command,
            stdout=written,
            stderr=subprocess.STDOUT,
            env={**os.environ, "VLLM_SERVER_DEV_MODE": "1"},  # so that caches can be emptied
            start_new_session=True,
        )
    try:
        server = Server(port)
        deadline = time.monotonic() + START_SECONDS
        while not server.is_up():
            if process.poll() is not None or time.monotonic() > deadline:
                raise SpecError(f"vLLM did not start; {log} says why.")
            time.sleep(0.5)
        yield server
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()


@contextmanager
def beside_stock(
    model: Path, wanted: Mapping[str, Any], name: str, folder: Path, arguments: Sequence[str]
) -> Iterator[dict[str, Server]]:
    """The stock server and one that does what is `wanted`, called `name`; their logs go to `folder`.

    Raises:
        SpecError: one did not start.
    """
    with ExitStack() as running:
        yield {
            STOCK: running.enter_context(serve(model, {}, folder / "stock.log", arguments)),
            name: running.enter_context(serve(model, {"mmcompress": wanted}, folder / "compressed.log", arguments)),
        }
