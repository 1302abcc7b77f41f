"""What transformers replies: the yardstick for vLLM."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from prompts import Prompt, Reply
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin


@torch.inference_mode()
def ask(model: PreTrainedModel, processor: ProcessorMixin, prompts: Sequence[Prompt], ignore_eos: bool) -> list[Reply]:
    """Greedy replies to `prompts`, generated in one batch with padding on the left."""
    eos = model.generation_config.eos_token_id
    inputs = processor(
        text=[processor.apply_chat_template(prompt.chat(), add_generation_prompt=True) for prompt in prompts],
        images=[picture for prompt in prompts for picture in prompt.pictures],
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )
    output = model.generate(
        **inputs,
        do_sample=False,
        max_new_tokens=max(prompt.new_tokens for prompt in prompts),
        eos_token_id=None if ignore_eos else eos,
        output_logits=True,
        return_dict_in_generate=True,
    )
    answers = output.sequences[:, inputs["input_ids"].shape[1] :]
    logprobs = torch.stack(output.logits, dim=1).log_softmax(-1).gather(2, answers[..., None]).squeeze(2)
    replies = []
    for row, prompt in enumerate(prompts):
        length = prompt.new_tokens if ignore_eos else _length(answers[row], eos, prompt.new_tokens)
        ids = inputs["input_ids"][row, inputs["attention_mask"][row].bool()]
        replies.append(
            Reply(tuple(ids.tolist()), tuple(answers[row, :length].tolist()), tuple(logprobs[row, :length].tolist()))
        )
    return replies


def _length(answer: Tensor, eos: int, most: int) -> int:
    """How long an answer is which its end token, itself counted, may cut short."""
    ends = (answer == eos).nonzero()
    return min(most, int(ends[0]) + 1) if len(ends) else most
