"""The stages of training: the encoder on labels, projector and language model on questions, then on fewer tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmcompress.evals.micro.training import architectures
from mmcompress.evals.micro.training.answering import Dropout, answer, drop, keep_all, looking
from mmcompress.evals.micro.training.batches import AnswersBatch, AnswersBatches, VisionBatch, VisionBatches
from mmcompress.evals.micro.training.families import Hidden, Prefix
from mmcompress.evals.micro.training.grounding import ground
from mmcompress.evals.micro.training.recipes import Optimisation, Recipe, stage_settings
from mmcompress.evals.micro.training.vision import Metrics, VisionHeads

_PRUNED_SHARE = 0.6
_FEWEST_KEPT = 0.05
_SCALE_BATCHES = 4
_LOOKING_LAYER, _LOOKING_HEADS, _LOOKING_WEIGHT = -2, 2, 0.2


@dataclass
class Modules:
    """What is trained.

    Args:
        model: the vision-language model.
        heads: read-outs of its encoder, while that is trained.
        token_heads: read-outs of its LLM tokens, for recipes that teach them.
        clip: a CLIP around its encoder, for recipes with a text tower.
    """

    model: Any
    heads: VisionHeads | None
    token_heads: VisionHeads | None
    clip: Any

    @classmethod
    def build(cls, recipe: Recipe) -> Modules:
        """Fresh modules, equal for equal recipes."""
        torch.manual_seed(recipe.seed)
        model = recipe.build()
        token_heads = None
        if recipe.token_patch is not None:
            token_heads = VisionHeads(model.config.text_config.hidden_size, levels=1, summaries=0)
        if recipe.vision is None:
            return cls(model, None, token_heads, None)
        vision = model.config.vision_config
        with_cls = hasattr(vision, "projection_dim")
        if with_cls:
            architectures.initialise_encoder(recipe.family.encoder(model))
        heads = VisionHeads(
            vision.hidden_size,
            levels=2 if with_cls else 1,
            summaries=2 if with_cls else 0,
            characters=recipe.characters,
        )
        return cls(model, heads, token_heads, architectures.clip(vision) if recipe.text_tower else None)

    def prepare(self, recipe: Recipe, device: torch.device, compiled: bool) -> None:
        """Move everything to `device`, choose the fastest attention for it and compile what takes longest."""
        encoder = recipe.family.encoder(self.model)
        self.model.set_attn_implementation(recipe.family.cpu_attention if device.type == "cpu" else "sdpa")
        if recipe.shown_where:
            self.model.set_attn_implementation({"text_config": "eager"})
        for module in self.named().values():
            module.to(device).train()
        if self.clip is not None:
            self.clip.vision_model = getattr(encoder, "vision_model", encoder)
        if compiled:
            encoder.compile()
            if not recipe.shown_where:
                self.model.model.language_model.compile()

    def head_parameters(self) -> set[nn.Parameter]:
        """The weights of all read-outs."""
        heads = (self.heads, self.token_heads)
        return {weight for head in heads if head is not None for weight in head.parameters()}

    def named(self) -> dict[str, nn.Module]:
        """The modules there are, by name."""
        modules = {"model": self.model, "heads": self.heads, "token heads": self.token_heads, "clip": self.clip}
        return {name: module for name, module in modules.items() if module is not None}


class VisionStage:
    """The encoder, and the text tower beside it, learn what the pictures show."""

    name = "vision"

    def __init__(self, recipe: Recipe, modules: Modules, device: torch.device, scale: float, fresh: bool) -> None:
        assert recipe.vision is not None and modules.heads is not None
        self.optimisation = recipe.vision
        self.steps = self.optimisation.scaled(scale)
        self.data = VisionBatches(recipe, self.steps)
        self.slow: set[nn.Parameter] = set()
        self._family, self._modules, self._heads = recipe.family, modules, modules.heads
        projector = set(architectures.projector(modules.model).parameters())
        encoder = recipe.family.encoder(modules.model).parameters()
        self.trained = [weight for weight in encoder if weight not in projector] + [*modules.heads.parameters()]
        if modules.clip is not None:
            named = modules.clip.named_parameters()
            self.trained += [weight for name, weight in named if not name.startswith("vision_model")]

    def loss(self, batch: VisionBatch, step: int) -> tuple[Tensor, Metrics]:
        hidden = self._family.hidden(self._modules.model, batch.pictures)
        loss, metrics = self._heads(hidden, batch.labels, batch.facts)
        if self._modules.clip is None:
            return loss, metrics
        # Its gradients are so large that the encoder would learn little else, and it needs nothing the labels miss.
        patches = hidden.patches[0].detach()
        grounding, found = ground(self._modules.clip, patches, batch.questions, batch.asked, batch.referred)
        return loss + grounding, metrics | found


class AnswersStage:
    """Projector and language model learn to answer; the encoder stays as it is."""

    name: Literal["answers", "pruned"] = "answers"

    def __init__(self, recipe: Recipe, modules: Modules, device: torch.device, scale: float, fresh: bool) -> None:
        self.optimisation = self._optimisation(recipe)
        self.steps = self.optimisation.scaled(scale)
        self.data = AnswersBatches(recipe, self.name, self.steps)
        self._recipe, self._model, self._token_heads = recipe, modules.model, modules.token_heads
        projector = set(architectures.projector(modules.model).parameters())
        for weight in recipe.family.encoder(modules.model).parameters():
            weight.requires_grad_(weight in projector)
        if fresh and self.name == "answers" and not recipe.keeps_language_model:
            self._initialise(device)
        self.trained = [weight for weight in modules.model.parameters() if weight.requires_grad]
        if modules.token_heads is not None:
            self.trained += modules.token_heads.parameters()
        self.slow = projector

    def _optimisation(self, recipe: Recipe) -> Optimisation:
        return recipe.answers

    def loss(self, batch: AnswersBatch, step: int) -> tuple[Tensor, Metrics]:
        prefix = self._recipe.family.prefix(self._model, batch.pictures)
        features = self._recipe.family.features(self._model, batch.pictures)
        dropout = self._dropout(prefix, len(batch.ids), step)
        watched = self._recipe.shown_where and self.name == "answers"
        loss, right, looks = answer(
            self._model, features, prefix, dropout, batch.ids, batch.block, batch.offset, batch.target, watched
        )
        complete = dropout.kept.shape[1] == len(prefix.ids)
        metrics = {"answers" if complete else "answers on fewer tokens": right}
        if watched:
            look = looks[_LOOKING_LAYER][:, :_LOOKING_HEADS, :, prefix.visual.to(features.device)]
            missed = looking(look, batch.referent, batch.owners)
            loss = loss + _LOOKING_WEIGHT * missed
            metrics["looks"] = (-missed.detach()).exp()
        if self._token_heads is not None:
            teaching, shares = self._token_heads(Hidden([features], []), batch.labels, None)
            loss = loss + teaching
            metrics |= {f"token {name}": share for name, share in shares.items()}
        return loss, metrics

    def _dropout(self, prefix: Prefix, rows: int, step: int) -> Dropout:
        return keep_all(prefix, rows)

    def _initialise(self, device: torch.device) -> None:
        """Scale the fresh language model and projector to what enters the projector."""
        projector = architectures.projector(self._model)
        rms = 1.0 if hasattr(projector, "ln_q") else self._feature_rms(projector, device)  # a Qwen's normalises first
        torch.manual_seed(self._recipe.seed)
        architectures.initialise_language_model(self._model, rms)

    def _feature_rms(self, projector: nn.Module, device: torch.device) -> float:
        seen: list[Tensor] = []
        hook = projector.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].float()))
        try:
            with torch.no_grad():
                for number in range(_SCALE_BATCHES):
                    self._recipe.family.features(self._model, self.data[number].pictures.to(device))
        finally:
            hook.remove()
        return math.sqrt(sum(float(states.pow(2).mean()) for states in seen) / len(seen))


class PrunedStage(AnswersStage):
    """Most batches see only some of their visual tokens, half of those with positions renumbered where they are 1-D."""

    name = "pruned"

    def _optimisation(self, recipe: Recipe) -> Optimisation:
        assert recipe.pruned is not None
        return recipe.pruned

    def _dropout(self, prefix: Prefix, rows: int, step: int) -> Dropout:
        """All tokens, or a share between all and a twentieth, the logarithm of which is uniform."""
        generator = torch.Generator().manual_seed(self._recipe.seed * 1_000_003 + step)
        pruning, share, renumbering = torch.rand(3, generator=generator).tolist()
        if pruning >= _PRUNED_SHARE:
            return keep_all(prefix, rows)
        renumbered = renumbering < 0.5 and len(prefix.positions) == 1  # M-RoPE always keeps its ids
        return drop(prefix, rows, _FEWEST_KEPT**share, renumbered, generator)


Stage = VisionStage | AnswersStage


def stages(recipe: Recipe) -> list[type[VisionStage] | type[AnswersStage]]:
    """The stages of a recipe, in order."""
    kinds: dict[str, type[VisionStage] | type[AnswersStage]] = {
        "vision": VisionStage,
        "answers": AnswersStage,
        "pruned": PrunedStage,
    }
    return [kinds[name] for name in stage_settings(recipe)]
