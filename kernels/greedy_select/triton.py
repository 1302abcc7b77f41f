"""A whole batch in two launches where its cosines are held; beyond, one per step and memory linear in tokens.

Nothing is read back: what was chosen stays on the device from step to step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn.utils.rnn import pad_sequence

from mmcompress.kernels.bipartite_match.triton import nearest_of
from mmcompress.kernels.dispatch.triton import multiply

HELD = 4096
"""Up to so many tokens of an image, the cosines of all pairs are held."""
TOKENS, DIM = 64, 64
MAX_SUM, K_CENTER, DPP = 0, 1, 2
FLOOR = 1e-12


@triton.jit
def _cosines(tokens, norm, out, longest, width, token_image, token_row, TOKENS: tl.constexpr, DIM: tl.constexpr):
    image, column = tl.program_id(2), tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    row = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    tokens += image * token_image
    product = tl.zeros([TOKENS, TOKENS], tl.float32)
    for start in range(0, width, DIM):
        dim = start + tl.arange(0, DIM)
        one = tl.load(
            tokens + row[:, None] * token_row + dim[None, :], (row < longest)[:, None] & (dim < width)[None, :], 0.0
        )
        two = tl.load(
            tokens + column[None, :] * token_row + dim[:, None],
            (column < longest)[None, :] & (dim < width)[:, None],
            0.0,
        )
        product = multiply(one, two, product)
    norm += image * longest
    length, lengths = tl.load(norm + row, row < longest, 1.0), tl.load(norm + column, column < longest, 1.0)
    place = out + (image * longest + row[:, None]).to(tl.int64) * longest + column[None, :]
    cosine = product / (length[:, None] * lengths[None, :])
    tl.store(place, cosine, (row < longest)[:, None] & (column < longest)[None, :])


@triton.jit
def _choose(cosines, lengths, counts, pivots, order, longest, most, MAX_SUM: tl.constexpr, TOKENS: tl.constexpr):
    """All steps of one image, with its scores in registers."""
    image, token = tl.program_id(0), tl.arange(0, TOKENS)
    length, count = tl.load(lengths + image), tl.load(counts + image)
    score = tl.where(token < length, 0.0 if MAX_SUM else 2.0, float("-inf"))
    chosen = tl.load(pivots + image).to(tl.int32)
    cosines += image.to(tl.int64) * longest * longest
    for step in range(count):
        tl.store(order + image * most + step, chosen)
        cosine = tl.load(cosines + chosen.to(tl.int64) * longest + token, token < length, 0.0)
        score = score - cosine if MAX_SUM else tl.minimum(score, -cosine)
        score = tl.where(token == chosen, float("-inf"), score)
        chosen = tl.argmax(score, 0).to(tl.int32)


@triton.jit(do_not_specialize=["step"])
def _step(
    tokens,
    norm,
    scale,
    score,
    explained,
    best,
    best_token,
    next_best,
    next_token,
    order,
    step,
    longest,
    width,
    most,
    blocks,
    token_image,
    token_row,
    KIND: tl.constexpr,
    BLOCKS: tl.constexpr,
    TOKENS: tl.constexpr,
    DIM: tl.constexpr,
):
    """Take the best of all blocks as they were left by the step before; bring the scores of one block up to date."""
    block, image = tl.program_id(0), tl.program_id(1)
    every = tl.arange(0, BLOCKS)
    bests = tl.load(best + image * blocks + every, every < blocks, float("-inf"))
    highest, where = tl.max(bests, 0), tl.argmax(bests, 0)
    chosen = tl.load(best_token + image * blocks + where)
    if block == 0:
        tl.store(order + image * most + step, chosen)
    token = block * TOKENS + tl.arange(0, TOKENS)
    there = token < longest
    tokens += image * token_image
    product = tl.zeros([TOKENS, DIM], tl.float32)
    for start in range(0, width, DIM):
        dim = start + tl.arange(0, DIM)
        one = tl.load(tokens + chosen * token_row + dim, dim < width, 0.0).to(tl.float32)
        some = tl.load(tokens + token[:, None] * token_row + dim[None, :], there[:, None] & (dim < width)[None, :], 0.0)
        product += some.to(tl.float32) * one[None, :]
    line = image * longest
    norms = tl.load(norm + line + token, there, 1.0) * tl.load(norm + line + chosen)
    cosine = tl.sum(product, 1) / norms
    now = tl.load(score + line + token, there, float("-inf"))
    if KIND == 0:
        now -= cosine
    elif KIND == 1:
        now = tl.minimum(now, -cosine)
    else:
        along = cosine * tl.load(scale + line + token, there, 0.0) * tl.load(scale + line + chosen)
        explained += image * most * longest
        for before in range(step):
            known = tl.load(explained + before * longest + chosen)
            along -= known * tl.load(explained + before * longest + token, there, 0.0)
        limit = tl.sqrt(tl.maximum(now, 0.0))
        part = tl.minimum(tl.maximum(along / tl.sqrt(tl.maximum(highest, 0.0)), -limit), limit)
        tl.store(explained + step * longest + token, part, there)
        now = tl.where(now == float("-inf"), now, tl.maximum(now - part * part, 1e-12))
    now = tl.where(token == chosen, float("-inf"), now)
    tl.store(score + line + token, now, there)
    tl.store(next_best + image * blocks + block, tl.max(now, 0))
    tl.store(next_token + image * blocks + block, block * TOKENS + tl.argmax(now, 0))


def greedy_select(
    tokens: Sequence[Tensor], counts: Sequence[int], pivots: Sequence[Tensor] | None, objective: str
) -> list[Tensor]:
    """See `reference.greedy_select`."""
    padded = padded_tokens(tokens)
    lengths = on_device([len(image) for image in tokens], padded)
    real = torch.arange(padded.shape[1], device=padded.device) < lengths[:, None]
    if pivots is None:
        closest = nearest_of(padded, padded, itself=False, lengths=lengths)[0]
        first = closest.masked_fill(~real, torch.inf).argmin(dim=1)
    else:
        first = torch.stack(list(pivots)).to(padded.device)
    if padded.shape[1] > HELD:
        score = torch.zeros_like(real, dtype=torch.float32) + (0.0 if objective == "max-sum" else 2.0)
        score = score.masked_fill(~real, -torch.inf)
        return step_by_step(padded, score, None, first, counts, MAX_SUM if objective == "max-sum" else K_CENTER)
    images, longest, width = padded.shape
    cosines = padded.new_empty(images, longest, longest, dtype=torch.float32)
    blocks = triton.cdiv(longest, TOKENS)
    _cosines[blocks, blocks, images](
        padded, norms(padded), cosines, longest, width, *padded.stride()[:2], TOKENS=TOKENS, DIM=DIM
    )
    order = padded.new_empty(images, max(counts), dtype=torch.long)
    _choose[(images,)](
        cosines,
        lengths,
        on_device(counts, padded),
        first,
        order,
        longest,
        max(counts),
        MAX_SUM=objective == "max-sum",
        TOKENS=triton.next_power_of_2(longest),
        num_warps=8,
    )
    return [chosen[:count].clone() for chosen, count in zip(order, counts, strict=True)]


def step_by_step(
    padded: Tensor, score: Tensor, scale: Tensor | None, first: Tensor, counts: Sequence[int], kind: int
) -> list[Tensor]:
    """Choose the `first` `[images]` and then the highest `score` `[images, longest]`, which every choice changes."""
    images, longest, width = padded.shape
    most, blocks = max(counts), triton.cdiv(longest, TOKENS)
    order = padded.new_empty(images, most, dtype=torch.long)
    explained = score.new_empty(images, most if kind == DPP else 0, longest)
    best, following = score.new_full((2, images, blocks), -torch.inf)
    token, token_following = torch.zeros(2, images, blocks, dtype=torch.long, device=score.device)
    best[:, 0], token[:, 0] = score.gather(1, first[:, None])[:, 0], first
    lengths = norms(padded)
    for step in range(most):
        _step[blocks, images](
            padded,
            lengths,
            scale,
            score,
            explained,
            best,
            token,
            following,
            token_following,
            order,
            step,
            longest,
            width,
            most,
            blocks,
            *padded.stride()[:2],
            KIND=kind,
            BLOCKS=triton.next_power_of_2(blocks),
            TOKENS=TOKENS,
            DIM=DIM,
        )
        best, following, token, token_following = following, best, token_following, token
    return [chosen[:count].clone() for chosen, count in zip(order, counts, strict=True)]


def padded_tokens(tokens: Sequence[Tensor]) -> Tensor:
    """All images in one `[images, longest, dim]`, zeros behind their ends; rows dense."""
    padded = tokens[0][None] if len(tokens) == 1 else pad_sequence(list(tokens), batch_first=True)
    return padded if padded.stride(2) == 1 else padded.contiguous()


def norms(padded: Tensor) -> Tensor:
    """Length of each vector `[images, longest]`, above 0."""
    return vector_norm(padded, dim=-1, dtype=torch.float32).clamp(min=1e-12)


def on_device(numbers: Sequence[int], like: Tensor) -> Tensor:
    """Numbers `[count]` where `like` is; filling them in needs no wait for a copy."""
    return torch.stack([like.new_full((), number, dtype=torch.int32) for number in numbers])
