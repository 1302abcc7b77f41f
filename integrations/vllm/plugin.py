"""What vLLM loads at start-up, in every process: cheap, repeatable, and without effect until it is configured."""

from __future__ import annotations

import difflib
import functools
import logging
from typing import Any

from mmcompress.errors import SpecError
from mmcompress.integrations.vllm.architectures import ARCHITECTURES, PREFIX
from mmcompress.integrations.vllm.kv.platform import offer_backend


def register() -> None:
    """Offer the compressed models to vLLM, under names of their own, and look at every configuration."""
    from vllm import ModelRegistry
    from vllm.config import VllmConfig

    for architecture, where in ARCHITECTURES.items():
        ModelRegistry.register_model(PREFIX + architecture, where)
    offer_backend()
    verify = getattr(VllmConfig, "try_verify_and_update_config", None)
    if verify is None:  # an exception would end vLLM for everybody who has the package
        logging.getLogger("vllm.mmcompress").warning("mmcompress is not made for this vLLM and does nothing in it.")
    elif not hasattr(verify, "mmcompress"):
        VllmConfig.try_verify_and_update_config = _then_configure(verify)


def _then_configure(verify: Any) -> Any:
    @functools.wraps(verify)
    def verify_and_configure(self: Any) -> None:
        is_first = self.model_config is not None and not getattr(self.model_config, "config_updated", False)
        verify(self)
        if is_first:
            configure(self)

    verify_and_configure.mmcompress = True  # type: ignore[attr-defined]
    return verify_and_configure


def configure(vllm_config: Any) -> None:
    """Have the compressed model loaded, if that is asked for and possible.

    Raises:
        SpecError: it is malformed, or asked for under a name that is nearly ours.
        UnsupportedError: this model, engine or release of vLLM cannot carry it out.
    """
    wanted = vllm_config.additional_config
    if not isinstance(wanted, dict):
        return
    others = {str(name).lower(): name for name in wanted if name != "mmcompress"}
    for misspelt in difflib.get_close_matches("mmcompress", others, cutoff=0.9):
        raise SpecError(f"unknown entry {others[misspelt]!r} of the additional config. Did you mean 'mmcompress'?")
    if "mmcompress" not in wanted:
        return
    from mmcompress.integrations.vllm.start import start

    start(vllm_config, wanted["mmcompress"])
