"""A real server: many clients, images, text and nonsense, and the answers of the wrapped model."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import reference
import torch
from PIL import Image
from prompts import Prompt, Reply
from transformers import AutoModelForImageTextToText

import mmcompress
from mmcompress.evals.bench.servers import Server, serve
from mmcompress.evals.micro import MICROVQA_PATH, load_microvqa, model_path
from mmcompress.evals.micro.processing import load_processor

pytestmark = pytest.mark.slow

METHOD, KEPT, PATCHES = "vtc-cls(keep=0.1)", 25, 256
TOKENS = 6
QUESTIONS = load_microvqa()
AT_ONCE = 64  # questions in a batch of transformers


class Chats:
    """A server, as those see it who chat."""

    def __init__(self, server: Server) -> None:
        self.is_up = server.is_up
        self._post = server.post

    def chat(
        self, question: str, *pictures: bytes, path: str = "/v1/chat/completions", **options: Any
    ) -> tuple[int, dict[str, Any]]:
        """Status and content of the answer to a question about PNG files."""
        images = [
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(picture).decode()}"}}
            for picture in pictures
        ]
        content = [*images, {"type": "text", "text": question}]
        body = {
            "model": "micro",
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            "max_tokens": TOKENS,
            **options,
        }
        status, answer = self._post(path, body)
        return status, json.loads(answer)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chats]:
    log = tmp_path_factory.mktemp("server") / "log"
    wanted = {"mmcompress": {"method": METHOD, "keep_range": [0.05, 0.5]}}
    arguments = ["--served-model-name", "micro", "--dtype", "float32", "--enforce-eager", "--max-model-len", "1024"]
    arguments += ["--limit-mm-per-prompt", '{"image": 2}', "--trust-request-mm-kwargs"]
    arguments += ["--kv-cache-memory-bytes", str(1 << 27)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
        patch.setenv("VLLM_LOGGING_LEVEL", "INFO")
        with serve(model_path(), wanted, log, arguments) as running:
            assert log.read_text().count("25 of 256 tokens of the largest image enter the LLM") == 1
            yield Chats(running)


@pytest.fixture(scope="module")
def expected() -> list[Reply]:
    folder = model_path()
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    prompts = [
        Prompt(row.question, (Image.open(MICROVQA_PATH / row.image).convert("RGB"),), TOKENS) for row in QUESTIONS
    ]
    batches = [prompts[start : start + AT_ONCE] for start in range(0, len(prompts), AT_ONCE)]
    with mmcompress.wrap(model, METHOD):
        return [reply for batch in batches for reply in reference.ask(model, load_processor(folder), batch, False)]


def picture(name: str) -> bytes:
    return (MICROVQA_PATH / name).read_bytes()


def test_answers_are_those_of_the_wrapped_model(server: Chats, expected: list[Reply]) -> None:
    tokenizer = load_processor(model_path()).tokenizer
    with ThreadPoolExecutor(8) as clients:
        texts = [clients.submit(server.chat, "what color is the sky ?") for _ in range(4)]
        broken = [
            clients.submit(server.chat, "what ?", content)
            for content in (b"", b"no picture", picture("images/000.png")[:99])
        ]
        answers = list(clients.map(lambda row: server.chat(row.question, picture(row.image)), QUESTIONS))
    for (status, answer), wanted in zip(answers, expected, strict=True):
        assert status == 200, answer
        assert answer["usage"]["prompt_tokens"] == len(wanted.prompt) - PATCHES + KEPT
    said = [answer["choices"][0]["message"]["content"].split() for _, answer in answers]
    assert said == [tokenizer.decode(wanted.tokens, skip_special_tokens=True).split() for wanted in expected]
    right = sum(words == row.answer.split() for words, row in zip(said, QUESTIONS, strict=True))
    assert right > len(QUESTIONS) / 2, "equal answers that are wrong would prove little"
    assert [text.result()[0] for text in texts] == [200] * 4
    assert [text.result()[0] for text in broken] == [400] * 3
    assert server.is_up()


@pytest.mark.parametrize(("keep", "kept"), [(0.05, 12), (0.5, 128)])
def test_requests_choose_their_budget(server: Chats, keep: float, kept: int) -> None:
    question, image = "what color is the star ?", picture("images/000.png")
    _, usual = server.chat(question, image)
    status, answer = server.chat(question, image, mm_processor_kwargs={"mmcompress_keep": keep})
    assert status == 200, answer
    assert answer["usage"]["prompt_tokens"] - usual["usage"]["prompt_tokens"] == kept - KEPT


@pytest.mark.parametrize("keep", [0.01, 0.6, 1, "0.1", None, True, [0.1]])
def test_budgets_out_of_range_get_a_400(server: Chats, keep: Any) -> None:
    status, answer = server.chat("what ?", picture("images/000.png"), mm_processor_kwargs={"mmcompress_keep": keep})
    assert status == 400
    assert "mmcompress_keep" in answer["error"]["message"]
    assert server.is_up()


def test_too_many_pictures_get_a_400(server: Chats) -> None:
    status, answer = server.chat("what ?", *[picture("images/000.png")] * 3)
    assert status == 400
    assert "At most 2 image" in answer["error"]["message"]


def test_counting_tokens_counts_those_that_are_kept(server: Chats) -> None:
    _, answer = server.chat("what ?", picture("images/000.png"))
    status, counted = server.chat("what ?", picture("images/000.png"), path="/tokenize")
    assert status == 200, counted
    assert counted["count"] == answer["usage"]["prompt_tokens"]


def test_both_pictures_are_compressed(server: Chats) -> None:
    _, none = server.chat("what ?")
    _, two = server.chat("what ?", picture("images/000.png"), picture("images/001.png"))
    assert two["usage"]["prompt_tokens"] - none["usage"]["prompt_tokens"] == 2 * KEPT
