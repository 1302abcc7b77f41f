"""The compressed models, as vLLM loads them by name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vllm.model_executor.models import qwen3_vl
from vllm.model_executor.models.llava import (
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    LlavaMultiModalProcessor,
    LlavaProcessingInfo,
)
from vllm.model_executor.models.llava_next import (
    LlavaNextForConditionalGeneration,
    LlavaNextMultiModalProcessor,
    LlavaNextProcessingInfo,
)
from vllm.model_executor.models.llava_onevision import (
    LlavaOnevisionDummyInputsBuilder,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionMultiModalProcessor,
    LlavaOnevisionProcessingInfo,
)
from vllm.model_executor.models.qwen2_5_vl import (
    Qwen2_5_VLDummyInputsBuilder,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLMultiModalProcessor,
    Qwen2_5_VLProcessingInfo,
)
from vllm.model_executor.models.qwen2_vl import (
    Qwen2VLDummyInputsBuilder,
    Qwen2VLForConditionalGeneration,
    Qwen2VLMultiModalProcessor,
    Qwen2VLProcessingInfo,
)
from vllm.model_executor.models.qwen3_vl import (
    Qwen3VLDummyInputsBuilder,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMultiModalProcessor,
    Qwen3VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from mmcompress.integrations.vllm.architectures import PREFIX
from mmcompress.integrations.vllm.model import POSITIONS_FACTOR, Compressed, CompressedMRoPE
from mmcompress.integrations.vllm.processor import CompressedProcessor


def _processed_by(processor: Any, info: Any, dummy_inputs: Any) -> Any:
    """Class decorator: a model's images are processed as by `processor`, but compressed."""
    compressed = type(f"{PREFIX}{processor.__name__}", (CompressedProcessor, processor), {})
    return MULTIMODAL_REGISTRY.register_processor(compressed, info=info, dummy_inputs=dummy_inputs)


@_processed_by(LlavaMultiModalProcessor, LlavaProcessingInfo, LlavaDummyInputsBuilder)
class MMCompressLlavaForConditionalGeneration(Compressed, LlavaForConditionalGeneration):
    """LLaVA-1.5."""


@_processed_by(LlavaNextMultiModalProcessor, LlavaNextProcessingInfo, LlavaDummyInputsBuilder)
class MMCompressLlavaNextForConditionalGeneration(Compressed, LlavaNextForConditionalGeneration):
    """LLaVA-NeXT."""


@_processed_by(LlavaOnevisionMultiModalProcessor, LlavaOnevisionProcessingInfo, LlavaOnevisionDummyInputsBuilder)
class MMCompressLlavaOnevisionForConditionalGeneration(Compressed, LlavaOnevisionForConditionalGeneration):
    """LLaVA-OneVision."""


@_processed_by(Qwen2VLMultiModalProcessor, Qwen2VLProcessingInfo, Qwen2VLDummyInputsBuilder)
class MMCompressQwen2VLForConditionalGeneration(CompressedMRoPE, Qwen2VLForConditionalGeneration):
    """Qwen2-VL."""


@_processed_by(Qwen2_5_VLMultiModalProcessor, Qwen2_5_VLProcessingInfo, Qwen2_5_VLDummyInputsBuilder)
class MMCompressQwen2_5_VLForConditionalGeneration(CompressedMRoPE, Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL."""


@_processed_by(Qwen3VLMultiModalProcessor, Qwen3VLProcessingInfo, Qwen3VLDummyInputsBuilder)
class MMCompressQwen3VLForConditionalGeneration(CompressedMRoPE, Qwen3VLForConditionalGeneration):
    """Qwen3-VL."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        with _wide_tables():
            super().__init__(vllm_config=vllm_config, prefix=prefix)


@contextmanager
def _wide_tables() -> Iterator[None]:
    """While open, Qwen3-VL gets the M-RoPE tables that vLLM gives it where it prunes videos by itself."""
    stock = qwen3_vl.mrope_positions_factor
    qwen3_vl.mrope_positions_factor = lambda vllm_config: POSITIONS_FACTOR
    try:
        yield
    finally:
        qwen3_vl.mrope_positions_factor = stock
