"""Checkpoints in the formats their authors published: reading them, and their weights under today's names.

The table `FORMATS` tells by its own keys what a checkpoint is. Whatever does not fit is refused by name.
"""

from __future__ import annotations

import json
import math
import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, PreTrainedConfig, Qwen2Config, SiglipVisionConfig

from mmcompress.elastic import ElasticProjector
from mmcompress.errors import InputError, UnsupportedError
from mmcompress.projectors.m3 import M3
from mmcompress.projectors.mqt import MQT
from mmcompress.projectors.tokenflex import TokenFLEX
from mmcompress.projectors.tokenpacker import LAYERS, TokenPacker

TOWER = "model.vision_tower."
PROJECTOR = "model.multi_modal_projector.projector."
NORM = "model.multi_modal_projector.norm."
_FILES = ("*.json", "*.safetensors", "pytorch_model*.bin", "*.model", "*.jinja", "*.txt")
_HEAD_DIM, _WIDE_HEAD_DIM = 64, 128  # of CLIP and MQT, and of TokenPacker; weights do not tell them
# Buffers that older releases of transformers stored, and SigLIP's pooling head, which no LLM reads.
_UNUSED = re.compile(r"rotary_emb\.inv_freq$|embeddings\.position_ids$|^vision_model\.vision_model\.head\.")
_LLM = {
    "model.embed_tokens.": "model.language_model.embed_tokens.",
    "model.layers.": "model.language_model.layers.",
    "model.norm.": "model.language_model.norm.",
    "lm_head.": "lm_head.",
    "model.vision_tower.vision_tower.vision_model.": TOWER,
}


@dataclass(frozen=True)
class Format:
    """How a kind of checkpoint is told, and where its weights go.

    Args:
        name: what it is called.
        key: a weight only this kind has.
        names: prefix of the names in the checkpoint -> prefix of today's.
        projector: makes the projector of a checkpoint, its tower's configuration and the LLM's width; None where it is
            the two linear layers that transformers has.
        layers: hidden states of the tower that the projector reads.
        own_tower: why no other tower than the checkpoint's own will do; "" if it need not have one.
    """

    name: str
    key: str
    names: Mapping[str, str]
    projector: Callable[[Checkpoint, Any, int], ElasticProjector] | None = None
    layers: int | list[int] = -2
    own_tower: str = ""


def _mqt(checkpoint: Checkpoint, vision: Any, hidden: int) -> ElasticProjector:
    queries = checkpoint.shapes[MQT_FORMAT.key][0]
    return MQT(math.isqrt(queries), hidden, max(1, vision.hidden_size // _HEAD_DIM), vision.hidden_size)


def _tokenpacker(checkpoint: Checkpoint, vision: Any, hidden: int) -> ElasticProjector:
    scale, width, side = checkpoint.config.get("scale_factor"), vision.hidden_size, _side(vision)
    if not isinstance(scale, int) or not 1 <= scale <= side or side % scale:
        raise UnsupportedError(f"{checkpoint.folder}: scale_factor={scale!r} does not divide a side of {side} patches.")
    return TokenPacker(scale, side, width, hidden, max(1, width // _WIDE_HEAD_DIM))


def _tokenflex(checkpoint: Checkpoint, vision: Any, hidden: int) -> ElasticProjector:
    return TokenFLEX(_side(vision), vision.hidden_size, hidden)


def _side(vision: Any) -> int:
    return int(vision.image_size // vision.patch_size)


MQT_FORMAT = Format(
    "mqt",
    "model.query_abstractor.query",
    {**_LLM, "model.query_abstractor.": PROJECTOR},
    _mqt,
    own_tower="a checkpoint of MQT comes with the tower it was trained on",
)
TOKENPACKER = Format(
    "tokenpacker",
    "model.mm_projector.q_proj_1.weight",
    {**_LLM, "model.mm_projector.": PROJECTOR},
    _tokenpacker,
    layers=list(LAYERS),
)
TOKENFLEX = Format(
    "tokenflex",
    "projector.mlp.f1.weight",
    {
        "language_model.model.": "model.language_model.",
        "language_model.lm_head.": "lm_head.",
        "vision_model.vision_model.post_layernorm.": NORM,
        "vision_model.vision_model.": TOWER,
        "projector.": PROJECTOR,
    },
    _tokenflex,
    layers=-1,
    own_tower="a checkpoint of TokenFLEX comes with the tower it was trained on",
)
M3_FORMAT = Format(
    "m3",
    "model.mm_projector.0.weight",
    {
        **_LLM,
        "model.mm_projector.0.": "model.multi_modal_projector.linear_1.",
        "model.mm_projector.2.": "model.multi_modal_projector.linear_2.",
        "model.image_newline": "model.image_newline",
    },
    own_tower="M3 fine-tunes the tower, so that a stock one in its place would silently cost accuracy",
)
FORMATS = (MQT_FORMAT, TOKENPACKER, TOKENFLEX, M3_FORMAT)


class Checkpoint:
    """A folder of weights and their configuration.

    Args:
        path: the folder, or a name on the Hugging Face hub.

    Raises:
        InputError: there is no such folder, or what is in it cannot be read.
        UnsupportedError: it is of another architecture.
    """

    def __init__(self, path: str | Path) -> None:
        self.folder = _folder(path)
        self.config = _json(self.folder / "config.json")
        files = sorted(self.folder.glob("*.safetensors")) or sorted(self.folder.glob("pytorch_model*.bin"))
        if not files:
            raise InputError(f"{self.folder} holds no weights: neither *.safetensors nor pytorch_model*.bin.")
        self._files = files
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self.tensors(shapes_only=True)}
        self.format = self._format()

    def tensors(self, *, shapes_only: bool = False) -> Iterator[tuple[str, Any]]:
        """Every weight that is read, one at a time: name and tensor, or what has its shape."""
        for file in self._files:
            for name, tensor in _read(file, shapes_only):
                if not _UNUSED.search(name):
                    yield name, tensor

    def renamed(self, name: str) -> str | None:
        """Today's name of a weight; None if there is none."""
        prefixes = [prefix for prefix in self.format.names if name.startswith(prefix)]
        if not prefixes:
            return None
        old = max(prefixes, key=len)
        return self.format.names[old] + name.removeprefix(old)

    @property
    def has_tower(self) -> bool:
        """Whether the checkpoint has a vision tower."""
        return any((self.renamed(name) or "").startswith(TOWER) for name in self.shapes)

    def text_config(self) -> PreTrainedConfig:
        """The LLM's configuration."""
        if self.format is TOKENFLEX:
            kinds: dict[str, type[PreTrainedConfig]] = {"qwen2": Qwen2Config, "llama": LlamaConfig}
            settings = self._entry(self.config, "llm_config")
            if settings.get("model_type") not in kinds:
                raise UnsupportedError(
                    f"{self.folder}: an LLM of type {settings.get('model_type')!r} is not supported."
                )
            return kinds[settings["model_type"]].from_dict(settings)
        kept = {key: value for key, value in self.config.items() if key not in ("model_type", "architectures")}
        return LlamaConfig.from_dict(kept)

    def vision_config(self) -> PreTrainedConfig:
        """The configuration of the checkpoint's own tower, told by its weights where its file does not."""
        if self.format is TOKENFLEX:
            settings = self._entry(self.config, "vision_config")
            size = self.config.get("force_image_size") or self._entry(settings, "image_size")
            return SiglipVisionConfig.from_dict({**settings, "image_size": size, "vision_use_head": False})
        shapes = {(self.renamed(name) or "").removeprefix(TOWER): shape for name, shape in self.shapes.items()}
        width, _, patch, _ = self._entry(shapes, "embeddings.patch_embedding.weight")
        layers = {int(match[1]) for name in shapes if (match := re.match(r"encoder\.layers\.(\d+)\.", name))}
        return CLIPVisionConfig(
            hidden_size=width,
            intermediate_size=self._entry(shapes, "encoder.layers.0.mlp.fc1.weight")[0],
            num_hidden_layers=max(layers) + 1,
            num_attention_heads=max(1, width // _HEAD_DIM),
            patch_size=patch,
            image_size=math.isqrt(self._entry(shapes, "embeddings.position_embedding.weight")[0] - 1) * patch,
        )

    def projector(self, vision: Any, hidden: int) -> ElasticProjector | None:
        """The projector's module, without the checkpoint's weights; None where it is the one transformers has."""
        return None if self.format.projector is None else self.format.projector(self, vision, hidden)

    def resolutions(self) -> list[tuple[int, int]]:
        """`(height, width)` an image may be cut to, where the model sees tiles; none where it sees whole images."""
        if "model.image_newline" not in self.shapes:
            return []
        pinpoints = self.config.get("image_grid_pinpoints") or []
        if not isinstance(pinpoints, list) or not pinpoints:
            raise UnsupportedError(f"{self.folder}: image_grid_pinpoints={pinpoints!r} is no list of (width, height).")
        return [(height, width) for width, height in pinpoints]

    def tiles(self) -> tuple[int, int] | None:
        """The fewest and the most tiles an image is cut into, a thumbnail apart; None if it stays whole.

        Raises:
            UnsupportedError: there would be no thumbnail beside them.
        """
        if not self.config.get("dynamic_image_size"):
            return None
        if not self.config.get("use_thumbnail", True):
            raise UnsupportedError(f"{self.folder} has use_thumbnail=false; its processor here always adds one.")
        return self.config.get("min_dynamic_patch", 1), self.config.get("max_dynamic_patch", 1)

    def _entry(self, table: Mapping[str, Any], name: str) -> Any:
        if name not in table:
            raise InputError(f"{self.folder} lacks {name}, which tells what the model looks like.")
        return table[name]

    def _format(self) -> Format:
        found = next((kind for kind in FORMATS if kind.key in self.shapes), None)
        architectures = ", ".join(self.config.get("architectures") or ["of an unknown architecture"])
        if found is None:
            if self.config.get("model_type") in ("llava", "llava_next") and "vision_config" in self.config:
                raise UnsupportedError(
                    f"{self.folder} is in the format of transformers: load it with from_pretrained, and turn its dial "
                    'with mmcompress.wrap(model, "m3", keep=...).'
                )
            keys = ", ".join(f"{kind.key} ({kind.name})" for kind in FORMATS)
            raise UnsupportedError(f"{self.folder} ({architectures}) has none of the weights {keys}.")
        if found is not TOKENFLEX and "Llama" not in architectures:
            raise UnsupportedError(
                f"{self.folder} ({architectures}): of checkpoints of {found.name}, those with a Llama are supported."
            )
        return found


def dial(checkpoint: Checkpoint, vision: Any) -> M3:
    """What pools the tiles of a checkpoint whose projector is not replaced."""
    return M3(_side(vision), (), checkpoint.resolutions(), vision.image_size)


def _folder(path: str | Path) -> Path:
    if Path(path).is_dir():
        return Path(path)
    try:
        return Path(snapshot_download(str(path), allow_patterns=list(_FILES)))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        raise InputError(f"{path} is no folder, and the hub has no such model within reach: {error}") from error


def _json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {error}") from error
    if not isinstance(data, dict):
        raise InputError(f"cannot read {path}: expected a JSON object.")
    return data


def _read(file: Path, shapes_only: bool) -> Iterator[tuple[str, Any]]:
    with ExitStack() as opened:
        try:
            if file.suffix == ".safetensors":
                source = opened.enter_context(safe_open(file, framework="pt"))
                read = source.get_slice if shapes_only else source.get_tensor
                names = list(source.keys())
            else:
                tensors: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
                read, names = tensors.__getitem__, list(tensors)
        except (OSError, RuntimeError, SafetensorError, ValueError, EOFError, pickle.UnpicklingError) as error:
            raise InputError(f"cannot read {file}: {error}") from error
        for name in names:
            value = read(name)
            yield name, _Slice(value.get_shape()) if not hasattr(value, "shape") else value


@dataclass(frozen=True)
class _Slice:
    shape: list[int]
