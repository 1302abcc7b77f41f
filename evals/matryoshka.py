"""Matryoshka training: teaching a model to answer from nested numbers of visual tokens (M3, arXiv:2405.17430)."""

from __future__ import annotations

import functools
import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from mmcompress.errors import InputError, SpecError, UnsupportedError
from mmcompress.evals.conversations import batch, check_template, grouped, readable
from mmcompress.evals.loading import weights_fingerprint
from mmcompress.evals.micro.saving import rename_as_on_the_hub
from mmcompress.evals.suites.base import Question, Suite, fingerprint
from mmcompress.integrations.hf import wrap
from mmcompress.integrations.hf.projector_stage import SCALES

CHECKPOINT, LOG = "checkpoint.pt", "log.jsonl"
LLM = Literal["frozen", "lora", "full"]

_UNUSED = DistributedDataParallelKwargs(find_unused_parameters=True)  # tower layers behind the one that is looked at
_WARM_UP = 0.03
_MAX_GRADIENT = 1.0
_ONE_FILE = "1TB"
_LORA_RANK, _LORA_ALPHA = 128, 256
_LLM_LINEARS = r".*language_model\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"

Report = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Recipe:
    """What a run is; an interrupted one goes on only with the same.

    Args:
        budgets: tokens per tile, of which every step draws some.
        steps: optimiser steps.
        batch: conversations per step and process.
        turns: the most questions of one conversation, which are about the same images.
        draws: budgets of a step, whose losses are averaged; M3 was trained with all of them.
        learning_rate: highest, for the projector and a full LLM.
        lora_learning_rate: highest, for LoRA's weights.
        tower_learning_rate: highest, for the vision tower.
        llm: what is trained of the LLM; the projector always is.
        tower: whether the vision tower is trained too.
        seed: of the order of the questions and of the budgets.

    Raises:
        SpecError: there would be nothing to do.
    """

    budgets: tuple[int, ...]
    steps: int
    batch: int = 8
    turns: int = 1
    draws: int = 1
    learning_rate: float = 2e-5
    lora_learning_rate: float = 2e-4
    tower_learning_rate: float = 2e-5
    llm: LLM = "full"
    tower: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.budgets or min(self.steps, self.batch, self.turns) < 1:
            raise SpecError("training needs budgets, and at least one step of at least one question.")
        if len(set(self.budgets)) < len(self.budgets):
            raise SpecError(f"a budget is given twice: {', '.join(map(str, self.budgets))}.")
        if not 1 <= self.draws <= len(self.budgets):
            raise SpecError(f"a step cannot draw {self.draws} of {len(self.budgets)} budgets.")

    def drawn(self, step: int) -> list[int]:
        """The budgets of a step, the same in all processes."""
        return random.Random(f"{self.seed} {step}").sample(self.budgets, self.draws)

    def dealt(self, count: int, step: int, rank: int, processes: int) -> list[int]:
        """Which of `count` conversations a process is given in a step; every epoch has an order of its own."""
        first = (step * processes + rank) * self.batch
        return list(islice(self._order(count, first), self.batch))

    def _order(self, count: int, first: int) -> Iterator[int]:
        for epoch in range(first // count, first // count + self.batch + 1):
            yield from _shuffled(count, f"{self.seed} epoch {epoch}")[max(0, first - epoch * count) :]

    def highest_rate(self, weight: str) -> float:
        """The highest learning rate of the weight of this name."""
        if "lora_" in weight:
            return self.lora_learning_rate
        return self.tower_learning_rate if "vision_tower" in weight else self.learning_rate

    def rate(self, step: int) -> float:
        """Share of the highest learning rate: a linear warm-up, then a cosine down to nothing."""
        warm_up = max(1, math.ceil(_WARM_UP * self.steps))
        if step < warm_up:
            return (step + 1) / warm_up
        return 0.5 + 0.5 * math.cos(math.pi * (step - warm_up) / max(1, self.steps - warm_up))


class Steps(Dataset[Any]):
    """What one of several processes is trained on in each step."""

    def __init__(
        self, processor: Any, conversations: Sequence[Sequence[Question]], recipe: Recipe, rank: int, processes: int
    ) -> None:
        self._processor, self._conversations, self._recipe = processor, conversations, recipe
        self._place = rank, processes

    def __getitem__(self, step: int) -> Any:
        chosen = self._recipe.dealt(len(self._conversations), step, *self._place)
        return batch(self._processor, [self._conversations[number] for number in chosen])


class Trainer:
    """One run in one folder; a run that is found there is continued.

    Args:
        model: a LLaVA or LLaVA-NeXT in full precision.
        processor: its processor, with a chat template.
        suite: where the questions are.
        recipe: what to do.
        folder: for the checkpoint, the log and the finished model.

    Raises:
        SpecError: the model cannot have such budgets, or the folder holds another run.
        InputError: a row of the dataset is malformed or lacks its image, or the checkpoint cannot be read.
        UnsupportedError: the model has no projector that maps each token by itself, or no chat template, or this
            template writes a conversation anew with every turn; or accelerate is set to shard models or to gather
            gradients over several steps.
    """

    def __init__(self, model: Any, processor: Any, suite: Suite, recipe: Recipe, folder: Path) -> None:
        most = max(recipe.budgets)
        wrap(model, "m3", keep=most, scales=recipe.budgets).unwrap()  # what is impossible shows before the work begins
        questions = readable(suite)
        self.conversations = grouped(questions, recipe.turns, recipe.seed)
        check_template(processor, self.conversations)
        self.processor, self.recipe, self.folder = processor, recipe, folder
        self.step, self.rows = 0, list[dict[str, Any]]()
        self.accelerator = Accelerator(cpu=not torch.cuda.is_available(), kwargs_handlers=[_UNUSED])
        _require_plain(self.accelerator)
        self.conditions: dict[str, Any] = {
            **json.loads(json.dumps(asdict(recipe))),
            "processes": self.accelerator.num_processes,
            "questions": fingerprint(questions),
            "model": weights_fingerprint(model),
        }
        self.dtype, self.tower = model.dtype, model.model.vision_tower
        self.model = _prepared(model.float(), recipe)
        self.handle = wrap(self.model, "m3", keep=most, scales=recipe.budgets)
        self.trained = {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}
        self.optimizer = torch.optim.AdamW(self._groups(), weight_decay=0.0)
        self._resume()
        self.runner, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)

    @property
    def leads(self) -> bool:
        """Whether this process writes and reports."""
        return bool(self.accelerator.is_main_process)

    def run(self, report: Report = lambda row: None, save_every: int = 200, workers: int = 0) -> None:
        """Train to the end and write the model, as safetensors, with its processor.

        Args:
            report: is given each line of the log.
            save_every: steps between checkpoints.
            workers: processes that read images ahead.

        Raises:
            InputError: an image cannot be read; the steps before it are kept, or if another process fails than the
                first, those before the last checkpoint.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self.runner.train()
        place = self.accelerator.process_index, self.accelerator.num_processes
        data = Steps(self.processor, self.conversations, self.recipe, *place)
        ahead = range(self.step, self.recipe.steps)
        try:
            for inputs in DataLoader(data, batch_size=None, sampler=ahead, num_workers=workers):
                for row in self._train(inputs.to(self.accelerator.device)):
                    self.rows.append(row)
                    report(row)
                if self.step % save_every == 0:
                    self._save()
        finally:
            self._save()
        self._export()
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()  # without, processes may abort at their exit

    def _train(self, inputs: Any) -> list[dict[str, Any]]:
        for group in self.optimizer.param_groups:
            group["lr"] = group["highest"] * self.recipe.rate(self.step)
        losses = dict[int, Tensor]()
        with _encoding_once(self.tower):
            for budget in self.recipe.drawn(self.step):
                with self.handle.set(keep=budget):
                    losses[budget] = self.runner(**inputs).loss
        self.accelerator.backward(torch.stack(list(losses.values())).mean())
        self.accelerator.clip_grad_norm_(self.trained.values(), _MAX_GRADIENT)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        means = {budget: self.accelerator.reduce(loss.detach(), "mean") for budget, loss in losses.items()}
        return [{"step": self.step, "budget": budget, "loss": round(float(mean), 5)} for budget, mean in means.items()]

    def _groups(self) -> list[dict[str, Any]]:
        groups: dict[float, list[nn.Parameter]] = {}
        for name, weight in self.trained.items():
            groups.setdefault(self.recipe.highest_rate(name), []).append(weight)
        return [{"params": weights, "highest": rate, "lr": rate} for rate, weights in groups.items()]

    def _save(self) -> None:
        if not self.leads:
            return
        state = {
            "conditions": json.dumps(self.conditions),
            "step": self.step,
            "rows": self.rows,
            "weights": {name: weight.detach().cpu() for name, weight in self.trained.items()},
            "optimizer": self.optimizer.state_dict(),
        }
        unfinished = self.folder / f"{CHECKPOINT}.new"
        torch.save(state, unfinished)
        unfinished.replace(self.folder / CHECKPOINT)
        (self.folder / LOG).write_text("".join(json.dumps(row) + "\n" for row in self.rows), encoding="utf-8")

    def _resume(self) -> None:
        path = self.folder / CHECKPOINT
        if not path.exists():
            return
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            conditions = json.loads(state["conditions"])
            weights, optimizer, step, rows = (state[name] for name in ("weights", "optimizer", "step", "rows"))
        except Exception as error:  # a torn file fails in as many ways as there are places to tear it
            raise InputError(f"checkpoint {path} cannot be read ({error}); delete it to start anew.") from error
        other = [
            f"{name} {conditions.get(name)} instead of {value}"
            for name, value in self.conditions.items()
            if conditions.get(name) != value
        ]
        if other:
            raise SpecError(f"{path} is of another run, with {', '.join(other)}.")
        with torch.no_grad():
            for name, weight in weights.items():
                self.trained[name].copy_(weight)
        self.optimizer.load_state_dict(optimizer)
        self.step, self.rows = step, rows

    def _export(self) -> None:
        self.handle.unwrap()
        if not self.leads:
            return
        model = self.model.merge_and_unload() if self.recipe.llm == "lora" else self.model
        setattr(model.config, SCALES, sorted(self.recipe.budgets))
        model.eval().to(self.dtype).save_pretrained(self.folder, max_shard_size=_ONE_FILE)
        rename_as_on_the_hub(self.folder / "model.safetensors")
        self.processor.save_pretrained(self.folder)


@functools.lru_cache(maxsize=2)  # a step may see the end of an epoch and the beginning of another
def _shuffled(count: int, seed: str) -> tuple[int, ...]:
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return tuple(order)


def _require_plain(accelerator: Accelerator) -> None:
    kind, steps = accelerator.distributed_type, accelerator.gradient_accumulation_steps
    if kind not in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        raise UnsupportedError(f"training shards no models, but accelerate is set to {kind.value}; choose MULTI_GPU.")
    if steps != 1:
        raise UnsupportedError(f"accelerate is set to gather gradients over {steps} steps; choose a larger batch.")


@contextmanager
def _encoding_once(tower: nn.Module) -> Iterator[None]:
    """Within, the tower encodes the images of its first call and answers others with what came of it."""
    forward, encoded = tower.forward, list[Any]()

    def first_or_same(*args: Any, **options: Any) -> Any:
        if not encoded:
            encoded.append(forward(*args, **options))
        return encoded[0]

    tower.forward = first_or_same
    try:
        yield
    finally:
        tower.forward = forward


def _prepared(model: Any, recipe: Recipe) -> Any:
    """The model with gradients for what is to be trained alone, in a PEFT model if that is by LoRA."""
    model.requires_grad_(False)
    inner = model.model
    parts: list[nn.Module] = [inner.multi_modal_projector]
    if recipe.tower:
        parts.append(inner.vision_tower)
    if recipe.llm == "full":
        parts += [inner.language_model, model.lm_head]
    if recipe.llm == "lora":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=_LORA_RANK, lora_alpha=_LORA_ALPHA, target_modules=_LLM_LINEARS))
    for part in parts:
        part.requires_grad_(True)
    return model
