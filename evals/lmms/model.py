"""A compressed model as lmms-eval asks it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.protocol import ChatMessages
from lmms_eval.utils import Collator
from tqdm import tqdm

from mmcompress.errors import SpecError, UnsupportedError
from mmcompress.evals.lmms.asking import answer, encode
from mmcompress.evals.loading import load_model
from mmcompress.integrations.hf import wrap


class MMCompress(lmms):
    """A LLaVA or Qwen-VL of transformers whose visual tokens are compressed.

    Args:
        pretrained: a folder, a hub name or the name of an embedded model.
        method: of the visual tokens; None for the model as it is.
        keep: its budget: a fraction or a count.
        kv: policy of the KV cache, as in `snapkv(keep=0.5)`.
        device: where it runs; by default the GPU if there is one.
        batch_size: questions asked at once.
        max_batch_size: of no use, as sizes are not searched for.
        options: of the method.

    Raises:
        SpecError: a name, budget or option is wrong.
        UnsupportedError: the model cannot be loaded, or the method is not possible on it.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str = "micro-llava",
        method: str | None = None,
        keep: float | None = None,
        kv: str | None = None,
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise SpecError(f"batch_size={batch_size}: give how many questions are asked at once.")
        if method is None and (keep is not None or options):
            raise SpecError(f"{', '.join(['keep'] * (keep is not None) + list(options))} without a method.")
        accelerator = Accelerator()
        self._rank, self._world_size = accelerator.process_index, accelerator.num_processes
        if accelerator.num_processes > 1:
            self.accelerator = accelerator  # by which lmms-eval collects what all processes were told
            device = str(accelerator.device)
        self.model, self.processor = load_model(pretrained, device)
        self.batch_size = int(batch_size)
        self.handle = None
        if method is not None or kv is not None:
            self.handle = wrap(self.model, method, keep=keep, kv=kv, **options)

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answer `requests`, those with equal settings of generation together, and log speed and visual tokens."""
        # The arguments of a request: context, chat, settings of generation, number of the document, task, split.
        arguments = [request.args for request in requests]
        order = Collator(arguments, lambda args: args[3], group_fn=lambda args: args[2], grouping=True)
        said: list[GenerationResult] = []
        seconds, generated, seen, kept = 0.0, 0, 0, 0
        with tqdm(total=len(requests), disable=self.rank != 0, desc="answers") as progress:
            for batch in order.get_batched(n=self.batch_size, batch_fn=None):
                start = time.perf_counter()
                answers = self._answer(batch)
                seconds += time.perf_counter() - start
                said += answers
                generated += sum(answer.token_counts.output_tokens for answer in answers)
                if self.handle is not None and self.handle.stats is not None:
                    seen += sum(item.tokens for item in self.handle.stats.items)
                    kept += sum(item.kept for item in self.handle.stats.items)
                progress.update(len(batch))
        more = {"total_requests": len(requests)}
        if self.handle is not None:
            more |= {"visual_tokens": seen, "visual_tokens_kept": kept}
        log_metrics(seconds, generated, generated / seconds if seconds else 0.0, more)
        return list(order.get_original(said))

    def _answer(self, batch: Sequence[tuple[Any, ...]]) -> list[GenerationResult]:
        """The answers to one batch; of each, the prompt's tokens that entered the LLM and those of the answer."""
        _, to_messages, settings, documents, tasks, splits = zip(*batch, strict=True)
        chats = [
            ChatMessages(messages=word(self.task_dict[task][split][document]))
            for word, task, split, document in zip(to_messages, tasks, splits, documents, strict=True)
        ]
        inputs = self._encode(chats)
        texts, output = answer(self.model, self.processor, inputs, settings[0])
        stats = None if self.handle is None else self.handle.stats
        read = inputs["attention_mask"].sum(dim=1).tolist() if stats is None else stats.row_kept
        pad = self.processor.tokenizer.pad_token_id
        return [
            GenerationResult(text, TokenCounts(entered, length))
            for text, entered, length in zip(texts, read, (output != pad).sum(dim=1).tolist(), strict=True)
        ]

    def _encode(self, chats: Sequence[ChatMessages]) -> Any:
        media = [chat.extract_media() for chat in chats]
        if any(videos or audios for _, videos, audios in media):
            raise UnsupportedError("mmcompress answers tasks about images; this one has videos or sound.")
        images = [[image.convert("RGB") for image in shown] for shown, _, _ in media]
        return encode(self.model, self.processor, [chat.to_hf_messages() for chat in chats], images)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Not to be had: a compressed model answers by generating."""
        raise NotImplementedError("mmcompress generates answers; take a task whose output_type is generate_until.")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not to be had."""
        raise NotImplementedError("mmcompress answers one question at a time; take a task of a single round.")
