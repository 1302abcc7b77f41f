"""vLLM within the test's own process: small, in float32, and quick to start."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prompts import Prompt, Reply
from transformers import ProcessorMixin
from vllm import LLM, RequestOutput, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

LENGTH = 4096
"""Tokens a request may have; two pictures of the largest size fit."""


@contextmanager
def engine(folder: Path, **settings: Any) -> Iterator[LLM]:
    """An engine for the model in `folder` that is gone afterwards; `settings` override or add to the usual ones."""
    usual: dict[str, Any] = dict(
        dtype="float32",
        enforce_eager=True,
        distributed_executor_backend="uni",
        max_model_len=LENGTH,
        max_num_batched_tokens=LENGTH,
        max_num_seqs=8,
        kv_cache_memory_bytes=1 << 27,
        block_size=32,  # the least on a CPU: short prompts fill some blocks, so that prefixes can be cached
        limit_mm_per_prompt={"image": 2, "video": 0},
        seed=0,
    )
    llm = LLM(str(folder), **usual | settings)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()


def ask(
    llm: LLM, processor: ProcessorMixin, prompts: Sequence[Prompt], ignore_eos: bool, **options: Any
) -> list[Reply]:
    """Greedy replies to `prompts`, which are in the engine at the same time; `options` are the image processor's."""
    requests: list[dict[str, Any]] = []
    for prompt in prompts:
        pictures = {"multi_modal_data": {"image": list(prompt.pictures)}, "mm_processor_kwargs": options}
        requests.append(
            {
                "prompt": processor.apply_chat_template(prompt.chat(), add_generation_prompt=True),
                **(pictures if prompt.pictures else {}),
            }
        )
    return list(map(_reply, llm.generate(requests, _greedy(prompts, ignore_eos), use_tqdm=False)))


def chat(llm: LLM, prompts: Sequence[Prompt], ignore_eos: bool) -> list[Reply]:
    """The same through the chat template that vLLM found in the model's folder."""
    chats = [prompt.chat("image_pil") for prompt in prompts]
    return list(map(_reply, llm.chat(chats, _greedy(prompts, ignore_eos), use_tqdm=False)))


def _greedy(prompts: Sequence[Prompt], ignore_eos: bool) -> list[SamplingParams]:
    return [
        SamplingParams(temperature=0, max_tokens=prompt.new_tokens, ignore_eos=ignore_eos, logprobs=0)
        for prompt in prompts
    ]


def _reply(output: RequestOutput) -> Reply:
    answer = output.outputs[0]
    tokens = tuple(answer.token_ids)
    logprobs = tuple(step[token].logprob for step, token in zip(answer.logprobs, tokens, strict=True))
    return Reply(tuple(output.prompt_token_ids), tokens, logprobs)
