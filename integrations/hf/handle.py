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
from mmcompress.elastic import Elastic
from mmcompress.encoder_method import EncoderMethod
from mmcompress.errors import SpecError, UnsupportedError
from mmcompress.integrations.hf.cache import adopt
from mmcompress.integrations.hf.door import Door
from mmcompress.integrations.hf.draft import Draft
from mmcompress.integrations.hf.families import FAMILIES, Family, family_of
from mmcompress.integrations.hf.kv_stage import KVStage, require_kv
from mmcompress.integrations.hf.llm_stage import LLMStage, llm_facts, require_in_llm
from mmcompress.integrations.hf.projector_stage import pooling
from mmcompress.integrations.hf.quant_stage import QuantStage, require_quantised
from mmcompress.integrations.hf.sparse_stage import SparseStage, require_sparse
from mmcompress.integrations.hf.stages import Method, Stages, configure, require_budget
from mmcompress.integrations.hf.text_tower import TextTower
from mmcompress.kv_policy import Evictor
from mmcompress.llm_method import LLMFacts, LLMMethod
from mmcompress.method import VisualMethod
from mmcompress.projector_method import ProjectorMethod
from mmcompress.sparse_reader import SparseReader
from mmcompress.spec import CompressionConfig, SpecLike
from mmcompress.types import EncoderFacts, Needs, Positions, Trace

_MARK = "_mmcompress_handle"
_MANY = 1_000_000  # tokens, so that rounding does not matter


class Handle:
    """A compressed model's controls; also a context manager that unwraps on exit.

    Args:
        config: what was asked for.
        method: the configured method that decides what enters the LLM; None if all does.
        llm_method: the configured method that acts inside the LLM, if there is one.
        policy: the configured KV policy that takes entries out or reads a part, if there is one.
        quantiser: the configured KV policy that packs, if there is one.
        needs: the statistics `method` reads, with layers resolved for this model.
        encoder: what it knows of the vision encoder.
        llm: what is known of the LLM.
        positions: how tokens that enter the LLM are numbered.
    """

    def __init__(self, family: Family, config: CompressionConfig, model: Any) -> None:
        stages = configure(config)
        self.method, self.llm_method, self.policy = stages.vision, stages.llm, stages.kv
        self.quantiser = stages.quantiser
        self.config = config
        self._family = family
        self.encoder: EncoderFacts = family.facts()
        self.llm: LLMFacts = llm_facts(family)
        self.needs: Needs = Needs() if self.method is None else self.method.needs(self.encoder)
        if self.method is not None:
            _require_supplied(self.method.info.name, self.needs, self.encoder)
        if isinstance(self.method, EncoderMethod):
            _require_encoder_stage(self.method, family)
        elif (
            isinstance(self.method, VisualMethod)
            and self.method.space == "pre_projector"
            and self.encoder.no_pre_projector
        ):
            raise UnsupportedError(
                f"{self.method.info.name} merges features before the projector, which {type(family.base).__name__} "
                f'rules out: {self.encoder.no_pre_projector}. Option space="projected" merges projected tokens instead.'
            )
        if self.llm_method is not None:
            require_in_llm(family, self.llm_method, self.llm)
        self.positions: Positions = config.positions or family.positions
        for keep, method in ((stages.keep, self.method), (stages.llm_keep, self.llm_method)):
            if keep is not None and method is not None:
                self._require_within_reach(keep, method)
        if isinstance(self.policy, SparseReader):
            require_sparse(family, self.policy)
        elif self.policy is not None:
            require_kv(family, model, self.policy, stages.kv_keep or Budget(1.0))
        if self.quantiser is not None:
            assert not isinstance(self.policy, SparseReader)
            require_quantised(family, model, self.quantiser, self.policy)
        draft = _draft(family, self.needs, self.policy)
        text_tower = None if self.needs.text_tower is None else TextTower(self.needs.text_tower, family)
        self._require_prompt(model)
        self._base = family.base
        llm_stage = None
        if self.llm_method is not None:
            numbered = self.llm_method.positions if family.positions == "renumber" else family.positions
            llm_stage = LLMStage(
                family, self.llm_method, self.llm, stages.llm_keep or Budget(1.0), config.positions or numbered
            )
        keep = stages.keep or Budget(1.0)
        self._door: Door | None = Door(
            family,
            self.method,
            self.needs,
            self.encoder,
            keep,
            self.positions,
            model,
            llm_stage=llm_stage,
            kv_stage=_kv_stage(family, stages),
            draft=draft,
            text_tower=text_tower,
        )
        setattr(self._base, _MARK, self)

    @property
    def stats(self) -> Stats | None:
        """What the last prefill with visual input kept and saved; None before the first."""
        door = self._active()
        if door.stats is None:
            return None
        return replace(
            door.stats,
            seconds=door.clock.read(),
            kv_held=door.kv_held,
            kv_layers=door.kv_layers,
            kv_read=door.kv_read,
        )

    @property
    def trace(self) -> list[Trace]:
        """What the last prefill with visual input did to every item, in row order."""
        return self._active().trace

    @property
    def dial(self) -> Elastic:
        """The budgets of a method that has a set of them, and what each comes to for an image.

        Raises:
            UnsupportedError: the method takes any budget.
        """
        if not isinstance(self.method, ProjectorMethod):
            raise UnsupportedError(f"{self.config} takes any budget; there is no dial.")
        return pooling(self._family, self.method)

    @property
    def keep(self) -> int | float:
        """The budget in force; that of the method before the LLM if there are two."""
        return self._budgeted.keep.keep

    @property
    def _budgeted(self) -> Door | LLMStage:
        door = self._active()
        return door.llm_stage if self.method is None and door.llm_stage is not None else door

    def set(
        self, *, keep: int | float | None = None, keep_avg: int | float | None = None
    ) -> AbstractContextManager[Handle]:
        """Change the budget from now on, see `wrap`; as a context manager, only until its end.

        The budget is the model's, in all threads: those that want budgets of their own must take turns.

        Raises:
            SpecError: the budget is out of range; the one in force stays.
        """
        if not self.config.methods:
            raise SpecError("the budget of a KV policy stays; unwrap the model and wrap it again with another.")
        if len(self.config.methods) > 1:
            raise SpecError("two methods have two budgets; unwrap the model and wrap it again with those you want.")
        stage = self._budgeted
        spec = CompressionConfig.create(self.config.methods[0].name, keep=keep, keep_avg=keep_avg).methods[0]
        method = cast(Method, self.method or self.llm_method)
        require_budget(spec, method)
        wanted = cast(Budget, spec.keep)
        self._require_within_reach(wanted, method)
        before, stage.keep = stage.keep, wanted

        @contextmanager
        def until() -> Iterator[Handle]:
            try:
                yield self
            finally:
                stage.keep = before

        return until()

    def reuse_vision(self) -> AbstractContextManager[None]:
        """While open, images seen before are not encoded again (without gradients); for many questions about few.

        Weights and adapters of the encoder must stay as they are meanwhile.
        """
        return self._active().vision.reuse()

    def unwrap(self) -> None:
        """Give the model back exactly as it was; a second call does nothing."""
        if self._door is not None:
            self._door.remove()
            self._door = None
            delattr(self._base, _MARK)

    def _require_within_reach(self, keep: Budget, method: Method) -> None:
        if keep.average and isinstance(keep.keep, float) and isinstance(method, LLMMethod):
            method.plan_average(_MANY, keep.keep * _MANY, self.llm)
        elif isinstance(method, EncoderMethod):
            method.plan(self.encoder.patches, keep.tokens(self.encoder.patches), self.encoder)
        elif isinstance(method, ProjectorMethod):
            self.dial.require(keep.tokens(self.encoder.patches))

    def _require_prompt(self, model: Any) -> None:
        """Refuse models that cannot tell where a prompt ends, if that decides what stays."""
        reads_text = self.needs.text or self.needs.text_tower is not None or self.needs.draft is not None
        stages = (self.llm_method, self.policy, self.quantiser)
        if not hasattr(model, "generate") and (reads_text or any(stage is not None for stage in stages)):
            raise UnsupportedError(
                f"{self.config} goes by the prompt, and {type(model).__name__} does not know where it ends; wrap the "
                "model that generates, not what is inside it."
            )

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
    keep_avg: int | float | None = None,
    kv: SpecLike | Sequence[SpecLike] | None = None,
    positions: Positions | None = None,
    **options: Any,
) -> Handle:
    """Compress the visual tokens of a transformers vision-language model, in place and reversibly.

    Logits and the last hidden state are of the prompt's length, as ever; hidden states and attentions by layer
    (`output_hidden_states`, `output_attentions`) are of what is left there. Features that were merged into
    `inputs_embeds` by hand are text to the model, and stay.

    Args:
        model: a supported `PreTrainedModel` (or a PEFT model around one).
        method: a name, a spec such as "todre(keep=0.1)", a dict, a list of these, or a `CompressionConfig`.
        keep: per image or clip: a float in (0, 1] is a fraction, an int a token count.
        pruning_rate: the fraction removed, instead of `keep`.
        keep_avg: instead of `keep`, the mean over all LLM layers, for methods that remove tokens between them.
        kv: a KV-cache policy; or one that evicts and one that packs what is left, as in
            ["snapkv(keep=512)", "kivi(bits=2)"].
        positions: "renumber" or "original"; default: renumber on 1-D RoPE, original on M-RoPE.
        options: options of the method.

    Raises:
        SpecError: an unknown method or option, or a value out of range.
        UnsupportedError: the model, or what the method needs of it, is not supported, or it is wrapped already.
    """
    if isinstance(method, CompressionConfig):
        if any(value is not None for value in (keep, pruning_rate, keep_avg, kv, positions)) or options:
            raise SpecError("a CompressionConfig says everything; give no other arguments beside it.")
        config = method
    else:
        config = CompressionConfig.create(
            method, keep=keep, pruning_rate=pruning_rate, keep_avg=keep_avg, kv=kv, positions=positions, options=options
        )
    _check_transformers()
    target = model.get_base_model() if hasattr(model, "get_base_model") else model
    family = _family(target)
    handle = getattr(family.base, _MARK, None)
    if handle is not None:
        raise UnsupportedError(f"already wrapped: {handle!r}. Call its unwrap() first, or set(keep=...) on it.")
    return Handle(family, config, target)


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
    family = family_of(model)
    adopt(DynamicCache(config=family.base.get_decoder().config))  # refuses what cannot be compressed into
    return family


def _kv_stage(family: Family, stages: Stages) -> KVStage | SparseStage | QuantStage | None:
    policy, keep = stages.kv, stages.kv_keep or Budget(1.0)
    if isinstance(policy, SparseReader):
        return SparseStage(family, policy, keep)
    evicting = None if policy is None else KVStage(family, policy, keep)
    return evicting if stages.quantiser is None else QuantStage(family, stages.quantiser, evicting)


def _draft(family: Family, needs: Needs, policy: Evictor | SparseReader | None) -> Draft | None:
    """The smaller model that reads first, if there is one."""
    ahead = policy.needs().draft if isinstance(policy, Evictor) else None
    first = None if needs.draft is None else needs.draft.folder
    if ahead is not None and first is not None and ahead != first:
        raise SpecError(f"one draft reads first: the method asks for {first!r}, the KV policy for {ahead!r}.")
    folder = first or ahead
    return None if folder is None else Draft(folder, family, needs.draft)


def _require_supplied(name: str, needs: Needs, encoder: EncoderFacts) -> None:
    for statistic, layers in needs.layers().items():
        if statistic in encoder.missing:
            raise UnsupportedError(f"{name} needs {statistic}, which is not available: {encoder.missing[statistic]}.")
        outside = [layer for layer in layers if not 0 <= layer < encoder.depth]
        if outside:
            raise SpecError(
                f"{name} reads encoder layer {outside[0]}, but the encoder has layers 0..{encoder.depth - 1}."
            )


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
