"""What was asked for, configured and put where it acts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

from mmcompress.budget import Budget
from mmcompress.encoder_method import EncoderMethod
from mmcompress.errors import SpecError, UnsupportedError
from mmcompress.kv_policy import Evictor, KVPolicy, Quantiser
from mmcompress.llm_method import LLMMethod
from mmcompress.method import VisualMethod
from mmcompress.projector_method import ProjectorMethod
from mmcompress.registry import METHODS, POLICIES, Stage
from mmcompress.sparse_reader import SparseReader
from mmcompress.spec import CompressionConfig, Spec

Method = VisualMethod | EncoderMethod | ProjectorMethod | LLMMethod
_BASES: dict[Stage, type] = {
    "encoder": EncoderMethod,
    "projector": ProjectorMethod,
    "pre_llm": VisualMethod,
    "in_llm": LLMMethod,
}


@dataclass(frozen=True)
class Stages:
    """The configured methods by where they act."""

    vision: VisualMethod | EncoderMethod | ProjectorMethod | None = None
    keep: Budget | None = None
    llm: LLMMethod | None = None
    llm_keep: Budget | None = None
    kv: Evictor | SparseReader | None = None
    kv_keep: Budget | None = None
    quantiser: Quantiser | None = None


def _method(spec: Spec) -> Method:
    method: Any = METHODS.build(spec.name, spec.options)
    stage = method.info.stage
    if not isinstance(method, _BASES.get(stage, ())):
        offered = ", ".join(f"{name!r} (a {base.__name__})" for name, base in _BASES.items())
        raise UnsupportedError(f"{spec.name} acts in stage {stage!r}; this engine offers {offered}.")
    return cast(Method, method)


def configure(config: CompressionConfig) -> Stages:
    """The methods and policies that `config` names.

    Raises:
        SpecError: one of them is unknown or malformed, or they do not go together.
        UnsupportedError: a method acts where this engine has no stage.
    """
    if not config.methods and not config.kv:
        raise SpecError(f"give a method or a KV policy. Available: {', '.join(METHODS.names())}.")
    stages = Stages()
    for spec in config.methods:
        method = _method(spec)
        _require_option(method)
        require_budget(spec, method)
        if isinstance(method, LLMMethod):
            _require_one_inside(stages, method)
            stages = replace(stages, llm=method, llm_keep=spec.keep)
            continue
        if stages.vision is not None:
            raise SpecError(
                f"{stages.vision.info.name} and {spec.name} both decide what enters the LLM; give one of them, and "
                "beside it at most one method that acts inside the LLM."
            )
        if stages.llm is not None:
            raise SpecError(f"{spec.name} acts before {stages.llm.info.name}: give it first.")
        part = method.second_part if isinstance(method, VisualMethod) else None
        stages = Stages(method, spec.keep, part)
    return _with_policies(stages, config)


def _with_policies(stages: Stages, config: CompressionConfig) -> Stages:
    policies = [(_policy(spec), spec.keep) for spec in config.kv]
    names = [policy.info.name for policy, _ in policies]
    if len(policies) == 2 and isinstance(policies[0][0], Quantiser) and isinstance(policies[1][0], Evictor):
        raise SpecError(f"{names[1]} acts before {names[0]}: give it first.")
    if len(policies) > 1 and [_kind(policy) for policy, _ in policies] != [Evictor, Quantiser]:
        raise SpecError(
            f"KV policies {' and '.join(names)} do not go together; what does is one that evicts and behind it one "
            'that packs, as in ["snapkv(keep=512)", "kivi(bits=2)"].'
        )
    for policy, keep in policies:
        if isinstance(policy, Quantiser):
            stages = replace(stages, quantiser=policy)
        else:
            stages = replace(stages, kv=policy, kv_keep=keep)
    renumbers = isinstance(stages.kv, Evictor) and stages.kv.positions == "renumber"
    if renumbers and (stages.llm is not None or config.positions == "original"):
        raise SpecError(
            f"{names[0]} numbers what stays by its place in the cache, so every layer must hold the same: give no "
            "method that acts inside the LLM, nor positions=original, beside it."
        )
    return stages


def _kind(policy: KVPolicy) -> type[KVPolicy]:
    return next(kind for kind in (Evictor, SparseReader, Quantiser) if isinstance(policy, kind))


def _policy(spec: Spec) -> Evictor | SparseReader | Quantiser:
    """The configured KV policy.

    Raises:
        SpecError: it is malformed, lacks its budget, or takes none.
    """
    policy: Any = POLICIES.build(spec.name, spec.options)
    _require_option(policy)
    if isinstance(policy, Quantiser):
        if spec.keep is not None:
            raise SpecError(f"{spec.name} takes no keep=: it holds all entries, in fewer bits.")
    elif spec.keep is None or spec.keep.average:
        raise SpecError(f"{spec.name} needs keep=: a fraction in (0, 1] or a count of entries, as in keep=512.")
    return cast(Evictor | SparseReader | Quantiser, policy)


def _require_one_inside(stages: Stages, method: LLMMethod) -> None:
    if stages.llm is None:
        return
    name, first = method.info.name, stages.llm.info.name
    if stages.vision is not None and isinstance(stages.vision, VisualMethod) and stages.vision.second_part is not None:
        whole = stages.vision.info.name
        raise SpecError(f"{whole} goes on inside the LLM, where {name} acts too; give {whole}(parts=first) beside it.")
    raise SpecError(f"{name} and {first} both remove tokens inside the LLM; give one of them.")


def _require_option(method: Method | KVPolicy) -> None:
    name, lacking = method.info.name, method.info.lacking(method)
    if lacking:
        raise SpecError(f"{name} needs {lacking}; mmcompress info {name} says what to give.")


def require_budget(spec: Spec, method: Method) -> None:
    """Refuse a budget that the method does not take, and none where it needs one.

    Raises:
        SpecError: it is so.
    """
    if spec.keep is not None and spec.keep.average and not isinstance(method, LLMMethod):
        raise SpecError(f"{spec.name} removes no tokens inside the LLM, so all its layers have as many: give keep=.")
    if method.info.takes_keep and spec.keep is None:
        raise SpecError(f"{spec.name} needs keep=: a fraction in (0, 1] or a token count, as in keep=0.25.")
    if not method.info.takes_keep and spec.keep is not None:
        raise SpecError(f"{spec.name} takes no keep=: its own rule says how many tokens are left.")
