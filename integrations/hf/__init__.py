"""The Hugging Face transformers engine."""

from mmcompress.integrations.hf.handle import Handle, wrap

__all__ = ["Handle", "wrap"]
