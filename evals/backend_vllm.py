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
from mmcompress.evals.backends import Terms, lacking, prepare
from mmcompress.evals.environment import model_facts
from mmcompress.evals.micro import MODELS
from mmcompress.evals.processes import Processes
from mmcompress.evals.progress import counting
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

_NOTHING_REUSED: Mapping[str, Any] = {"enable_prefix_caching": False, "mm_processor_cache_gb": 0}
"""Times are of whole answers. Where both are off, vLLM also names every image anew instead of by its content, so that
the cache of its encoder holds none that was asked about before."""


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
            SpecError: they are no JSON object, set what compression does, or have the engine reuse work.
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
        caches = [name for name in _NOTHING_REUSED if name in read]
        if caches:
            raise SpecError(
                f"--engine {settings}: leave out {' and '.join(caches)}; an evaluation has vLLM reuse nothing of one "
                "question for another, so that times are of whole answers."
            )
        return cls(read)

    @property
    def conditions(self) -> dict[str, Any]:
        """What answers depend on, beside the model and the questions."""
        from vllm import __version__

        return {"backend": self.name, "vllm": __version__, "engine": {**_NOTHING_REUSED, **self.settings}}

    def place(self, processes: Processes) -> str:
        """Beside the engine, on the CPU.

        Raises:
            SpecError: there are several processes.
        """
        if processes.count > 1:
            raise SpecError("--backend vllm shares the work itself: --engine '{\"tensor_parallel_size\": 2}'.")
        return "cpu"

    def facts(self, model: Any) -> dict[str, Any]:
        """What is told of where answers come from."""
        from vllm.platforms import current_platform

        return model_facts(model) | self.conditions | {"device": str(current_platform.get_device_name())}

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
        everything = [(suite, suite.questions) for suite in suites]
        unanswered = {run: lacking(run, everything, answers) for run in runs}
        images = max((len(asked.images) for suite in suites for asked in suite.questions), default=1)
        usual = {
            **_NOTHING_REUSED,
            "seed": terms.seed,
            "dtype": str(model.dtype).removeprefix("torch."),
            "limit_mm_per_prompt": {"image": images},
        }
        with counting(console, transient=True) as progress:
            total = sum(len(questions) for work in unanswered.values() for _, questions in work)
            task = progress.add_task("answering", total=total)
            for run, work in unanswered.items():
                if not work:
                    continue
                costs = _Costs(model, run)
                with self._engine(run, terms.model, usual) as llm:
                    warm = False
                    for suite, questions in work:
                        for batch in batches(questions, terms.batch_size):
                            asked, fields = _prepared(model, processor, batch)
                            if asked and not warm:  # the first pass of an engine is slow
                                _generate(llm, processor, suite, asked)
                                warm = True
                            answers.add(_answers(llm, processor, suite, asked, fields, costs))
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


def _prepared(model: Any, processor: Any, batch: Sequence[Question]) -> tuple[list[Question], list[Any]]:
    """The questions of a batch that can be asked, and the inputs that transformers' model would get for each."""
    asked, fields = [], []
    for question in batch:
        ready, inputs, _ = prepare(model, processor, [question])
        asked += ready
        fields += [inputs] * len(ready)
    return asked, fields


def _generate(llm: Any, processor: Any, suite: Asked, asked: Sequence[Question]) -> tuple[list[Any], float]:
    """The engine's greedy outputs for `asked`, and the seconds that they took."""
    from vllm import SamplingParams

    requests = [
        {
            "prompt": prompt(processor, question.prompt, len(question.images)),
            "multi_modal_data": {"image": [picture.open() for picture in question.images]},
        }
        for question in asked
    ]
    start = time.perf_counter()
    outputs = llm.generate(requests, SamplingParams(temperature=0, max_tokens=suite.max_new_tokens), use_tqdm=False)
    return outputs, time.perf_counter() - start


def _answers(
    llm: Any, processor: Any, suite: Asked, asked: Sequence[Question], fields: Sequence[Any], costs: _Costs
) -> Iterator[tuple[Key, str, Spent]]:
    """Greedy answers to the questions of a batch, with what they cost."""
    outputs, seconds = _generate(llm, processor, suite, asked)
    for question, inputs, output in zip(asked, fields, outputs, strict=True):
        text = processor.decode(list(output.outputs[0].token_ids), skip_special_tokens=True)
        spent = costs.of(len(question.images), inputs, len(output.prompt_token_ids), seconds / len(asked))
        yield Key.of(suite.label, question.id, costs.run), text, spent


class _Costs:
    """What the answers of a run cost.

    vLLM does all stages of many questions in the same steps, so that their time is booked as one, under prefill.
    """

    def __init__(self, model: Any, run: Run) -> None:
        config = configure(*run)
        self.run = run
        self._compression = Compression.build(Settings(config), model)
        self._plan = KVPlan.of(config)
        self._shape = llm_shape(model.base_model.get_decoder())

    def of(self, images: int, inputs: Any, entered: int, seconds: float) -> Spent:
        """An answer about so many images whose prompt entered the LLM as so many tokens."""
        call = {name: value.cpu() for name, value in inputs.items() if name in ("image_sizes", "image_grid_thw")}
        layouts = self._compression.layouts(images, self._compression.call(call))
        sizes = [int((~layout.separator).sum()) for layout in layouts]
        kept = sum(self._compression.settings.keep.tokens(size) for size in sizes)
        held = entered if self._plan is None or self._plan.window is None else self._plan.entries(entered)
        return Spent(
            items=images,
            tokens=sum(sizes),
            kept=kept,
            in_layers=kept,
            prefill_flops=self._shape.prefill_flops([entered] * self._shape.layers),
            kv_bytes=self._shape.kv_bytes([held] * self._shape.layers),
            seconds=vars(StageSeconds(prefill=seconds)),
        )
