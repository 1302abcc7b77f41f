"""What the serving benchmark asks; servers themselves are tested in `tests/vllm`."""

from __future__ import annotations

import base64
import io
from typing import Any

import pytest
from PIL import Image

from mmcompress.evals.bench import serving


def pictures(chat: dict[str, Any]) -> list[bytes]:
    urls = [part["image_url"]["url"] for part in chat["messages"][0]["content"] if part["type"] == "image_url"]
    return [base64.b64decode(url.partition(",")[2]) for url in urls]


def test_requests_are_mixed_and_the_same_every_time() -> None:
    chats, broken = serving.requests(200)
    assert (chats, broken) == serving.requests(200)
    counts = [len(pictures(chat)) for chat in chats]
    assert counts.count(2) > 10 and counts.count(0) > 20 and len(broken) > 3
    for number, chat in enumerate(chats):
        for picture in pictures(chat):
            if number in broken:
                with pytest.raises(OSError):
                    Image.open(io.BytesIO(picture)).load()
            else:
                assert set(Image.open(io.BytesIO(picture)).size) <= set(serving.SIDES)


@pytest.mark.parametrize("wrong", ["--requests", "--repeats", "--clients"])
def test_counts_must_be_positive(wrong: str) -> None:
    with pytest.raises(SystemExit):
        serving.main([wrong, "0"])
