"""What both engines are asked, and what they are compared by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from PIL import Image

from mmcompress.evals.micro import MICROVQA_PATH, Question, load_microvqa


@dataclass(frozen=True)
class Prompt:
    """A question about pictures, which come first, and the most tokens its answer may have."""

    question: str
    pictures: tuple[Image.Image, ...]
    new_tokens: int

    def chat(self, picture: str = "image") -> list[dict[str, Any]]:
        """The prompt as messages; `picture` is the engine's name for a PIL image in them."""
        content: list[dict[str, Any]] = [{"type": picture, picture: image} for image in self.pictures]
        return [{"role": "user", "content": [*content, {"type": "text", "text": self.question}]}]


@dataclass(frozen=True)
class Reply:
    """The prompt's ids as the LLM saw them, the answer's ids and the log-probability of each."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]


def ragged_prompts() -> list[Prompt]:
    """Questions of many lengths about one picture, two or none, square, landscape and portrait; two answer lengths."""
    rows = load_microvqa(60)[::10]
    pictures = [_picture(row) for row in rows]
    width, height = pictures[0].size
    landscape, portrait = (0, height // 4, width, height * 3 // 4), (width // 4, 0, width * 3 // 4, height)
    shown = (
        (pictures[0],),
        (pictures[1],),
        (pictures[2], pictures[0]),
        (),
        (pictures[4].crop(landscape),),
        (pictures[5].crop(portrait), pictures[1].crop(landscape)),
    )
    return [
        Prompt(row.question, chosen, new_tokens=4 if row.question_id % 20 else 9)
        for row, chosen in zip(rows, shown, strict=True)
    ]


def _picture(row: Question) -> Image.Image:
    with Image.open(MICROVQA_PATH / row.image) as image:
        return image.convert("RGB")
