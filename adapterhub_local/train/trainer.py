"""The optimisation: transformers' Trainer with our rows, an objective, and the step shared by several processes."""

import math
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import BatchSamplerShard
from safetensors import SafetensorError
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, PrinterCallback, Trainer

from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.base.model import AdaptedModel, as_module
from adapterhub_local.errors import QhubError
from adapterhub_local.recipe import Recipe
from adapterhub_local.recipe.derived import learning_rate, num_steps
from adapterhub_local.rows.example import Item
from adapterhub_local.train.adapter import random_devices
from adapterhub_local.train.arguments import arguments_of
from adapterhub_local.train.checkpointing import enable_checkpointing
from adapterhub_local.train.fused_lora import converted, fused_layers
from adapterhub_local.train.objectives import make_objective
from adapterhub_local.train.objectives.objective import Objective
from adapterhub_local.train.shards import shards_of
from adapterhub_local.train.watch import Watch

ROWS = ".trainable_tokens_delta."  # of embeddings, in the names that PEFT gives their parameters


class AdapterTrainer(Trainer):
    """Trains the adapter factors of a PEFT model to lower an objective.

    A batch is the items of one optimizer step, cut into rows; each row is a forward and a backward pass.
    With several processes each has the whole batch and takes its share of the rows, so that neither order
    nor denominator depends on their number; the gradients are summed once a step. Where the base is divided between
    them, one with a row less computes a spare one, which counts for nothing, so that all make as many passes.
    """

    def __init__(
        self,
        *,
        model: AdaptedModel,
        objective: Objective,
        watch: Watch,
        rate: Callable[[int], float],
        loraplus_ratio: float | None = None,
        **given: Any,
    ) -> None:
        super().__init__(model=as_module(model), callbacks=[watch], **given)
        self.adapted: AdaptedModel = model
        self.objective: Objective = objective
        self.watch: Watch = watch
        self.rate, self.loraplus_ratio = rate, loraplus_ratio
        self.step_metrics: dict[str, float] = {}  # the objective's metrics of the last step
        # known once: a walk over all of a model's modules takes a hundredth of a second, for which a GPU waits
        self.fused = fused_layers(model)
        self.is_divided = shards_of(model) is not None
        self.factors: list[Any] = [each for each in model.parameters() if each.requires_grad]
        model.zero_grad = partial(drop_gradients, self.factors)
        self.model_accepts_loss_kwargs = True
        self.remove_callback(PrinterCallback)

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        if not model.training:
            model.train()
        rows: list[Any] = inputs["rows"]
        own = rows[self.args.process_index :: self.args.world_size]
        spare = rows[:1] if self.is_divided and len(own) * self.args.world_size < len(rows) else []
        totals = torch.zeros(1 + len(self.objective.metrics), device=self.args.device)
        with converted(self.fused, self.adapted.dtype):
            step = self.objective.begin(rows, own, partial(self._sum_beside, spare))
            for row in own:
                loss, step_metrics = self.objective.loss(row, step)
                self.accelerator.backward(loss)
                totals[0] += loss.detach()
                totals[1:] += step_metrics.to(totals.device)
            for row in spare:
                with torch.random.fork_rng(devices=random_devices(self.adapted)):
                    self.accelerator.backward(self.objective.loss(row, step)[0] * 0)
        for factor in self.factors:
            if factor.grad is None:  # a process that had no row, or an expert that no token was routed to
                factor.grad = torch.zeros_like(factor)
        if self.args.world_size > 1:
            totals = self._sum_over_processes(totals)
        self.step_metrics = dict(zip(self.objective.metrics, totals[1:].tolist(), strict=True))
        if not math.isfinite(totals[0].item()):
            raise NotFinite(f"the loss is {totals[0].item()} at step {self.state.global_step + 1}")
        return totals[0]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log({**logs, **self.step_metrics} if "loss" in logs else logs, start_time)

    def _sum(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.args.world_size == 1:
            return tensor
        summed: torch.Tensor = self.accelerator.reduce(tensor, reduction="sum")
        return summed

    def _sum_beside(self, spare: list[Any], tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all processes, each of which has made the passes that come before it."""
        if spare:
            self.objective.begin(spare, spare, lambda alone: alone)
        return self._sum(tensor)

    def _sum_over_processes(self, totals: torch.Tensor) -> torch.Tensor:
        """Sum gradients, loss and metrics (1 + metrics,) over the processes, as one vector; returns the latter."""
        asked = torch.tensor([float(self.watch.stop_asked)], device=totals.device)  # all stop after the same step
        parts = [asked, totals.float().reshape(-1), *(factor.grad.float().reshape(-1) for factor in self.factors)]
        flat = self.accelerator.reduce(torch.cat(parts), reduction="sum")
        self.watch.stop_asked = bool(flat[0] > 0)
        summed_totals, *sums = flat[1:].split([totals.numel(), *(factor.numel() for factor in self.factors)])
        for factor, summed in zip(self.factors, sums, strict=True):
            factor.grad.copy_(summed.view_as(factor))
        together: torch.Tensor = summed_totals.clone()
        return together

    def _clip_grad_norm(self, model: torch.nn.Module) -> Any:
        norm = self.accelerator.clip_grad_norm_(self.factors, self.args.max_grad_norm)
        value = float(norm)
        if not math.isfinite(value):  # before the optimizer would make every factor so
            raise NotFinite(f"the gradient norm is {value} at step {self.state.global_step + 1}")
        return norm

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        if self.loraplus_ratio is None or self.optimizer is not None:
            return super().create_optimizer(model)
        from peft.optimizers import create_loraplus_optimizer

        theirs: Any = self.adapted  # asked for as PEFT's own class
        kind, arguments = self.get_optimizer_cls_and_kwargs(self.args)
        self.optimizer = create_loraplus_optimizer(
            theirs,
            kind,
            loraplus_lr_ratio=self.loraplus_ratio,
            loraplus_weight_decay=self.args.weight_decay,
            **arguments,
        )
        self._spare_rows(self.optimizer)
        return self.optimizer

    def _spare_rows(self, optimizer: torch.optim.Optimizer) -> None:
        """Take rows of embeddings out of weight decay."""
        mine = {id(each) for name, each in self.adapted.named_parameters() if ROWS in name}
        for group in list(optimizer.param_groups):
            rows = [each for each in group["params"] if id(each) in mine]
            if rows and group["weight_decay"]:
                group["params"] = [each for each in group["params"] if id(each) not in mine]
                optimizer.add_param_group({**group, "params": rows, "weight_decay": 0.0})

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        """What weight decay is for: a delta, which decays to none; not rows of embeddings, which would to zero."""
        return [name for name in super().get_decay_parameter_names(model) if ROWS not in name]

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The recipe's schedule, in which every step of the run has a rate above zero."""
        if self.lr_scheduler is None:
            optimizer = optimizer or self.optimizer
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self.rate)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:  # a full disk is a RuntimeError to torch
            folder = Path(str(self.args.output_dir))
            shutil.rmtree(folder / f"checkpoint-{self.state.global_step}", ignore_errors=True)
            reason = getattr(error, "strerror", None) or "it could not be written whole"
            raise NotSaved(
                f"the state of step {self.state.global_step} cannot be saved in {folder}: {reason}. Free some space"
            ) from error

    def get_train_dataloader(self) -> DataLoader[Any]:
        loader = super().get_train_dataloader()
        if isinstance(loader.batch_sampler, BatchSamplerShard):  # every process has the whole batch
            loader.batch_sampler.num_processes, loader.batch_sampler.process_index = 1, 0
            loader.batch_sampler.even_batches = False  # nor is a last small batch filled up
        return loader

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0  # the Trainer would count padded batches


def drop_gradients(factors: Sequence[torch.nn.Parameter], set_to_none: bool = True) -> None:
    """What `zero_grad` of a model does whose trained parameters these are."""
    for factor in factors:
        factor.grad = None


class NotFinite(QhubError):
    """The loss or the gradient is not a number; the factors are still those of the step before."""


class NotSaved(QhubError):
    """A checkpoint could not be written; those before it are whole."""


def make_trainer(
    model: AdaptedModel,
    items: Sequence[Item],
    recipe: Recipe,
    folder: Path,
    watch: Watch,
    tokenizer: PreTrainedTokenizerBase | None = None,
    info: BaseInfo | None = None,
) -> AdapterTrainer:
    """A trainer of a recipe's objective and [train] table, which reports to the watch and is stopped by it.

    Model: PEFT over a frozen base, of which `info` is known. Checkpoints go into `folder`, when the watch says so.
    """
    train = recipe.train
    steps = num_steps(len(items), train)
    arguments = arguments_of(train, steps, folder, model.device.type)
    objective = make_objective(model, items, recipe, arguments.world_size, tokenizer, info)
    trainer = AdapterTrainer(
        model=model,
        args=arguments,
        train_dataset=list(items),
        data_collator=lambda batch: {"rows": objective.rows(batch)},
        objective=objective,
        watch=watch,
        rate=lambda done: learning_rate(done + 1, steps, train),
        loraplus_ratio=train.loraplus_ratio,
    )
    enable_checkpointing(model, train.activation_checkpointing)
    if trainer.args.world_size > 1:
        # the gradients are summed in `training_step`: DDP would sum them after every row
        model._is_accelerate_prepared = True
    return trainer
