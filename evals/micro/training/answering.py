"""Teaching a language model to answer from visual tokens, all of them or some."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from mmcompress.evals.micro.training.architectures import TOKEN_IDS
from mmcompress.evals.micro.training.families import Prefix
from mmcompress.evals.micro.training.packing import NOTHING
from mmcompress.evals.micro.training.targets import IGNORE


class Answered(NamedTuple):
    """What came of asking.

    Args:
        loss: of the answers' tokens.
        right: share of them said right.
        looks: attention of every layer from the questions' tokens to the prefix [batch, heads, length, kept tokens].
    """

    loss: Tensor
    right: Tensor
    looks: list[Tensor]


class Dropout(NamedTuple):
    """Which visual tokens a batch may see.

    Args:
        kept: per row, indices of the prefix tokens that stay, ascending [batch, kept tokens].
        renumbered: whether what stays gets positions without gaps.
    """

    kept: Tensor
    renumbered: bool


def keep_all(prefix: Prefix, rows: int) -> Dropout:
    """No dropout."""
    return Dropout(torch.arange(len(prefix.ids)).expand(rows, -1), renumbered=False)


def drop(prefix: Prefix, rows: int, keep: float, renumbered: bool, generator: torch.Generator) -> Dropout:
    """Keep a random share `keep` of each row's droppable tokens, at least one."""
    droppable = prefix.droppable.nonzero()[:, 0]
    count = max(1, round(keep * len(droppable)))
    chosen = torch.rand(rows, len(droppable), generator=generator).argsort(1)[:, :count]
    fixed = (~prefix.droppable).nonzero()[:, 0].expand(rows, -1)
    return Dropout(torch.cat([fixed, droppable[chosen]], 1).sort(1).values, renumbered)


def answer(
    model: Any,
    features: Tensor,
    prefix: Prefix,
    dropout: Dropout,
    ids: Tensor,
    block: Tensor,
    offset: Tensor,
    target: Tensor,
    watched: bool = False,
) -> Answered:
    """Ask and compare.

    Args:
        model: a vision-language model.
        features: visual tokens as they enter the LLM [batch, visual tokens, dim].
        prefix: the prompt up to the questions.
        dropout: what of the prefix is seen.
        ids: of packed questions, see `Packed`, like the rest [batch, length].
        block: number of the question.
        offset: position within the question.
        target: token to be said next.
        watched: whether to see where the language model, which must be on eager attention, looks.
    """
    device, rows = features.device, len(features)
    embed = model.get_input_embeddings()
    words = embed(prefix.ids.to(device)).to(features.dtype).expand(rows, -1, -1).clone()
    words[:, prefix.visual.to(device)] = features
    kept = dropout.kept.to(device)
    shown = words.gather(1, kept[..., None].expand(-1, -1, words.shape[-1]))
    positions, following = prefix.positions.to(device)[:, kept], prefix.following
    if dropout.renumbered:
        positions, following = torch.arange(kept.shape[1], device=device).expand_as(positions), kept.shape[1]
    positions = torch.cat([positions, (following + offset).expand(len(positions), -1, -1)], 2)
    out = model.model.language_model(
        inputs_embeds=torch.cat([shown, embed(ids).to(features.dtype)], 1),
        position_ids=positions[0] if len(positions) == 1 else positions,
        attention_mask=_additive(_visible(kept.shape[1], block), features),
        use_cache=False,
        output_attentions=watched,
    )
    states = out.last_hidden_state[:, kept.shape[1] :]
    asked = target != IGNORE
    logits, wanted = model.lm_head(states[asked]).float(), target[asked]
    loss = functional.cross_entropy(logits, wanted)
    with torch.no_grad():
        said = wanted != TOKEN_IDS["</s>"]
        right = (logits.argmax(1) == wanted)[said].float().mean()
    looks = [weights[:, :, kept.shape[1] :, : kept.shape[1]] for weights in out.attentions or ()]
    return Answered(loss, right, looks)


def looking(look: Tensor, referent: Tensor, owners: Tensor) -> Tensor:
    """The loss of not looking at what is asked about when an answer is due.

    Args:
        look: attention from the questions' tokens to the visual tokens [batch, heads, length, visual tokens].
        referent: see `Packed` [batch, length].
        owners: the object each visual token shows [batch, visual tokens].
    """
    row, place = (referent != NOTHING).nonzero(as_tuple=True)
    shows = owners[row] == referent[row, place, None]
    seen = shows.any(1)  # others may hide an object from every token
    mass = (look[row, :, place].float() * shows[:, None]).sum(2)[seen]
    return -mass.clamp(min=1e-6).log().sum() / max(1, mass.numel())


def _visible(shown: int, block: Tensor) -> Tensor:
    """Which tokens each token sees [batch, tokens, tokens]: everything before it, but no other question."""
    length = shown + block.shape[1]
    visible = torch.ones(length, length, dtype=torch.bool, device=block.device).tril().repeat(len(block), 1, 1)
    visible[:, shown:, shown:] &= block[:, :, None] == block[:, None, :]
    return visible


def _additive(visible: Tensor, like: Tensor) -> Tensor:
    mask = torch.zeros(visible.shape, dtype=like.dtype, device=like.device)
    return mask.masked_fill_(~visible, torch.finfo(like.dtype).min)[:, None]
