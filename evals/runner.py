"""Asking a model the same questions under several methods and budgets, and keeping count of what each costs."""

from __future__ import annotations

import io
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from math import prod
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, cast

from PIL import Image

from mmcompress.accounting import StageSeconds, Stats
from mmcompress.budget import Budget
from mmcompress.errors import InputError, SpecError
from mmcompress.evals import micro
from mmcompress.evals.report import budget
from mmcompress.evals.suites import microvqa
from mmcompress.evals.suites.base import Picture, Question
from mmcompress.integrations.hf import wrap
from mmcompress.registry import METHODS
from mmcompress.spec import CompressionConfig, Spec


class Run(NamedTuple):
    """What is applied to the model, and the budget that makes runs comparable.

    Args:
        method: methods that share the work, joined by " + ", all but the last with budgets of their own, as in
            "divprune(keep=0.5) + transprune"; None for the unpruned model.
        keep: visual tokens per LLM layer, as a share or a count per item; None for methods whose own rule decides.
        kv: KV policies, joined and with budgets likewise, as in "snapkv(keep=0.5) + int8".
    """

    method: str | None
    keep: int | float | None
    kv: str | None = None

    @property
    def label(self) -> str:
        """One name for all of it."""
        visual = "unpruned" if self.method is None else f"{self.method} at {budget(self.keep)}"
        return f"{visual}, KV {self.kv}" if self.kv else visual


Images = Path | Mapping[str, Image.Image]

# Keeping all tokens gives the plain model's logits bit for bit, and the same hooks that time every other run.
UNPRUNED = ("uniform", 1.0)


@dataclass(frozen=True)
class Answer:
    """What was said to one question, what it scores, and whether it is an answer its type of question allows."""

    text: str
    score: float
    valid: bool

    @property
    def correct(self) -> bool:
        """Whether it is right without reserve."""
        return self.score >= 1

    @classmethod
    def grade(cls, text: str, question: micro.Question) -> Answer:
        """Compare with the right answer, exactly but for case and outer blanks.

        Raises:
            SpecError: the question is of no known type.
        """
        grade = microvqa.grade_as(text, question.type, question.answer)
        return cls(text.strip(), grade.score, grade.valid)


@dataclass(frozen=True)
class Spent:
    """What one answer cost: its own items and tokens, and its share of the time of its batch.

    Args:
        items: images of the question, as the model counts them.
        tokens: their visual tokens before compression.
        kept: those that entered the LLM.
        in_layers: those in an LLM layer, averaged over layers.
        prefill_flops: FLOPs of the LLM's prefill.
        kv_bytes: KV cache after the prefill; under a KV policy, what it holds at the end, padding included.
        seconds: time by stage; the encoder's as if nothing had been reused.
    """

    items: int
    tokens: int
    kept: int
    in_layers: float
    prefill_flops: int
    kv_bytes: float
    seconds: Mapping[str, float]

    @classmethod
    def rows(cls, stats: Stats) -> list[Spent]:
        """One for every row of a batch."""
        rows = len(stats.row_kept)
        seconds = {stage: seconds / rows for stage, seconds in asdict(stats.seconds).items()}
        by_layer = stats.rows_by_layer
        spent = []
        for row in range(rows):
            items = [item for item in stats.items if item.row == row]
            layers = [in_layer[row] for in_layer in by_layer]
            kept = sum(item.kept for item in items)
            words = stats.row_kept[row] - kept
            held = stats.shape.kv_bytes(layers) if stats.kv_held is None else stats.kv_held / rows
            spent.append(
                cls(
                    items=len(items),
                    tokens=sum(item.tokens for item in items),
                    kept=kept,
                    in_layers=sum(layers) / len(layers) - words,
                    prefill_flops=stats.shape.prefill_flops(layers),
                    kv_bytes=held,
                    seconds=seconds,
                )
            )
        return spent


@dataclass(frozen=True)
class Cost:
    """What one question costs on average.

    Args:
        tokens: visual tokens per item before compression.
        kept: visual tokens per item that entered the LLM.
        tokens_per_layer: visual tokens per item, averaged over the LLM's layers.
        prefill_flops: FLOPs of the LLM's prefill per question.
        kv_bytes: KV cache per question, in bytes; see `Spent`.
        seconds: time by stage per question, the median over questions.
    """

    tokens: float
    kept: float
    tokens_per_layer: float
    prefill_flops: float
    kv_bytes: float
    seconds: StageSeconds

    @classmethod
    def of(cls, answers: Sequence[Spent]) -> Cost:
        """The average over `answers`."""
        items = sum(spent.items for spent in answers)
        # On a busy machine single batches take many times as long as all others.
        seconds = {stage: median(spent.seconds[stage] for spent in answers) for stage in vars(StageSeconds())}
        return cls(
            tokens=sum(spent.tokens for spent in answers) / items,
            kept=sum(spent.kept for spent in answers) / items,
            tokens_per_layer=sum(spent.in_layers for spent in answers) / items,
            prefill_flops=sum(spent.prefill_flops for spent in answers) / len(answers),
            kv_bytes=sum(spent.kv_bytes for spent in answers) / len(answers),
            seconds=StageSeconds(**seconds),
        )


@dataclass(frozen=True)
class Result:
    """One run: an answer per question, in the order of the questions, and what they cost."""

    method: str | None
    keep: int | float | None
    answers: list[Answer]
    cost: Cost


class Said(NamedTuple):
    """What one run, by its number, said to one batch, and what every answer cost."""

    run: int
    texts: list[str]
    spent: list[Spent]


def evaluate(
    model: Any,
    processor: Any,
    questions: Sequence[micro.Question],
    images: Images,
    runs: Sequence[tuple[Any, ...]],
    *,
    batch_size: int = 64,
    max_new_tokens: int = 8,
    progress: Callable[[int], None] = lambda answered: None,
) -> list[Result]:
    """Answer every embedded question greedily in every run; the model is left as it was.

    Args:
        model: a supported transformers model that is not wrapped.
        processor: its processor.
        questions: what to ask.
        images: the folder that `image` of a question is relative to, or the pictures by that name.
        runs: the arguments of `Run` for each.
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
    wanted = [Run(*run) for run in runs]
    said: list[list[Answer]] = [[] for _ in wanted]
    spent: list[list[Spent]] = [[] for _ in wanted]
    for first, batch in enumerate(batches(questions, batch_size)):
        asked = [microvqa.as_question(question, _picture(question.image, images)) for question in batch]
        inputs = encode(model, processor, asked, {picture: picture.open() for one in asked for picture in one.images})
        if first == 0:
            warm_up(model, inputs, max_new_tokens)
        for run, texts, costs in ask(model, processor, inputs, wanted, max_new_tokens):
            said[run] += [Answer.grade(text, question) for text, question in zip(texts, batch, strict=True)]
            spent[run] += costs
            progress(len(batch))
    return [
        Result(run.method, run.keep, answers, Cost.of(costs))
        for run, answers, costs in zip(wanted, said, spent, strict=True)
    ]


def warm_up(model: Any, inputs: Any, max_new_tokens: int) -> None:
    """Answer once for nothing: the first pass of a process is slow and would be booked on the first run."""
    model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)


def ask(model: Any, processor: Any, inputs: Any, runs: Sequence[Run], max_new_tokens: int) -> Generator[Said]:
    """Answer one batch greedily in every one of `runs`, which share what the vision encoder makes of it.

    Raises:
        SpecError: a run is malformed.
        UnsupportedError: a run is not possible on this model.
    """
    configs = [configure(*run) for run in runs]
    generate = {**inputs, "max_new_tokens": max_new_tokens, "do_sample": False}
    prompt_length = inputs["input_ids"].shape[1]
    for alike in _sharing(configs):
        encoder = 0.0
        with wrap(model, configs[alike[0]]) as handle, handle.reuse_vision():
            for number in alike:
                if number != alike[0]:
                    handle.set(**cast(Budget, configs[number].methods[0].keep).option)
                generated = model.generate(**generate)[:, prompt_length:]
                stats = handle.stats
                assert stats is not None  # every question has an image
                if stats.reused < 1:
                    encoder = stats.seconds.encoder / (1 - stats.reused)
                stats = replace(stats, seconds=replace(stats.seconds, encoder=encoder))
                texts = processor.batch_decode(generated, skip_special_tokens=True)
                yield Said(number, texts, Spent.rows(stats))


def _sharing(configs: Sequence[CompressionConfig]) -> list[list[int]]:
    """Numbers of those that differ in nothing but a budget that a wrapped model can change, together."""
    alike: dict[Any, list[int]] = {}
    for number, config in enumerate(configs):
        method = replace(config.methods[0], keep=None)
        alone = len(config.methods) == 1 and not config.kv
        alike.setdefault(str(method) if alone else number, []).append(number)
    return list(alike.values())


def configure(methods: str | None, keep: int | float | None, kv: str | None = None) -> CompressionConfig:
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
    return CompressionConfig.create([*before, last], kv=None if kv is None else kv.split(" + "))


def open_image(path: Path) -> Image.Image:
    """Read a picture as RGB, turned upright.

    Raises:
        InputError: the file is missing or no readable picture.
    """
    return Picture(str(path), path).open()


def batches(questions: Sequence[Any], size: int) -> Iterator[list[Any]]:
    """`questions` in their order, `size` at a time."""
    remaining = iter(questions)
    while batch := list(islice(remaining, size)):
        yield batch


def prompt(processor: Any, question: str, images: int = 1) -> str:
    """Pictures and `question` in the chat format of a model.

    Raises:
        InputError: the question contains what stands for a picture.
    """
    mark = getattr(processor, "image_token", None)
    if mark and mark in question:
        raise InputError(f"the question contains {mark}, which stands for a picture.")
    content = [*({"type": "image"} for _ in range(images)), {"type": "text", "text": question}]
    return str(processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True))


def encode(
    model: Any, processor: Any, batch: Sequence[Question], pictures: Mapping[Picture, Image.Image], said: str = ""
) -> Any:
    """The model's inputs for a batch, whose answers begin with what is `said`.

    Raises:
        InputError: the processor refuses a question or a picture.
    """
    try:
        inputs = processor(
            images=[[pictures[picture] for picture in asked.images] for asked in batch],
            text=[prompt(processor, asked.prompt, len(asked.images)) + said for asked in batch],
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
    except ValueError as error:
        raise InputError(f"the model's processor cannot encode it: {' '.join(str(error).split())}") from error
    return inputs.to(model.device, model.dtype)


def _picture(name: str, images: Images) -> Picture:
    if isinstance(images, Path):
        return Picture(name, images / name)
    file = io.BytesIO()
    images[name].save(file, "PNG", compress_level=1)
    return Picture(name, data=file.getvalue())
