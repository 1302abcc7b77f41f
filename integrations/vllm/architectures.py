"""The model architectures of vLLM that can be compressed, and the classes that do it; nothing is imported."""

from __future__ import annotations

VERSION = (0, 32)
"""The release of vLLM that all this is made for."""
PREFIX = "MMCompress"
"""What the names of compressed models begin with; those of vLLM's own stay theirs."""
_MODELS = "mmcompress.integrations.vllm.models"

ARCHITECTURES = {
    architecture: f"{_MODELS}:{PREFIX}{architecture}"
    for architecture in (
        "LlavaForConditionalGeneration",
        "LlavaNextForConditionalGeneration",
        "LlavaOnevisionForConditionalGeneration",
        "Qwen2VLForConditionalGeneration",
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen3VLForConditionalGeneration",
    )
}
