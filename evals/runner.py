"""Asking a model the same questions under several methods and budgets, and keeping count of what each costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from math import prod
from pathlib import Path
from statistics import median
from typing import Any, cast

from PIL import Image, ImageOps

from mmcompress.accounting import StageSeconds, Stats
from mmcompress.budget import Budget
from mmcompress.errors import InputError, SpecError, unknown_name
from mmcompress.evals import micro
from mmcompress.evals.micro.vocabulary import COLOR_NAMES, DIGITS, LETTERS, OPTION_LETTERS, SHAPE_NAMES
from mmcompress.integrations.hf import wrap
from mmcompress.registry import METHODS
from mmcompress.spec import CompressionConfig, Spec

Run = tuple[str | None, int | float | None]
"""Methods, and the budget that makes runs comparable: visual tokens per LLM layer, as a share or a count per item.

Methods that share the work are joined by " + ", and all but the last have budgets of their own, as in
"divprune(keep=0.5) + transprune". None for the methods stands for the unpruned model; None for the budget for
methods whose own rule says how many tokens are left.
"""

Images = Path | Mapping[str, Image.Image]

# Keeping all tokens gives the plain model's logits bit for bit, and the same hooks that time every other run.
UNPRUNED = ("uniform", 1.0)

_CLOSED_ANSWERS = {
    "exist": {"yes", "no"},
    "spatial": {"yes", "no"},
    "choice": {letter.lower() for letter in OPTION_LETTERS},
    "attribute": {*COLOR_NAMES, *SHAPE_NAMES},
    "compose": {"yes", "no", *COLOR_NAMES, *SHAPE_NAMES},
}
_CHARACTERS = {*DIGITS, *LETTERS.lower()}


@dataclass(frozen=True)
class Answer:
    """What was said to one question; `valid` if it is one of the answers its type of question allows."""

    text: str
    correct: bool
    valid: bool

    @classmethod
    def grade(cls, text: str, question: micro.Question) -> Answer:
        """Compare with the right answer, exactly but for case and outer blanks.

        Raises:
            SpecError: the question is of no known type.
        """
        given = text.strip().lower()
        if question.type == "count":
            valid = given.replace(" ", "").isdecimal()
        elif question.type == "read":
            valid = given != "" and set(given.split()) <= _CHARACTERS
        elif question.type in _CLOSED_ANSWERS:
            valid = given in _CLOSED_ANSWERS[question.type]
        else:
            raise unknown_name("question type", question.type, {"count", "read", *_CLOSED_ANSWERS})
        return cls(text.strip(), given == question.answer.strip().lower(), valid)


@dataclass(frozen=True)
class Cost:
    """What one question costs on average.

    Args:
        tokens: visual tokens per item before compression.
        kept: visual tokens per item that entered the LLM.
        tokens_per_layer: visual tokens per item, averaged over the LLM's layers.
        prefill_flops: FLOPs of the LLM's prefill per question.
        kv_bytes: KV cache after the prefill per question, in bytes.
        seconds: time by stage per question, the median over batches; the encoder's as if nothing had been reused.
    """

    tokens: float
    kept: float
    tokens_per_layer: float
    prefill_flops: float
    kv_bytes: float
    seconds: StageSeconds

    @classmethod
    def of(cls, batches: Sequence[Stats]) -> Cost:
        """The average over all that `batches` contain."""
        items = sum(len(stats.items) for stats in batches)
        questions = sum(len(stats.row_kept) for stats in batches)
        layers = sum(sum(stats.tokens_per_layer) / stats.shape.layers * len(stats.items) for stats in batches)

        def seconds(stage: str) -> float:
            # On a busy machine single batches take many times as long as all others.
            return median(getattr(stats.seconds, stage) / len(stats.row_kept) for stats in batches)

        return cls(
            tokens=sum(stats.tokens for stats in batches) / items,
            kept=sum(stats.kept for stats in batches) / items,
            tokens_per_layer=layers / items,
            prefill_flops=sum(stats.prefill_flops for stats in batches) / questions,
            kv_bytes=sum(stats.kv_bytes for stats in batches) / questions,
            seconds=StageSeconds(**{stage: seconds(stage) for stage in vars(StageSeconds())}),
        )


@dataclass(frozen=True)
class Result:
    """One run: an answer per question, in the order of the questions, and what they cost."""

    method: str | None
    keep: int | float | None
    answers: list[Answer]
    cost: Cost


def evaluate(
    model: Any,
    processor: Any,
    questions: Sequence[micro.Question],
    images: Images,
    runs: Sequence[Run],
    *,
    batch_size: int = 64,
    max_new_tokens: int = 8,
    progress: Callable[[int], None] = lambda answered: None,
) -> list[Result]:
    """Answer every question greedily in every run; the model is left as it was.

    The runs take turns batch by batch, so that a machine that slows down slows all of them, and the runs of one
    method share what the vision encoder makes of a batch.

    Args:
        model: a supported transformers model that is not wrapped.
        processor: its processor.
        questions: what to ask.
        images: the folder that `image` of a question is relative to, or the pictures by that name.
        runs: methods and budgets.
        batch_size: questions asked at once, padded on the left.
        max_new_tokens: the longest answer.
        progress: told after every batch of every run how many questions were answered.

    Raises:
        SpecError: there are no questions, or a run is malformed.
        UnsupportedError: a run is not possible on this model.
        InputError: an image cannot be read.
    """
    if not questions or batch_size < 1:
        raise SpecError("evaluate needs at least one question, and a batch_size of at least 1.")
    said: list[list[Answer]] = [[] for _ in runs]
    spent: list[list[Stats]] = [[] for _ in runs]
    configs = [configure(*run) for run in runs]
    alike: dict[Any, list[int]] = {}
    for number, config in enumerate(configs):
        method = replace(config.methods[0], keep=None)
        alike.setdefault(str(method) if len(config.methods) == 1 else number, []).append(number)

    for first, batch in enumerate(_batches(questions, batch_size)):
        inputs = _encode(processor, batch, images).to(model.device, model.dtype)
        generate = {**inputs, "max_new_tokens": max_new_tokens, "do_sample": False}
        if first == 0:
            model.generate(**generate)  # the first pass of a process is slow and would be booked on the first run
        for numbers in alike.values():
            encoder = 0.0
            with wrap(model, configs[numbers[0]]) as handle, handle.reuse_vision():
                for number in numbers:
                    if number != numbers[0]:
                        handle.set(**cast(Budget, configs[number].methods[0].keep).option)
                    generated = model.generate(**generate)[:, inputs["input_ids"].shape[1] :]
                    stats = handle.stats
                    assert stats is not None  # every prompt has an image
                    if stats.reused < 1:
                        encoder = stats.seconds.encoder / (1 - stats.reused)
                    spent[number].append(replace(stats, seconds=replace(stats.seconds, encoder=encoder)))
                    texts = processor.batch_decode(generated, skip_special_tokens=True)
                    said[number] += [Answer.grade(text, asked) for text, asked in zip(texts, batch, strict=True)]
                    progress(len(batch))
    return [
        Result(method, keep, answers, Cost.of(stats))
        for (method, keep), answers, stats in zip(runs, said, spent, strict=True)
    ]


def configure(methods: str | None, keep: int | float | None) -> CompressionConfig:
    """What a run applies to the model.

    Raises:
        SpecError: a method or a budget is malformed.
    """
    if methods is None:
        methods, keep = UNPRUNED
    *before, last = (Spec.parse(part) for part in methods.split(" + "))
    if keep is not None and any(spec.keep is None or not isinstance(spec.keep.keep, float) for spec in before):
        raise SpecError(f"{methods}: methods before the last one need a keep= that is a fraction.")
    if keep is not None:
        card: Any = METHODS.get(last.name)
        inside = card.info.stage == "in_llm"
        entering = prod(spec.keep.keep for spec in before if spec.keep is not None)
        if before and not 0 < keep <= entering:
            raise SpecError(f"{methods}: keep={keep} is more than enters the LLM, {entering:g}, or no fraction.")
        last = replace(last, keep=Budget(keep / entering if before else keep, average=inside))
    return CompressionConfig((*before, last))


def open_image(path: Path) -> Image.Image:
    """Read a picture as RGB, turned upright.

    Raises:
        InputError: the file is missing or no readable picture.
    """
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I"):  # 16 bits per pixel, which convert() would clip to white
                upright = upright.point(lambda value: value / 257).convert("L")
            return upright.convert("RGB")
    except FileNotFoundError as error:
        raise InputError(f"image {path} does not exist.") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"image {path} cannot be read: {error}") from error


def _batches(questions: Sequence[micro.Question], size: int) -> Iterator[list[micro.Question]]:
    remaining = iter(questions)
    while batch := list(islice(remaining, size)):
        yield batch


def prompt(processor: Any, question: str) -> str:
    """One picture and `question` in the chat format of a model."""
    content = [{"type": "image"}, {"type": "text", "text": question}]
    return str(processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True))


def _encode(processor: Any, batch: Sequence[micro.Question], images: Images) -> Any:
    names = {asked.image for asked in batch}
    pictures = images if isinstance(images, Mapping) else {name: open_image(images / name) for name in names}
    return processor(
        images=[[pictures[asked.image]] for asked in batch],
        text=[prompt(processor, asked.question) for asked in batch],
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )
