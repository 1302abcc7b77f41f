"""Which KV policies vLLM can carry out, and what they leave of a request; vLLM itself is not imported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from mmcompress.budget import Budget
from mmcompress.errors import UnsupportedError
from mmcompress.kv_policy import Evictor, KVPolicy, Quantiser
from mmcompress.policies.quest import Quest
from mmcompress.policies.streamingllm import StreamingLLM
from mmcompress.registry import POLICIES
from mmcompress.sparse_reader import SparseReader
from mmcompress.spec import CompressionConfig, Spec

BLOCK = 32
"""The tokens of a block of vLLM's cache on a CPU are a multiple of this."""

_ELSEWHERE: dict[type[KVPolicy], str] = {
    Evictor: "lets layers or heads hold tokens of their own, but one table of blocks serves all layers of vLLM; take "
    "streamingllm, or use transformers",
    SparseReader: "is not built for vLLM; take quest, or use transformers",
    Quantiser: "packs entries in a layout of its own, and vLLM has others; take its --kv-cache-dtype, which goes along "
    "with visual compression, or use transformers",
}


@dataclass(frozen=True)
class Window:
    """What an evicting policy leaves of a request: its first tokens, and all from a certain place on."""

    policy: StreamingLLM
    keep: Budget

    @property
    def sinks(self) -> int:
        """How many of the first tokens stay."""
        return self.policy.sinks

    def start(self, prompt: int, position: int) -> int:
        """The first token behind the sinks that is still there when the one at `position` is read.

        Prompts, of `prompt` tokens, are read in full; then entries go, and again every `every` steps.
        """
        step = position - prompt
        if step < 0:
            return self.sinks
        held = position - step % self.policy.every
        capacity = max(self.policy.capacity(self.keep, prompt, prompt), self.sinks)
        return max(self.sinks, held - (capacity - self.sinks))

    @property
    def most(self) -> int:
        """How many tokens a request may hold that has a prompt of one token."""
        return max(self.policy.capacity(self.keep, 1, 1), self.sinks) + self.policy.every


@dataclass(frozen=True)
class KVPlan:
    """One of the policies that vLLM can carry out.

    Args:
        policy: what is evicted or read.
        keep: how many entries stay, or are read in every step.
    """

    policy: StreamingLLM | Quest
    keep: Budget

    @classmethod
    def of(cls, config: CompressionConfig) -> KVPlan | None:
        """The policy of a config that `wrap` accepts; None if it has none.

        Raises:
            UnsupportedError: vLLM cannot carry it out.
        """
        for spec in config.kv:
            _require_possible(POLICIES.build(spec.name, spec.options), spec)
        if not config.kv:
            return None
        if len(config.kv) > 1:
            raise UnsupportedError(f"vLLM carries out one KV policy, not {' and '.join(map(str, config.kv))}.")
        (spec,) = config.kv
        return cls(POLICIES.build(spec.name, spec.options), cast(Budget, spec.keep))

    @property
    def window(self) -> Window | None:
        """What is left of a request; None if nothing is evicted."""
        return Window(self.policy, self.keep) if isinstance(self.policy, StreamingLLM) else None

    def entries(self, tokens: int) -> int:
        """How many entries stay behind a prompt of so many tokens, or are read of them in every step."""
        if isinstance(self.policy, StreamingLLM):
            return min(tokens, self.policy.capacity(self.keep, tokens, tokens))
        return self.keep.tokens(tokens)


def _require_possible(policy: KVPolicy, spec: Spec) -> None:
    name = f"KV policy {spec.name}"
    if not isinstance(policy, (StreamingLLM, Quest)):
        why = next(why for kind, why in _ELSEWHERE.items() if isinstance(policy, kind))
        raise UnsupportedError(f"{name} {why}.")
    if isinstance(policy, StreamingLLM) and policy.scope != "all":
        raise UnsupportedError(
            f"{name}: scope={policy.scope} cannot be had, as the scheduler of vLLM does not know which tokens are of "
            "images; give scope=all."
        )
    if isinstance(policy, StreamingLLM) and policy.positions == "renumber":
        raise UnsupportedError(
            f"{name}: compat=official cannot be had, as it numbers what stays by its place in the cache, and keys in "
            "the blocks of vLLM stay as they were rotated; give compat=none."
        )
    if isinstance(policy, Quest) and policy.compat == "official":
        raise UnsupportedError(
            f"{name}: compat=official cannot be had, as a request that vLLM had to put off is read anew by several "
            "tokens at once, so that the newest page is known in full; give compat=none."
        )
    if isinstance(policy, Quest) and BLOCK % policy.page:
        raise UnsupportedError(
            f"{name}: page={policy.page} does not divide the {BLOCK} tokens of which blocks of vLLM are multiples; "
            "give 8, 16 or 32."
        )
