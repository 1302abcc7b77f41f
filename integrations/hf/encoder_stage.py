"""The encoder stage: hooks on vision layers between which tokens are merged or pruned."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from mmcompress.budget import Budget
from mmcompress.encoder_method import Attention, EncoderMethod, LayerTokens, Step, TokenMap
from mmcompress.errors import UnsupportedError
from mmcompress.integrations.hf.attached import Attached
from mmcompress.integrations.hf.families import Family
from mmcompress.integrations.hf.taps import tap
from mmcompress.merging import in_raster_order
from mmcompress.method import check_selection
from mmcompress.types import EncoderFacts, Needs, Selection


class Run:
    """One call of the encoder on its way through the layers.

    Args:
        steps: what each layer does; empty if all tokens stay.

    `done` is the map so far over all tokens of the images, `attention` what passed through the last tapped attention,
    `output` what is to be returned by the layer that is running.
    """

    def __init__(self, steps: list[Step]) -> None:
        self.steps = steps
        self.done: TokenMap | None = None
        self.attention: Attention | None = None
        self.output: Tensor | None = None


class _Local(threading.local):
    """What one thread is encoding."""

    run: Run | None = None


class EncoderStage(Attached):
    """The hooks of the encoder stage on one model; idle but for encoder calls within `encode`.

    Layers are those of CLIP and SigLIP, which add `self_attn` to their input, then `mlp` of `layer_norm2` of the sum.
    To remove tokens between the two, `layer_norm2` is given what is left, what `mlp` makes of it is added here, and
    the layer returns that sum in place of its own.
    """

    def __init__(
        self, family: Family, method: EncoderMethod, needs: Needs, encoder: EncoderFacts, keep: Budget
    ) -> None:
        self.keep = keep
        self._method = method
        self._encoder = encoder
        self._protected = int(family.has_cls)
        self._local = _Local()
        self._blocks = cast(list[Any], family.blocks[: encoder.used])
        self._read = {layer for layers in needs.layers().values() for layer in layers}
        read = [family.attentions[layer] for layer in self._read]
        self._tapped = [(attention, tap(attention, self._collect)) for attention in read]
        self._hooks = []
        for layer, block in enumerate(self._blocks):
            if method.proportional:
                self._hooks.append(block.self_attn.register_forward_pre_hook(self._weigh, with_kwargs=True))
            if method.place == "attention":
                self._hooks.append(block.layer_norm2.register_forward_pre_hook(partial(self._before_mlp, layer)))
                self._hooks.append(block.mlp.register_forward_hook(self._after_mlp))
            # The model records what a layer returns by hooks of its own, which must see fewer tokens.
            self._hooks.append(block.register_forward_hook(partial(self._after_layer, layer), prepend=True))

    def remove(self) -> None:
        """Take every hook off."""
        for attention, original in self._tapped:
            attention.config = original
        for hook in self._hooks:
            hook.remove()

    def encode(self, encode: Callable[[], Any]) -> tuple[Any, list[Selection]]:
        """Call `encode` so that `keep` tokens of every image reach the projector.

        Returns:
            Its output with as many features per image as there are patches, since that is what the rest of the model
            expects: each at its token's place, zeros elsewhere. And per image which patches stayed and what they
            absorbed; nothing if all stayed.

        Raises:
            UnsupportedError: gradient checkpointing would run layers again when what was removed is forgotten.
        """
        if torch.is_grad_enabled() and any(block.training and block.gradient_checkpointing for block in self._blocks):
            raise UnsupportedError(
                f"{self._method.info.name} does not work under gradient checkpointing of the vision encoder, which "
                "runs its layers a second time; call gradient_checkpointing_disable() on the vision tower."
            )
        patches = self._encoder.patches
        self._local.run = run = Run(self._method.plan(patches, self.keep.tokens(patches), self._encoder))
        try:
            output = encode()
        finally:
            self._local.run = None
        if run.done is None:
            return output, []
        features, selections = [], run.done.selections(self._protected)
        for kept, selection in zip(output.pooler_output, selections, strict=True):
            check_selection(self._method.info.name, selection, patches, run.steps[-1].left)
            anchor = selection.anchor.to(kept.device)
            features.append(kept.new_zeros(patches, kept.shape[-1]).index_copy(0, anchor, kept))
        output.pooler_output = features
        return output, [in_raster_order(selection) for selection in selections]

    def _collect(self, query: Tensor, key: Tensor, mask: Tensor | None, kwargs: dict[str, Any]) -> None:
        if self._local.run is not None:
            self._local.run.attention = Attention(query.detach(), key.detach(), kwargs["scaling"])

    @torch.compiler.disable
    def _weigh(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        run = self._local.run
        if run is None or run.done is None:
            return None
        hidden = kwargs["hidden_states"]
        bias = run.done.size.log().to(hidden)[:, None, None]
        return args, {**kwargs, "attention_mask": bias}

    @torch.compiler.disable
    def _before_mlp(self, layer: int, module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        run = self._local.run
        if run is None:
            return None
        run.output = self._reduce(run, layer, args[0])
        return None if run.output is None else (run.output,)

    @torch.compiler.disable
    def _after_mlp(self, module: Any, args: Any, output: Tensor) -> Tensor | None:
        run = self._local.run
        if run is None or run.output is None:
            return None
        run.output = run.output + output
        return output.new_zeros(1)  # which the layer can add to the tokens it still has

    @torch.compiler.disable
    def _after_layer(self, layer: int, module: Any, args: Any, output: Tensor) -> Tensor | None:
        run = self._local.run
        if run is None:
            return None
        if self._method.place == "layer":
            return self._reduce(run, layer, output)
        shorter, run.output = run.output, None
        return shorter

    def _reduce(self, run: Run, layer: int, hidden: Tensor) -> Tensor | None:
        """What the layer leaves of `hidden` `[images, tokens, width]`; None if that is all."""
        count = hidden.shape[1] - self._protected
        if not run.steps or run.steps[layer].left == count:
            return None
        if run.done is None and count != self._encoder.patches:
            raise UnsupportedError(f"images of {count} patches; the encoder is made for {self._encoder.patches}.")
        with torch.no_grad():
            size = hidden.new_ones(hidden.shape[:2], dtype=torch.float32) if run.done is None else run.done.size
            tokens = LayerTokens(
                encoder=self._encoder,
                layer=layer,
                protected=self._protected,
                hidden=hidden.detach(),
                size=size.to(hidden.device),
                attention=run.attention if layer in self._read else None,
            )
            reduction = self._method.reduce(tokens, run.steps[layer])
            run.done = reduction if run.done is None else run.done.to(hidden.device).then(reduction)
        return reduction.apply(hidden)
