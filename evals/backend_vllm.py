"""Answers of vLLM's offline engine to the same questions, with compression by its configuration."""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console

from mmcompress.accounting import StageSeconds
from mmcompress.errors import SpecError, UnsupportedError
from mmcompress.evals.answers import Answers, Key
from mmcompress.evals.comparison import Terms, prepare, progress_bar
from mmcompress.evals.micro import MODELS
from mmcompress.evals.record import Asked
from mmcompress.evals.runner import Run, Spent, batches, configure, prompt
from mmcompress.evals.suites.base import Question
from mmcompress.integrations.hf.account import llm_shape
from mmcompress.integrations.hf.capability import Capability, with_fewest_options
from mmcompress.integrations.vllm.capability import capability
from mmcompress.integrations.vllm.compression import Compression
from mmcompress.integrations.vllm.kv.plan import KVPlan
from mmcompress.integrations.vllm.settings import Settings
from mmcompress.integrations.vllm.start import check_model
from mmcompress.spec import CompressionConfig


@dataclass(frozen=True)
class VLLM:
    """An engine of its own for every run, one after another.

    Args:
        settings: arguments of `vllm.LLM`, such as `tensor_parallel_size`, that override those used here.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    name = "vllm"

    @classmethod
    def parse(cls, settings: str | None) -> VLLM:
        """Read the settings from JSON.

        Raises:
            SpecError: they are no JSON object, or set what compression does.
            UnsupportedError: vLLM is not installed.
        """
        if importlib.util.find_spec("vllm") is None:
            raise UnsupportedError("--backend vllm needs vLLM: pip install 'mmcompress[vllm]'.")
        try:
            read = json.loads(settings or "{}")
        except ValueError as error:
            raise SpecError(f"--engine {settings} is no JSON: {error}") from error
        if not isinstance(read, dict) or "additional_config" in read or "model" in read:
            raise SpecError(
                f"--engine {settings}: give an object with arguments of vllm.LLM, such as "
                '{"tensor_parallel_size": 2}; model and additional_config are those of the evaluation.'
            )
        return cls(read)

    @property
    def conditions(self) -> dict[str, Any]:
        """What answers depend on, beside the model and the questions."""
        from vllm import __version__

        return {"backend": self.name, "vllm": __version__, "engine": dict(self.settings)}

    @property
    def device(self) -> str:
        """Where it runs."""
        from vllm.platforms import current_platform

        return str(current_platform.get_device_name())

    def capability(self, model: Any, name: str) -> Capability:
        """What comes of a method on `model`, with the fewest options that it needs."""
        return with_fewest_options(lambda spec: capability(model, spec), name)

    def check(self, model: Any, config: CompressionConfig) -> None:
        """Whether vLLM can carry out `config` on `model`.

        Raises:
            MMCompressError: it cannot.
        """
        try:
            check_model(model, Settings(config))
        except UnsupportedError as error:
            raise UnsupportedError(f"--backend vllm: {error}") from error

    def ask_all(
        self,
        model: Any,
        processor: Any,
        suites: Sequence[Asked],
        runs: Sequence[Run],
        terms: Terms,
        answers: Answers,
        console: Console,
    ) -> None:
        """Answer what no run has answered yet; `model` is of transformers, and tells what an answer costs.

        Raises:
            UnsupportedError: the engine of a run does not start.
        """
        lacking = {run: _lacking(run, suites, answers) for run in runs}
        images = max((len(asked.images) for suite in suites for asked in suite.questions), default=1)
        usual = {
            "seed": terms.seed,
            "dtype": str(model.dtype).removeprefix("torch."),
            "limit_mm_per_prompt": {"image": images},
        }
        with progress_bar(console) as progress:
            total = sum(len(questions) for work in lacking.values() for _, questions in work)
            task = progress.add_task("answering", total=total)
            for run, work in lacking.items():
                if not work:
                    continue
                with self._engine(run, terms.model, usual) as llm:
                    for suite, questions in work:
                        for batch in batches(questions, terms.batch_size):
                            answers.add(_answers(llm, model, processor, suite, batch, run))
                            progress.advance(task, len(batch))

    @contextmanager
    def _engine(self, run: Run, model: str, usual: Mapping[str, Any]) -> Iterator[Any]:
        """The engine of a run, which is gone afterwards."""
        from vllm import LLM
        from vllm.distributed import cleanup_dist_env_and_memory

        plain = run.method is None and run.kv is None
        wanted = {} if plain else {"mmcompress": configure(*run).to_dict()}
        try:
            llm = LLM(str(MODELS.get(model, model)), additional_config=wanted, **{**usual, **self.settings})
        except Exception as error:  # what an engine cannot do, it says in many ways
            raise UnsupportedError(f"vLLM does not start for {run.label}: {error}") from error
        try:
            yield llm
        finally:
            llm.llm_engine.engine_core.shutdown()
            del llm
            cleanup_dist_env_and_memory()


def _lacking(run: Run, suites: Sequence[Asked], answers: Answers) -> list[tuple[Asked, list[Question]]]:
    """The questions of every suite that `run` has not answered, where there are any."""
    found = [
        (suite, [asked for asked in suite.questions if Key.of(suite.label, asked.id, run) not in answers])
        for suite in suites
    ]
    return [(suite, questions) for suite, questions in found if questions]


def _answers(
    llm: Any, model: Any, processor: Any, suite: Asked, batch: Sequence[Question], run: Run
) -> Iterator[tuple[Key, str, Spent]]:
    """Greedy answers to the questions of a batch that can be asked."""
    from vllm import SamplingParams

    asked, fields = [], []
    for question in batch:
        ready, inputs, _ = prepare(model, processor, [question])
        asked += ready
        fields += [inputs] * len(ready)
    requests = [
        {
            "prompt": prompt(processor, question.prompt, len(question.images)),
            "multi_modal_data": {"image": [picture.open() for picture in question.images]},
        }
        for question in asked
    ]
    start = time.perf_counter()
    outputs = llm.generate(requests, SamplingParams(temperature=0, max_tokens=suite.max_new_tokens), use_tqdm=False)
    seconds = time.perf_counter() - start
    for question, inputs, output in zip(asked, fields, outputs, strict=True):
        text = processor.decode(list(output.outputs[0].token_ids), skip_special_tokens=True)
        spent = _spent(model, run, question, inputs, len(output.prompt_token_ids), seconds / len(asked))
        yield Key.of(suite.label, question.id, run), text, spent


def _spent(model: Any, run: Run, question: Question, inputs: Any, entered: int, seconds: float) -> Spent:
    """What an answer cost whose prompt entered the LLM as so many tokens.

    vLLM does all stages of many questions in the same steps, so that their time is booked as one, under prefill.
    """
    config = configure(*run)
    compression = Compression.build(Settings(config), model)
    call = {name: value.cpu() for name, value in inputs.items() if name in ("image_sizes", "image_grid_thw")}
    layouts = compression.layouts(len(question.images), compression.call(call))
    sizes = [int((~layout.separator).sum()) for layout in layouts]
    kept = sum(compression.settings.keep.tokens(size) for size in sizes)
    shape = llm_shape(model.base_model.get_decoder())
    plan = KVPlan.of(config)
    held = entered if plan is None or plan.window is None else plan.entries(entered)
    return Spent(
        items=len(question.images),
        tokens=sum(sizes),
        kept=kept,
        in_layers=kept,
        prefill_flops=shape.prefill_flops([entered] * shape.layers),
        kv_bytes=shape.kv_bytes([held] * shape.layers),
        seconds=vars(StageSeconds(prefill=seconds)),
    )
