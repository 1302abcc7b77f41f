"""Loading the processor of an embedded model, whether or not `torchvision` is installed."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig, AutoProcessor, PreTrainedTokenizerBase, ProcessorMixin, Qwen2_5_VLProcessor
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils.import_utils import is_torchvision_available


def load_processor(folder: Path) -> ProcessorMixin:
    """The processor of the model in `folder`; that of a Qwen2.5-VL takes no videos without `torchvision`."""
    if AutoConfig.from_pretrained(folder).model_type == "qwen2_5_vl" and not is_torchvision_available():
        return _QwenImageProcessor.from_pretrained(folder)
    return AutoProcessor.from_pretrained(folder)


class _QwenImageProcessor(Qwen2_5_VLProcessor):
    """Qwen2.5-VL's processor without its video half, which is what needs `torchvision`.

    transformers reads from the signature which parts to load.
    """

    def __init__(
        self,
        image_processor: BaseImageProcessor,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None = None,
    ) -> None:
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)
