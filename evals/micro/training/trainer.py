"""Training a recipe, from nothing or from where an earlier run stopped."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mmcompress.errors import InputError, SpecError
from mmcompress.evals.micro import GENERATOR_VERSION
from mmcompress.evals.micro.training import curves, export
from mmcompress.evals.micro.training.recipes import find_recipe, only, onward
from mmcompress.evals.micro.training.stages import Modules, Stage, stages

CHECKPOINT = "checkpoint.pt"
LOG = "log.jsonl"
CURVES = "curves.png"

_WARM_UP = 150
_FINAL_RATE = 0.03
_BETAS = (0.9, 0.98)
_WEIGHT_DECAY = 0.02
_MAX_GRADIENT = 1.0
# Encoder states have a large common part; at the full rate a fresh projector makes all visual tokens alike and huge.
_SLOW = 0.2
# Fresh read-outs of a finished model are linear and have little time.
_FRESH = 4.0
_LOG_EVERY = 20
_SAVE_EVERY_SECONDS = 120.0

Row = dict[str, Any]
"""One line of the log: stage, step, seconds, and means over the steps since the line before."""


class Trainer:
    """The state of one training run, in `folder`.

    Args:
        name: of the recipe.
        folder: for checkpoint, log, curves and the model; a run found there is continued.
        start: folder of the model to start from, if not the embedded one, for recipes that have one.
        source: folder of a finished model of this recipe, to train it on.
        steps: the only stages to run, and how many steps each.
        device: where to train.
        scale: multiplies the number of steps, to try a recipe.
        compiled: whether to compile the model first.

    Raises:
        SpecError: there is no such recipe or stage, it needs a `start`, or the checkpoint is of another run.
        InputError: the checkpoint or the model to start from cannot be read.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        *,
        start: Path | None = None,
        source: Path | None = None,
        steps: Mapping[str, int] | None = None,
        device: str = "cpu",
        scale: float = 1.0,
        compiled: bool = False,
    ) -> None:
        self.name, self.folder, self.device, self.scale = name, folder, torch.device(device), scale
        self.source, self.steps = source.resolve().name if source else None, dict(steps or {})
        self.rows: list[Row] = read_log(source) if source else []
        self.recipe = only(find_recipe(name), self.steps)
        if source is not None:
            # A seed of its own for every sitting.
            self.recipe = onward(self.recipe, self.recipe.seed + len(self.rows) + 1)
        self.stages = [kind for kind in stages(self.recipe) if not self.steps or kind.name in self.steps]
        self.modules = Modules.build(self.recipe)
        self.stage = self.step = 0
        self.seconds = self.rows[-1]["seconds"] if self.rows else 0.0
        self._optimizer_state: dict[str, Any] | None = None
        resumed = (folder / CHECKPOINT).exists()
        if source is not None:
            export.take_all(self.modules, source)
        elif self.recipe.start is not None and not resumed:
            export.take_weights(self.modules.model, self.recipe, start)
        if resumed:
            self._resume()
        self.modules.prepare(self.recipe, self.device, compiled)

    def run(
        self, seconds: float | None = None, workers: int = 0, report: Callable[[Row], None] = lambda row: None
    ) -> bool:
        """Train to the end, or for `seconds`, leaving a loadable model in the folder; True if training is finished."""
        deadline = time.monotonic() + (math.inf if seconds is None else seconds)
        self.folder.mkdir(parents=True, exist_ok=True)
        while self.stage < len(self.stages) and time.monotonic() < deadline:
            stage = self.stages[self.stage](self.recipe, self.modules, self.device, self.scale, fresh=self.step == 0)
            if self._train(stage, deadline, workers, report):
                self.stage, self.step, self._optimizer_state = self.stage + 1, 0, None
            self._save()
        return self.stage == len(self.stages)

    def _train(self, stage: Stage, deadline: float, workers: int, report: Callable[[Row], None]) -> bool:
        on_gpu = self.device.type == "cuda"
        optimizer = torch.optim.AdamW(
            self._groups(stage), lr=0.0, betas=_BETAS, weight_decay=_WEIGHT_DECAY, fused=on_gpu or None
        )
        if self._optimizer_state is not None:
            optimizer.load_state_dict(self._optimizer_state)
        steps = range(self.step, stage.steps)
        loader = DataLoader(stage.data, batch_size=None, sampler=steps, num_workers=workers, pin_memory=on_gpu)
        sums: dict[str, list[Tensor]] = {}
        saved = started = time.monotonic()
        for batch in loader:
            batch = type(batch)(*(value.to(self.device, non_blocking=True) for value in batch))
            for group in optimizer.param_groups:
                share = rate(self.step, stage.steps, group["still"])
                group["lr"] = group["factor"] * stage.optimisation.learning_rate * share
            with torch.autocast(self.device.type, torch.bfloat16):
                loss, metrics = stage.loss(batch, self.step)
            loss.backward()
            nn.utils.clip_grad_norm_(stage.trained, _MAX_GRADIENT)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            self.step += 1
            for key, value in {"loss": loss.detach(), **metrics}.items():
                sums.setdefault(key, []).append(value)
            if self.step % _LOG_EVERY and self.step < stage.steps:
                continue  # checkpoints lie between two lines of the log, so that a resumed run writes the same lines
            now = time.monotonic()
            self.seconds, started = self.seconds + now - started, now
            means = {key: round(torch.stack(values).float().nanmean().item(), 5) for key, values in sums.items()}
            row = {"stage": stage.name, "step": self.step, "seconds": round(self.seconds, 1), **means}
            self.rows.append(row | ({"from": self.source} if self.source else {}))
            report(self.rows[-1] | {"steps": stage.steps})
            sums.clear()
            self._optimizer_state = optimizer.state_dict()
            if now > deadline:
                return self.step == stage.steps
            if now - saved > _SAVE_EVERY_SECONDS:
                self._save()
                saved = now
        return True

    def _groups(self, stage: Stage) -> list[dict[str, Any]]:
        """Weights by how fast they learn; finished ones stand still until fresh read-outs beside them make sense."""
        fresh_heads = self.recipe.continued and (self.stage == 0 or stage.name == "answers")
        heads = self.modules.head_parameters()
        groups: dict[tuple[float, int], list[nn.Parameter]] = {}
        for weight in stage.trained:
            factor, still = _SLOW if weight in stage.slow and not self.recipe.continued else 1.0, 0
            if fresh_heads and weight in heads:
                factor = _FRESH
            elif fresh_heads:
                still = warm_up(stage.steps)
            groups.setdefault((factor, still), []).append(weight)
        return [{"params": weights, "factor": factor, "still": still} for (factor, still), weights in groups.items()]

    def _identity(self) -> dict[str, Any]:
        return {
            "model": self.name,
            "seed": self.recipe.seed,
            "scale": self.scale,
            "from": self.source,
            "steps": self.steps,
            "generator version": GENERATOR_VERSION,
        }

    def _save(self) -> None:
        state = {
            "identity": self._identity(),
            "stage": self.stage,
            "step": self.step,
            "seconds": self.seconds,
            "rows": self.rows,
            "optimizer": self._optimizer_state,
            "weights": {name: module.state_dict() for name, module in self.modules.named().items()},
        }
        unfinished = self.folder / f"{CHECKPOINT}.new"
        torch.save(state, unfinished)
        unfinished.replace(self.folder / CHECKPOINT)
        (self.folder / LOG).write_text("".join(json.dumps(row) + "\n" for row in self.rows), encoding="utf-8")
        curves.draw(self.rows, self.name, self.folder / CURVES)
        export.write(self.modules, self.recipe, self.folder)

    def _resume(self) -> None:
        path = self.folder / CHECKPOINT
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            identity, weights = state["identity"], state["weights"]
        except Exception as error:  # a torn file fails in as many ways as there are places to tear it
            raise InputError(f"checkpoint {path} cannot be read ({error}); delete the folder to start anew.") from error
        if identity != self._identity():
            raise SpecError(
                f"{path} is of another run: it was made with {identity}, now asked for is {self._identity()}. "
                "Name another folder, or delete this one to start anew."
            )
        for name, module in self.modules.named().items():
            module.load_state_dict(weights[name])
        self.stage, self.step, self.seconds, self.rows = (state[key] for key in ("stage", "step", "seconds", "rows"))
        self._optimizer_state = state["optimizer"]


def read_log(folder: Path) -> list[Row]:
    """The lines of the log in `folder`, none if it has no log."""
    path = folder / LOG
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def warm_up(steps: int) -> int:
    """How many of `steps` the learning rate takes to its peak."""
    return max(1, min(_WARM_UP, steps // 8))


def rate(step: int, steps: int, still: int = 0) -> float:
    """The learning rate at `step` of `steps`, relative to its peak, of weights that stand still for `still` steps."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    return min(1.0, max(0.0, (step + 1 - still) / warm_up(steps))) * (_FINAL_RATE + (1 - _FINAL_RATE) * cosine)
