"""Many questions about one picture in one sequence.

Every question sees the picture and itself only, and its positions start right behind the picture: the loss is that of
asking each alone, at a small part of the cost.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mmcompress.evals.micro.questions import Asked
from mmcompress.evals.micro.training.architectures import TOKEN_IDS
from mmcompress.evals.micro.training.targets import IGNORE

_ATTEMPTS = 8
_PADDING = -1
NOTHING = -1


class Packed(NamedTuple):
    """Questions and answers one after the other, each array [length].

    Args:
        ids: token ids.
        block: number of the question a token belongs to, -1 for padding.
        offset: position within the question.
        target: the token to be said next, `IGNORE` outside answers.
        referent: where an answer is due, the number of the one object it is about, `NOTHING` elsewhere.
    """

    ids: NDArray[np.int64]
    block: NDArray[np.int64]
    offset: NDArray[np.int64]
    target: NDArray[np.int64]
    referent: NDArray[np.int64]


def tokenize(text: str) -> list[int]:
    """Token ids of words separated by blanks."""
    return [TOKEN_IDS[word] for word in text.split()]


def pack(draw: Callable[[], Asked | None], length: int) -> Packed:
    """Fill `length` tokens with questions from `draw`, which may fail now and then."""
    packed = Packed(*(np.full(length, value, np.int64) for value in (TOKEN_IDS["<pad>"], _PADDING, 0, IGNORE, NOTHING)))
    start = block = failures = 0
    while failures < _ATTEMPTS:
        asked = draw()
        if asked is None:
            failures += 1
            continue
        question = [*tokenize(asked.question), TOKEN_IDS["ASSISTANT:"]]
        answer = [*tokenize(asked.answer), TOKEN_IDS["</s>"]]
        end = start + len(question) + len(answer)
        if end > length:
            failures += 1
            continue
        packed.ids[start:end] = question + answer
        packed.block[start:end] = block
        packed.offset[start:end] = range(end - start)
        packed.target[start + len(question) - 1 : end - 1] = answer
        if asked.referent is not None:
            packed.referent[start + len(question) - 1] = asked.referent
        start, block = end, block + 1
    return packed
