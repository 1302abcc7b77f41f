"""How long an answer takes by stage under methods and KV policies, beside the unpruned model and what FLOPs allow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from mmcompress.accounting import Stats
from mmcompress.errors import SpecError
from mmcompress.evals.bench.memory import bytes_held, peak
from mmcompress.evals.bench.rows import Sheet, publish_sheets
from mmcompress.evals.bench.shapes import Size, repeated
from mmcompress.evals.bench.stages import STAGES, timed
from mmcompress.evals.bench.timing import spread
from mmcompress.evals.comparison import plan
from mmcompress.evals.environment import device_name, environment
from mmcompress.evals.report import budget
from mmcompress.evals.runner import Run, configure
from mmcompress.integrations.hf import wrap

FORMAT, VERSION = "mmcompress-bench", 1
PARTS = (*STAGES, "other")
WHO = ("methods", "keep", "batch")
TIMES = (*WHO, "encoder", "taps", "select", "project", "prefill", "other", "TTFT", "±", "TPOT", "±")
GAINS = (*WHO, "tokens/layer", "TTFT x", "LLM x", "limit x", "of limit", "pays from", "peak MB", "KV MB")
NOTES = (
    "Milliseconds of one generate(), medians of runs taken in turns in one process after a warm-up; ±: half of what "
    "lies between the quartiles. The parts of each run add up to TTFT; other is what no hook sees: embedding the "
    "text, packing tiles, the head, generate() itself. TPOT: per token behind the first.",
    "taps: statistics read inside the encoder. select: choosing and merging before the LLM; what is chosen inside the "
    "encoder or the LLM is part of encoder or prefill.",
    "tokens/layer: visual tokens in an LLM layer, on average, of those of a prompt. x: time of the unpruned model over "
    "that of the run; LLM: of the prefill; limit: the same for its FLOPs; of limit: LLM x over limit x.",
    "pays from: the visual tokens of a prompt from which on taps and select cost less than the prefill gains, if their "
    "cost is fixed and the gain grows with the tokens. never: nothing was gained.",
    "peak: of the process on a CPU, of allocations on a GPU. KV: what the cache holds behind the last token, all rows.",
)


@dataclass(frozen=True)
class Sample:
    """One run: seconds by part of TTFT, TTFT, TPOT, and bytes."""

    parts: Mapping[str, float]
    ttft: float
    tpot: float
    peak_bytes: int | None
    kv_bytes: int


@dataclass(frozen=True)
class Row:
    """One method at one size of picture and batch; the unpruned model where `methods` and `kv` are None.

    Args:
        methods: what compresses, see `Run`.
        keep: its budget.
        kv: the KV policies.
        image: width and height.
        batch: rows.
        tokens: visual tokens of a prompt.
        in_llm: those in an LLM layer, averaged over layers.
        flop_ratio: FLOPs of the whole prefill over those that are left.
        samples: one for every run.
        unpruned: the row of the unpruned model; None if it is this one.
    """

    methods: str | None
    keep: int | float | None
    kv: str | None
    image: Size
    batch: int
    tokens: int
    in_llm: float
    flop_ratio: float
    samples: Sequence[Sample]
    unpruned: Row | None = field(default=None, repr=False)

    def part(self, name: str) -> float:
        """Median seconds of a part of TTFT."""
        return median(sample.parts[name] for sample in self.samples)

    @property
    def ttft(self) -> tuple[float, float]:
        """Median seconds to the first token, and their spread."""
        return spread([sample.ttft for sample in self.samples])

    @property
    def tpot(self) -> tuple[float, float]:
        """The same for each token behind it."""
        return spread([sample.tpot for sample in self.samples])

    @property
    def ttft_ratio(self) -> float:
        """TTFT of the unpruned model over that of this row."""
        return (self.unpruned or self).ttft[0] / self.ttft[0]

    @property
    def prefill_ratio(self) -> float:
        """The same for the prefill."""
        return (self.unpruned or self).part("prefill") / self.part("prefill")

    @property
    def pays_from(self) -> float | None:
        """See `break_even`."""
        saved = (self.unpruned or self).part("prefill") - self.part("prefill")
        return break_even(self.tokens, self.part("taps") + self.part("selection"), saved)

    @property
    def peak_bytes(self) -> int | None:
        """The most memory of all runs, where it is known."""
        known = [sample.peak_bytes for sample in self.samples if sample.peak_bytes is not None]
        return max(known, default=None)

    def record(self) -> dict[str, Any]:
        """The row as JSON, all runs included."""
        (ttft, ttft_spread), (tpot, tpot_spread) = self.ttft, self.tpot
        return {
            "methods": self.methods,
            "keep": self.keep,
            "kv": self.kv,
            "image": list(self.image),
            "batch": self.batch,
            "tokens": self.tokens,
            "in_llm": self.in_llm,
            "seconds": {name: self.part(name) for name in PARTS},
            "ttft": ttft,
            "ttft_spread": ttft_spread,
            "tpot": tpot,
            "tpot_spread": tpot_spread,
            "ttft_ratio": self.ttft_ratio,
            "prefill_ratio": self.prefill_ratio,
            "flop_ratio": self.flop_ratio,
            "of_limit": self.prefill_ratio / self.flop_ratio,
            "pays_from": self.pays_from if self.unpruned else None,
            "peak_bytes": self.peak_bytes,
            "kv_bytes": self.samples[0].kv_bytes,
            "samples": [asdict(sample) for sample in self.samples],
        }

    def times(self) -> list[str]:
        """The row in the order of `TIMES`."""
        seconds = [*map(self.part, PARTS), *self.ttft, *self.tpot]
        return [*self._who(), *(f"{1000 * value:.1f}" for value in seconds)]

    def gains(self) -> list[str]:
        """The row in the order of `GAINS`."""
        ratios = [f"{ratio:.2f}" for ratio in (self.ttft_ratio, self.prefill_ratio, self.flop_ratio)]
        achieved = f"{100 * self.prefill_ratio / self.flop_ratio:.0f}%"
        pays = "never" if self.pays_from is None else f"{self.pays_from:.0f}"
        held = "" if self.peak_bytes is None else f"{self.peak_bytes / 1e6:.0f}"
        tokens, kv = f"{self.in_llm:.0f} of {self.tokens}", f"{self.samples[0].kv_bytes / 1e6:.2f}"
        return [*self._who(), tokens, *ratios, achieved, pays if self.unpruned else "", held, kv]

    def _who(self) -> list[str]:
        label = " + ".join(filter(None, [self.methods, self.kv and f"KV {self.kv}"])) or "unpruned"
        return [label, budget(self.keep), f"{self.batch} of {self.image[0]}x{self.image[1]}"]


def break_even(tokens: int, cost: float, saved: float) -> float | None:
    """Visual tokens from which on a method pays: `tokens * cost / saved`; None if it saves nothing.

    Measured at `tokens`, selection takes `cost` seconds and the prefill `saved` fewer. With n tokens the prefill saves
    `n * saved / tokens`, if the gain is proportional to them, and the cost is as much as it is here: they meet at the n
    returned. Below `tokens` both are less, above them both are more; a method that pays where it was measured has its
    break-even below.
    """
    return tokens * cost / saved if saved > 0 else None


def measure(model: Any, prompt: Mapping[str, Tensor], run: Run | None, new_tokens: int) -> tuple[Sample, Stats | None]:
    """Generate `new_tokens` under `run`, None for the model as it is."""
    with nullcontext() if run is None else wrap(model, configure(*run)) as handle:
        with peak(model.device) as most, timed(model) as watch:
            output = model.generate(
                **prompt,
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                do_sample=False,
                use_cache=True,
                stopping_criteria=[watch],
                return_dict_in_generate=True,
            )
        parts, held = watch.stages(), bytes_held(output.past_key_values)
        sample = Sample(parts, watch.first_token(), watch.other_tokens(), most.bytes, held)
        return sample, None if handle is None else handle.stats


def compare(
    model: Any, prompt: Mapping[str, Tensor], runs: Sequence[Run], image: Size, repeats: int, new_tokens: int
) -> list[Row]:
    """The model as it is and then every one of `runs`, `repeats` times in turns after a warm-up."""
    everyone = [None, *runs]
    samples: list[list[Sample]] = [[] for _ in everyone]
    _, whole = measure(model, prompt, Run(None, 1.0), new_tokens)
    stats = [whole for _ in everyone]
    for turn in range(repeats + 1):
        for number, run in enumerate(everyone):
            sample, found = measure(model, prompt, run, new_tokens)
            stats[number] = found or whole
            if turn:
                samples[number].append(sample)
    rows: list[Row] = []
    batch = len(prompt["input_ids"])
    for run, taken, found in zip(everyone, samples, stats, strict=True):
        assert found is not None  # the prompt has a picture
        per_item = sum(found.tokens_per_layer) / found.shape.layers
        rows.append(
            Row(
                *(run or Run(None, 1.0)),
                image=image,
                batch=batch,
                tokens=found.tokens // batch,
                in_llm=per_item * len(found.items) / batch,
                flop_ratio=found.prefill_flops_full / found.prefill_flops,
                samples=taken,
                unpruned=rows[0] if rows else None,
            )
        )
    return rows


@dataclass(frozen=True)
class Terms:
    """What is measured.

    Args:
        methods: specs, or stacks joined by +.
        keeps: visual tokens per LLM layer.
        policies: KV policies.
        batches: rows.
        new_tokens: of each answer, at least 2.
        repeats: measurements of each run.
    """

    methods: Sequence[str]
    keeps: Sequence[int | float]
    policies: Sequence[str]
    batches: Sequence[int]
    new_tokens: int
    repeats: int


def bench(
    name: str, model: Any, prompts: Mapping[Size, Mapping[str, Tensor]], terms: Terms, out: Path, console: Console
) -> list[Row]:
    """Measure `terms` on prompts of one row by the size of their picture; print it, and write it to the folder `out`.

    Raises:
        MMCompressError: a KV policy does not work here, or nothing can be run.
    """
    for policy in terms.policies:
        wrap(model, kv=policy.split(" + ")).unwrap()
    chosen = plan(model, terms.methods, terms.keeps, terms.policies)
    runs, left_out = chosen.runs[1:], dict(chosen.left_out)
    if left_out and not runs:
        raise SpecError("nothing is left to measure. " + " ".join(f"{what}: {why}" for what, why in left_out.items()))
    rows: list[Row] = []
    settings = [(size, batch) for size in prompts for batch in terms.batches]
    with torch.inference_mode():
        for size, batch in track(settings, "measuring", console=console, transient=True):
            try:
                prompt = repeated(prompts[size], batch)
                rows += compare(model, prompt, runs, size, terms.repeats, terms.new_tokens)
            except torch.OutOfMemoryError:
                left_out[f"batch of {batch} at {size[0]}x{size[1]}"] = "out of memory."
    if not rows:
        raise SpecError("no batch fits into memory; try a smaller one with --batch, or --layers.")
    _publish(name, model, rows, left_out, terms, out, console)
    return rows


def _publish(
    name: str,
    model: Any,
    rows: Sequence[Row],
    left_out: Mapping[str, str],
    terms: Terms,
    out: Path,
    console: Console,
) -> None:
    layers, dtype = model.config.get_text_config().num_hidden_layers, str(model.dtype).removeprefix("torch.")
    facts = environment() | {"device": device_name(model.device)}
    notes = [f"{name} with {layers} LLM layers, {dtype}, {terms.repeats} runs, {terms.new_tokens} new tokens.", *NOTES]
    notes += [f"left out: {what}: {why}" for what, why in left_out.items()]
    notes.append(", ".join(f"{fact} {value}" for fact, value in facts.items()))
    record = {
        "format": FORMAT,
        "version": VERSION,
        "environment": facts,
        "model": name,
        "layers": layers,
        "dtype": dtype,
        **asdict(terms),
        "left_out": left_out,
        "rows": [row.record() for row in rows],
    }
    sheets = [Sheet(TIMES, [row.times() for row in rows]), Sheet(GAINS, [row.gains() for row in rows])]
    publish_sheets(out, sheets, notes, record, console)
