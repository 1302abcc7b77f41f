"""Checking at start-up, before any engine process exists, whether a model can be compressed as asked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from mmcompress.errors import SpecError, UnsupportedError
from mmcompress.integrations.hf.handle import wrap
from mmcompress.integrations.vllm.architectures import ARCHITECTURES, PREFIX, VERSION
from mmcompress.integrations.vllm.compression import Compression, weightless
from mmcompress.integrations.vllm.kv import engine as kv_engine
from mmcompress.integrations.vllm.kv.plan import KVPlan
from mmcompress.integrations.vllm.settings import KEEP, Settings
from mmcompress.method import VisualMethod
from mmcompress.registry import METHODS, Stage

_ELSEWHERE: dict[Stage, str] = {
    "in_llm": "removes tokens inside the LLM, but vLLM holds equally many of a prompt in every layer; take a method "
    "that acts before the LLM, such as divprune, or use transformers",
    "encoder": "removes tokens between the layers of the vision encoder, but vLLM's encoders take whole images; take a "
    "method that acts behind the encoder, such as visionzip, or use transformers",
}


def start(vllm_config: Any, wanted: Any) -> None:
    """Check what is `wanted` and have the compressed model loaded.

    Raises:
        SpecError: it is malformed.
        UnsupportedError: this model, engine or release of vLLM cannot carry it out.
    """
    from vllm.logger import init_logger

    _require_version()
    settings = Settings.parse(wanted)
    model_config, log = vllm_config.model_config, init_logger("vllm.mmcompress")
    compression = check(model_config.architecture, model_config.hf_config, settings)
    obstacles = [] if compression is None else list(_obstacles(vllm_config, compression))
    plan = KVPlan.of(settings.config)
    if plan is not None:
        obstacles += kv_engine.obstacles(vllm_config, plan)
    for obstacle in obstacles:
        raise UnsupportedError(f"mmcompress: {obstacle}.")
    done = [] if compression is None else [_compress(model_config, compression)]
    if plan is not None:
        kv_engine.apply(vllm_config)
        done.append(f"KV policy {settings.config.kv[0]}")
    log.info("mmcompress: %s.", "; ".join(done))
    warning = kv_engine.unmeasured(vllm_config)
    if warning is not None:
        log.warning("mmcompress: %s", warning)


def _compress(model_config: Any, compression: Compression) -> str:
    """Have the compressed model loaded; what comes of it, in words."""
    from vllm.multimodal import MULTIMODAL_REGISTRY

    settings = compression.settings
    model_config.hf_config.mmcompress = settings.to_dict()
    model_config.hf_config.architectures = [PREFIX + model_config.architecture]
    tokens = _most_tokens(MULTIMODAL_REGISTRY.get_processing_info(model_config), compression)
    of_requests = "" if settings.keep_range is None else "; requests may keep {} to {}".format(*settings.keep_range)
    kept = settings.keep.tokens(tokens)
    return f"{settings.spec}, {kept} of {tokens} tokens of the largest image enter the LLM{of_requests}"


def check(architecture: str, hf_config: Any, settings: Settings) -> Compression | None:
    """The compression of a model, if what is asked for is possible; None if that is a KV policy alone.

    Raises:
        SpecError: what is asked for is malformed.
        UnsupportedError: it is not possible for this model.
    """
    if architecture not in ARCHITECTURES:
        raise UnsupportedError(f"{architecture} cannot be compressed in vLLM; these can: {', '.join(ARCHITECTURES)}.")
    return check_model(weightless(hf_config), settings)


def check_model(model: Any, settings: Settings) -> Compression | None:
    """Likewise of a supported model of transformers, whose weights do not matter; raises as `check` does."""
    KVPlan.of(settings.config)
    _require_before_llm(settings)
    if not settings.config.methods:
        wrap(model, settings.config).unwrap()
        return None
    compression = Compression.build(settings, model)
    if compression.needs.draft is not None:
        raise UnsupportedError(
            f"{settings.spec.name} asks a smaller model first, which vLLM does not run; take a method such as divprune."
        )
    with wrap(model, settings.config) as handle:  # what transformers refuses is refused in the same words
        positions = handle.positions
    _require_known_count(compression)
    if positions != compression.family.positions:
        raise UnsupportedError(
            f"positions={positions} cannot be had: vLLM numbers the tokens of {type(model).__name__} as "
            f"positions={compression.family.positions} does."
        )
    return compression


def _require_version() -> None:
    from vllm import __version__, __version_tuple__

    if __version_tuple__[:2] != VERSION:
        raise UnsupportedError(
            f"vLLM {__version__} was never tried with mmcompress, which is made for {'.'.join(map(str, VERSION))}; "
            "leave mmcompress out of the additional config, or install that release."
        )


def _require_before_llm(settings: Settings) -> None:
    methods = [METHODS.build(spec.name, spec.options) for spec in settings.config.methods]
    for method in methods:
        name = method.info.name
        if method.info.stage in _ELSEWHERE:
            raise UnsupportedError(f"{name} {_ELSEWHERE[method.info.stage]}.")
        if isinstance(method, VisualMethod) and method.second_part is not None:
            raise UnsupportedError(
                f"{name} goes on to remove tokens inside the LLM, which vLLM cannot; give {name}(parts=first)."
            )
    if not methods and not settings.config.kv:
        raise SpecError(f'give a "method" or a "kv" policy. Available methods: {", ".join(METHODS.names())}.')
    if not methods and settings.keep_range is not None:
        raise SpecError("keep_range goes with a method, of whose budget it speaks.")


def _require_known_count(compression: Compression) -> None:
    if not compression.method.exact_count:
        spec = compression.settings.spec
        raise UnsupportedError(
            f"{spec.name} may keep fewer tokens than its budget, and vLLM must know their number before the image is "
            f"encoded; mmcompress info {spec.name} says whether an option makes it exact. uniform always is."
        )


def _obstacles(vllm_config: Any, compression: Compression) -> Iterator[str]:
    """What in the engine's configuration stands against compression, and what to do about it."""
    from vllm.config import CUDAGraphMode

    model_config, compilation = vllm_config.model_config, vllm_config.compilation_config
    multimodal, lora = model_config.multimodal_config, vllm_config.lora_config
    has_mrope = compression.family.positions == "original"
    name = compression.method.info.name
    reads_encoder = bool(compression.needs.layers()) or compression.needs.features
    if multimodal.get_limit_per_prompt("image") == 0:
        yield "no images are allowed, so there is nothing to compress; raise --limit-mm-per-prompt"
    if any(key.startswith("mmcompress") for key in multimodal.mm_processor_kwargs or {}):
        yield f"{KEEP} is for requests; write keep into the additional config instead of --mm-processor-kwargs"
    if multimodal.enable_mm_embeds:
        yield "embeddings that clients send are not compressed; leave out --enable-mm-embeds"
    if vllm_config.speculative_config is not None:
        yield "drafts would be made of uncompressed positions; leave out --speculative-config"
    if lora is not None and lora.enable_tower_connector_lora:
        yield "adapters of the vision encoder are not supported; leave out --enable-tower-connector-lora"
    if compilation.cudagraph_mm_encoder:
        yield "CUDA graphs of the vision encoder would leave out compression; leave out cudagraph_mm_encoder"
    if compilation.compile_mm_encoder and reads_encoder:
        yield f"{name} reads inside the vision encoder, which must not be compiled; leave out compile_mm_encoder"
    if multimodal.mm_encoder_tp_mode == "data" and reads_encoder:
        yield f"{name} reads inside the vision encoder, so all ranks must run it; leave out --mm-encoder-tp-mode data"
    if has_mrope and multimodal.is_multimodal_pruning_enabled():
        yield "vLLM's own video pruning changes the same positions; leave out --video-pruning-rate"
    if has_mrope and vllm_config.parallel_config.pipeline_parallel_size > 1:
        yield "later pipeline stages would get wrong positions; use --tensor-parallel-size instead of pipeline stages"
    if has_mrope and vllm_config.parallel_config.use_ubatching:
        yield "each half of a batch would get the positions of the whole; leave out --enable-dbo and --ubatch-size"
    if has_mrope and compilation.cudagraph_mode == CUDAGraphMode.FULL:
        yield "full CUDA graphs of prefill would leave out positions; use cudagraph_mode FULL_AND_PIECEWISE"
    if has_mrope and _may_prefill_like_decode(vllm_config.scheduler_config):
        yield (
            "an image token alone in its step would be taken for decoding, whose CUDA graphs leave out positions; "
            "raise --max-num-batched-tokens above --max-num-seqs, and --long-prefill-token-threshold above 1"
        )


def _may_prefill_like_decode(scheduler: Any) -> bool:
    """Whether a step can have one token of every request it has, with one in the middle of a prompt among them."""
    return scheduler.max_num_batched_tokens <= scheduler.max_num_seqs or scheduler.long_prefill_token_threshold == 1


def _most_tokens(info: Any, compression: Compression) -> int:
    """Tokens of the largest image, separators left out."""
    if not compression.family.patches:
        return int(info.get_max_image_tokens())
    width, height = info.get_image_size_with_most_features()
    call = compression.call({"image_sizes": torch.tensor([[height, width]])})
    return int((~compression.layouts(1, call)[0].separator).sum())
