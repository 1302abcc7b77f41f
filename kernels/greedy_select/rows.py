"""Products of all pairs of an image's vectors, read row by row, for several images at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

AHEAD = 32
"""Rows computed together. A row by itself waits for memory, since all vectors are read for it."""
FEW = 1024
"""Up to so many tokens, all pairs cost no more than the rows that are likely to be read; they take 4 MiB."""
HELD_BYTES = 2**30
"""What rows of all images may take together (16384 of 16384 tokens); beyond, some are dropped and computed again."""


class Rows:
    """Rows of the products of all pairs, computed together with those that are likely to be read next, and held.

    Args:
        images: `[tokens, dim]` vectors of each.
        counts: how many rows of each will be read.
    """

    def __init__(self, images: Sequence[Tensor], counts: Sequence[int]) -> None:
        self.images = images
        self.counts = counts
        self.held: list[dict[int, Tensor]] = [{} for _ in images]

    def read(self, step: int, tokens: Tensor, scores: Tensor) -> Tensor:
        """A row of every image, `[images, longest]`; zero behind its tokens, and if all its rows have been read.

        Args:
            step: how many have been read.
            tokens: `[images]`, whose row.
            scores: `[images, longest]`, the higher the likelier a token's row is read next; -inf if it never is.
        """
        rows = []
        for image, token in enumerate(tokens.tolist()):
            held, reading = self.held[image], step < self.counts[image]
            if reading and token not in held:
                self.compute(image, scores[image].index_fill(0, tokens[image], torch.inf))
            rows.append(held[token] if reading else scores.new_zeros(len(self.images[image])))
        return pad_sequence(rows, batch_first=True)

    def compute(self, image: int, scores: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens with the highest `scores` of those whose rows are not held, and their rows, held from now on."""
        vectors, held = self.images[image], self.held[image]
        if len(vectors) <= FEW:
            tokens, rows = torch.arange(len(vectors), device=vectors.device), _all_pairs(vectors)
        else:
            if 4 * len(vectors) * (len(held) + AHEAD) * len(self.images) > HELD_BYTES:
                held.clear()
            known = torch.tensor(list(held), dtype=torch.long, device=scores.device)
            tokens = scores[: len(vectors)].index_fill(0, known, -torch.inf).topk(AHEAD).indices
            rows = vectors[tokens] @ vectors.T
        held.update(zip(tokens.tolist(), rows, strict=True))
        return tokens, rows


def _all_pairs(vectors: Tensor) -> Tensor:
    """Products `[tokens, tokens]`, each pair multiplied once."""
    products = vectors.new_empty(len(vectors), len(vectors))
    for start in range(0, len(vectors), AHEAD):
        rows = vectors[start : start + AHEAD] @ vectors[start:].T
        products[start : start + AHEAD, start:] = rows
        products[start:, start : start + AHEAD] = rows.T
    return products
