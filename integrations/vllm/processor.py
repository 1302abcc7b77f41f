"""The front end's side: how many tokens of an image a prompt holds, and what tells images apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from mmcompress.errors import InputError
from mmcompress.integrations.vllm.compression import Compression
from mmcompress.integrations.vllm.settings import KEEP

QUERY = "mmcompress_query"
"""`[tokens]` of every image: the text tokens of its prompt."""
COUNTS = "mmcompress_counts"
"""`[3]` of every image: tokens to keep, placeholders in the prompt, tokens before compression."""


class CompressedProcessor:
    """Stands before one of vLLM's multimodal processors."""

    info: Any

    def __init__(self, info: Any, dummy_inputs: Any) -> None:
        super().__init__(info, dummy_inputs)  # type: ignore[call-arg]
        self.compression = Compression.of(info.get_hf_config())

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        """Check what the request asks for, and let the text come along where it decides."""
        options = dict(inputs.hf_processor_mm_kwargs)
        unknown = [key for key in options if key.startswith("mmcompress") and key != KEEP]
        if unknown:
            raise InputError(f"unknown entry {unknown[0]!r} of mm_processor_kwargs. Did you mean {KEEP!r}?")
        self.compression.requested(options)
        if self.compression.reads_prompt:
            visual = self.compression.family.token_ids.values()
            options[QUERY] = [token for token in inputs.prompt if token not in visual]
            if not options[QUERY]:
                raise InputError(f"{self.compression.method.info.name} needs a question, but the prompt has no text.")
        inputs = replace(inputs, hf_processor_mm_kwargs=options)
        return super().apply(inputs, timing_ctx)  # type: ignore[misc]

    def get_dummy_inputs(self, *args: Any, **kwargs: Any) -> Any:
        """The largest prompt, with the largest budget and a word of text."""
        inputs = super().get_dummy_inputs(*args, **kwargs)  # type: ignore[misc]
        bounds = self.compression.settings.keep_range
        options = {} if bounds is None else {KEEP: bounds[1].keep}
        return replace(inputs, prompt=[*inputs.prompt, 0], hf_processor_mm_kwargs=options)

    def _get_mm_hashes(self, inputs: Any) -> Any:
        from vllm.multimodal.hasher import MultiModalHasher

        algorithm = self.info.ctx.get_mm_config().mm_hasher_algorithm
        salt = self.compression.settings.fingerprint
        hashes = super()._get_mm_hashes(inputs)  # type: ignore[misc]
        images = hashes.get("image", [])
        salted = [MultiModalHasher.hash_kwargs(algorithm, image=image, mmcompress=salt) for image in images]
        return {**hashes, **({"image": salted} if images else {})}

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, Any]) -> Any:
        data = super()._apply_hf_processor_main(mm_items, _without_ours(hf_kwargs))  # type: ignore[misc]
        images = mm_items.get_count("image", strict=False)
        if images:
            budget = self.compression.requested(hf_kwargs)
            layouts = self.compression.layouts(images, self.compression.call(data))
            kept = [budget.tokens(int((~layout.separator).sum())) for layout in layouts]
            data[COUNTS] = torch.tensor(
                [
                    [tokens, self.compression.placeholders(layout, tokens), len(layout.separator)]
                    for layout, tokens in zip(layouts, kept, strict=True)
                ]
            )
            if QUERY in hf_kwargs:
                data[QUERY] = [torch.tensor(hf_kwargs[QUERY])] * images
        return data

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
        from vllm.multimodal.inputs import MultiModalFieldConfig

        stock = super()._get_mm_fields_config(hf_inputs, _without_ours(hf_processor_mm_kwargs))  # type: ignore[misc]
        ours = MultiModalFieldConfig.batched("image", keep_on_cpu=True)
        return {**stock, COUNTS: ours, QUERY: ours}

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, Any], out_mm_kwargs: Any
    ) -> Sequence[Any]:
        updates = super()._get_prompt_updates(  # type: ignore[misc]
            mm_items, _without_ours(hf_processor_mm_kwargs), out_mm_kwargs
        )
        return [_shortened(update, out_mm_kwargs) if update.modality == "image" else update for update in updates]


def _without_ours(options: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if not key.startswith("mmcompress")}


def _shortened(update: Any, fields: Any) -> Any:
    """A replacement of an image's placeholder that leaves as many tokens as are kept."""

    def replacement(number: int) -> list[int]:
        whole = update.replacement(number)
        _, placeholders, tokens = fields["image"][number][COUNTS].data.tolist()
        if len(whole) != tokens:
            raise InputError(f"image {number}: vLLM counts {len(whole)} tokens, but its encoder makes {tokens} of it.")
        return whole[:placeholders]

    return replace(update, replacement=replacement)
