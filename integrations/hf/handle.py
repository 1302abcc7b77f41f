"""`wrap` and what it returns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from types import TracebackType
from typing import Any, cast

import transformers
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from mmcompress.accounting import Stats
from mmcompress.budget import Budget
from mmcompress.encoder_method import EncoderMethod
from mmcompress.errors import SpecError, UnsupportedError
from mmcompress.integrations.hf.cache import adopt
from mmcompress.integrations.hf.door import Door
from mmcompress.integrations.hf.families import FAMILIES, Family
from mmcompress.method import VisualMethod
from mmcompress.registry import METHODS, POLICIES, Stage
from mmcompress.spec import CompressionConfig, Spec, SpecLike
from mmcompress.types import EncoderFacts, Needs, Positions, Trace

_MARK = "_mmcompress_handle"
_STAGES: dict[Stage, type] = {"encoder": EncoderMethod, "pre_llm": VisualMethod}


class Handle:
    """A compressed model's controls; also a context manager that unwraps on exit.

    Args:
        config: what was asked for.
        method: the configured method.
        needs: the statistics it reads, with layers resolved for this model.
        encoder: what it knows of the vision encoder.
        positions: how kept tokens are numbered.
    """

    def __init__(self, family: Family, config: CompressionConfig) -> None:
        spec, method = _method(config)
        self.method: VisualMethod | EncoderMethod = method
        self.config = config
        self.encoder: EncoderFacts = family.facts()
        self.needs: Needs = self.method.needs(self.encoder)
        _require_supplied(spec.name, self.needs, self.encoder)
        if isinstance(self.method, EncoderMethod):
            _require_encoder_stage(self.method, family)
        elif self.method.space == "pre_projector" and self.encoder.no_pre_projector:
            raise UnsupportedError(
                f"{spec.name} merges features before the projector, which {type(family.base).__name__} rules out: "
                f'{self.encoder.no_pre_projector}. Option space="projected" merges projected tokens instead.'
            )
        _require_option(self.method)
        self.positions: Positions = config.positions or family.positions
        if spec.keep is None:
            raise SpecError(f"{spec.name} needs keep=: a fraction in (0, 1] or a token count, as in keep=0.25.")
        self._require_within_reach(spec.keep)
        self._base = family.base
        self._door: Door | None = Door(family, self.method, self.needs, self.encoder, spec.keep, self.positions)
        setattr(self._base, _MARK, self)

    @property
    def stats(self) -> Stats | None:
        """What the last prefill with visual input kept and saved; None before the first."""
        door = self._active()
        return None if door.stats is None else replace(door.stats, seconds=door.clock.read())

    @property
    def trace(self) -> list[Trace]:
        """What the last prefill with visual input did to every item, in row order."""
        return self._active().trace

    @property
    def keep(self) -> int | float:
        """The budget in force."""
        return self._active().keep.keep

    def set(self, *, keep: int | float) -> AbstractContextManager[Handle]:
        """Change the budget from now on; as a context manager, only until its end.

        Raises:
            SpecError: `keep` is out of range; the budget in force stays.
        """
        door, wanted = self._active(), Budget(keep)
        self._require_within_reach(wanted)
        before, door.keep = door.keep, wanted

        @contextmanager
        def until() -> Iterator[Handle]:
            try:
                yield self
            finally:
                door.keep = before

        return until()

    def reuse_vision(self) -> AbstractContextManager[None]:
        """While open, images seen before are not encoded again (without gradients); for many questions about few."""
        return self._active().vision.reuse()

    def unwrap(self) -> None:
        """Give the model back exactly as it was; a second call does nothing."""
        if self._door is not None:
            self._door.remove()
            self._door = None
            delattr(self._base, _MARK)

    def _require_within_reach(self, keep: Budget) -> None:
        if isinstance(self.method, EncoderMethod):
            self.method.plan(self.encoder.patches, keep.tokens(self.encoder.patches), self.encoder)

    def _active(self) -> Door:
        if self._door is None:
            raise UnsupportedError("this handle is unwrapped; call mmcompress.wrap again.")
        return self._door

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.unwrap()

    def __repr__(self) -> str:
        state = "unwrapped" if self._door is None else f"keep={self.keep}, positions={self.positions}"
        return f"<mmcompress {self.config} on {type(self._base).__name__}, {state}>"


def wrap(
    model: Any,
    method: SpecLike | Sequence[SpecLike] | CompressionConfig | None = None,
    *,
    keep: int | float | None = None,
    pruning_rate: float | None = None,
    kv: SpecLike | None = None,
    positions: Positions | None = None,
    **options: Any,
) -> Handle:
    """Compress the visual tokens of a transformers vision-language model, in place and reversibly.

    Args:
        model: a supported `PreTrainedModel` (or a PEFT model around one).
        method: a name, a spec such as "todre(keep=0.1)", a dict, a list of these, or a `CompressionConfig`.
        keep: per image or clip: a float in (0, 1] is a fraction, an int a token count.
        pruning_rate: the fraction removed, instead of `keep`.
        kv: a KV-cache policy.
        positions: "renumber" or "original"; default: renumber on 1-D RoPE, original on M-RoPE.
        options: options of the method.

    Raises:
        SpecError: an unknown method or option, or a value out of range.
        UnsupportedError: the model, or what the method needs of it, is not supported, or it is wrapped already.
    """
    if isinstance(method, CompressionConfig):
        if any(value is not None for value in (keep, pruning_rate, kv, positions)) or options:
            raise SpecError("a CompressionConfig says everything; give no other arguments beside it.")
        config = method
    else:
        config = CompressionConfig.create(
            method, keep=keep, pruning_rate=pruning_rate, kv=kv, positions=positions, options=options
        )
    _check_transformers()
    target = model.get_base_model() if hasattr(model, "get_base_model") else model
    family = _family(target)
    handle = getattr(family.base, _MARK, None)
    if handle is not None:
        raise UnsupportedError(f"already wrapped: {handle!r}. Call its unwrap() first, or set(keep=...) on it.")
    return Handle(family, config)


def _check_transformers() -> None:
    if not hasattr(Cache, "get_query_offset"):
        raise UnsupportedError(f"transformers {transformers.__version__} is too old: mmcompress needs >= 5.17.")


def _family(model: Any) -> Family:
    supported = ", ".join(sorted(FAMILIES))
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedError(f"{type(model).__name__} is no transformers model; supported families: {supported}.")
    kind = model.config.model_type
    if kind not in FAMILIES:
        problem = "is no vision-language model" if not hasattr(model.config, "vision_config") else "is not supported"
        raise UnsupportedError(f"{type(model).__name__} ({kind}) {problem}; supported families: {supported}.")
    family = FAMILIES[kind](model.base_model)
    adopt(DynamicCache(config=family.base.get_decoder().config))  # refuses what cannot be compressed into
    return family


def _method(config: CompressionConfig) -> tuple[Spec, VisualMethod | EncoderMethod]:
    if config.kv is not None:
        POLICIES.get(config.kv.name)
        raise UnsupportedError(f"KV policy {config.kv.name!r}: the Hugging Face engine applies no KV policies yet.")
    if len(config.methods) != 1:
        given = ", ".join(spec.name for spec in config.methods) or "none"
        raise SpecError(f"give exactly one method; got {given}. Available: {', '.join(METHODS.names())}.")
    spec = config.methods[0]
    method: Any = METHODS.build(spec.name, spec.options)
    if not isinstance(method, _STAGES.get(method.info.stage, ())):
        offered = " and ".join(f"{stage!r} (a {base.__name__})" for stage, base in _STAGES.items())
        raise UnsupportedError(f"{spec.name} acts in stage {method.info.stage!r}; this engine offers {offered}.")
    return spec, cast(VisualMethod | EncoderMethod, method)


def _require_supplied(name: str, needs: Needs, encoder: EncoderFacts) -> None:
    for statistic, layers in needs.layers().items():
        if statistic in encoder.missing:
            raise UnsupportedError(f"{name} needs {statistic}, which is not available: {encoder.missing[statistic]}.")
        outside = [layer for layer in layers if not 0 <= layer < encoder.depth]
        if outside:
            raise SpecError(
                f"{name} reads encoder layer {outside[0]}, but the encoder has layers 0..{encoder.depth - 1}."
            )


def _require_option(method: VisualMethod | EncoderMethod) -> None:
    name, option = method.info.name, method.info.requires
    if option and getattr(method, option) is None:
        raise SpecError(f"{name} needs {option}=; mmcompress info {name} says what to give.")


def _require_encoder_stage(method: EncoderMethod, family: Family) -> None:
    name, model = method.info.name, type(family.base).__name__
    if family.no_encoder_stage:
        raise UnsupportedError(
            f"{name} removes tokens between encoder layers, which {model} rules out: {family.no_encoder_stage}."
        )
    config: Any = family.attentions[0].config
    attention = config._attn_implementation
    if method.proportional and attention not in ("sdpa", "eager"):
        raise UnsupportedError(
            f"{name} adds the logarithm of token sizes to the attention logits, which {attention} does not take: give "
            "proportional=False, or load the model with attn_implementation='sdpa'."
        )


__all__ = ["Handle", "wrap"]
