"""Questions with their answers as conversations that a model is trained on."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mmcompress.errors import InputError, UnsupportedError
from mmcompress.evals.suites.base import Picture, Question, Suite

IGNORED = -100  # of labels

Conversation = Sequence[Question]
"""Questions about the same images, which are shown with the first."""


def readable(suite: Suite) -> list[Question]:
    """The questions of a dataset, all of whose images are there.

    Raises:
        SpecError: its files are absent.
        InputError: a row is malformed, or has no image or no answer, or its image is missing.
    """
    questions, problems = suite.read()
    for asked in questions:
        if not asked.images or not asked.answers:
            raise InputError(f"question {asked.id} of {suite.folder} has no {'answer' if asked.images else 'image'}.")
        for picture in asked.images:
            if picture.path is not None and not picture.path.is_file():
                raise InputError(f"question {asked.id} of {suite.folder}: image {picture.name} does not exist.")
    if problems:
        raise InputError(
            f"{len(problems)} rows of {suite.folder} are malformed: {problems[0].where}: {problems[0].reason}"
        )
    return questions


def grouped(questions: Sequence[Question], turns: int, seed: int) -> list[Conversation]:
    """Conversations of at most `turns` questions, in an order that `seed` draws."""
    groups = dict[tuple[Picture, ...], list[Question]]()
    for asked in random.Random(f"{seed} turns").sample(questions, len(questions)):
        groups.setdefault(asked.images, []).append(asked)
    return [group[i : i + turns] for group in groups.values() for i in range(0, len(group), turns)]


def check_template(processor: Any, conversations: Sequence[Conversation]) -> None:
    """Whether the processor's chat format can word these conversations.

    Raises:
        UnsupportedError: it has none, or writes a conversation anew with every turn.
    """
    if not getattr(processor, "chat_template", None):
        raise UnsupportedError("the model's processor has no chat template, so its prompt format is not known.")
    _chat(processor, max(conversations, key=len))


def batch(processor: Any, conversations: Sequence[Conversation]) -> Any:
    """Conversations as a model is trained on them, padded on the left; labels are answers alone.

    The images of a conversation are shown with its first question. An answer is the one most annotators gave; it is
    encoded by itself, behind the prompt as generation sees it.

    Raises:
        InputError: an image cannot be read.
        UnsupportedError: the chat template writes a conversation anew with every turn.
    """
    pictures = [picture.open() for asked in conversations for picture in asked[0].images]
    openings, rests = zip(*(_chat(processor, asked) for asked in conversations), strict=True)
    inputs = processor(images=pictures, text=list(openings), padding=True, return_tensors="pt")
    rows, labels = [], []
    for row, mask, rest in zip(inputs["input_ids"], inputs["attention_mask"], rests, strict=True):
        opening = row[mask.bool()]
        rows.append(torch.cat([opening, *(ids for ids, _ in rest)]))
        silent = [torch.full_like(opening, IGNORED)]
        labels.append(torch.cat(silent + [ids if answers else torch.full_like(ids, IGNORED) for ids, answers in rest]))
    inputs["input_ids"] = _left_padded(rows, processor.tokenizer.pad_token_id)
    inputs["attention_mask"] = _left_padded([torch.ones_like(row) for row in rows], 0)
    inputs["labels"] = _left_padded(labels, IGNORED)
    return inputs


def _chat(processor: Any, asked: Conversation) -> tuple[str, list[tuple[Tensor, bool]]]:
    """The first prompt in the model's chat format, and the tokens of each part that follows: is it an answer?"""
    tokenizer = processor.tokenizer
    turns, said, parts = list[dict[str, Any]](), "", list[str]()
    for question in asked:
        shown = question.images if not turns else ()
        content = [*({"type": "image"} for _ in shown), {"type": "text", "text": question.prompt}]
        turns.append({"role": "user", "content": content})
        prompt = processor.apply_chat_template(turns, add_generation_prompt=True)
        if not prompt.startswith(said):
            raise UnsupportedError("the chat template writes a conversation anew with every turn; train with turns=1.")
        ((answer, _),) = Counter(question.answers).most_common(1)
        turns.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        whole = processor.apply_chat_template(turns)
        ending = whole.removeprefix(prompt) if whole.startswith(prompt) else f" {answer}"
        parts += [prompt.removeprefix(said), ending]
        said = prompt + ending
    opening, *rest = parts
    return opening, [(_encoded(tokenizer, part, i % 2 == 0), i % 2 == 0) for i, part in enumerate(rest)]


def _encoded(tokenizer: Any, part: str, is_answer: bool) -> Tensor:
    """The tokens of a part; an answer ends as generation does, also where the template has but a blank behind it."""
    ends = [] if not is_answer or tokenizer.eos_token in part else [tokenizer.eos_token_id]
    return torch.tensor(tokenizer(part.rstrip() if ends else part, add_special_tokens=False)["input_ids"] + ends)


def _left_padded(rows: Sequence[Tensor], value: int) -> Tensor:
    return pad_sequence(list(rows), batch_first=True, padding_value=value, padding_side="left")
