"""The optimisation: transformers' Trainer with our rows, our loss, and the step shared by several processes."""

import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import BatchSamplerShard
from safetensors import SafetensorError
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainingArguments

from adapterhub_local.errors import QhubError
from adapterhub_local.recipe.derived import examples_a_row, num_steps, optimizer_on
from adapterhub_local.recipe.schema import Train
from adapterhub_local.rows.examples import Example
from adapterhub_local.rows.packing import Packed, is_exact, pack, pack_rows
from adapterhub_local.train.checkpointing import enable_checkpointing
from adapterhub_local.train.loss import answer_loss, output_head
from adapterhub_local.train.watch import Report, Watch

# our name -> the Trainer's
OPTIMIZERS = {
    "adamw": "adamw_torch_fused",
    "adamw_8bit": "adamw_bnb_8bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
    "paged_adamw_32bit": "paged_adamw_32bit",
}


class AdapterTrainer(Trainer):
    """Trains the adapter factors of a PEFT model; the loss is the mean over all answer tokens of a step.

    A batch is the examples of one optimizer step, cut into rows; each row is a forward and a backward pass.
    With several processes each has the whole batch and takes its share of the rows, so that neither order
    nor denominator depends on their number; the gradients are summed once a step.
    """

    head: Callable[[torch.Tensor], torch.Tensor] | None = None
    loraplus_ratio: float | None = None
    watch: Watch

    def training_step(
        self, model: Any, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        model.train()
        rows: list[Packed] = inputs["rows"]
        # the sum over each row by the labels of the whole step (transformers#34191)
        num_labels = sum(row.num_labels for row in rows)
        total = torch.zeros((), device=self.args.device)
        for row in rows[self.args.process_index :: self.args.world_size]:
            loss = answer_loss(model, row, self.head) / num_labels
            self.accelerator.backward(loss)
            total += loss.detach()
        if self.args.world_size > 1:
            total = self._sum_over_processes(model, total)
        if not math.isfinite(total.item()):
            raise NotFinite(f"the loss is {total.item()} at step {self.state.global_step + 1}")
        return total

    def _sum_over_processes(self, model: Any, loss: torch.Tensor) -> torch.Tensor:
        """Sum gradients and loss over the processes, as one vector. Returns the loss of the whole step."""
        factors = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for factor in factors:
            if factor.grad is None:  # a process that had no row
                factor.grad = torch.zeros_like(factor)
        asked = torch.tensor([float(self.watch.stop_asked)], device=loss.device)  # all stop after the same step
        parts = [loss.float().reshape(1), asked, *(factor.grad.float().reshape(-1) for factor in factors)]
        flat = self.accelerator.reduce(torch.cat(parts), reduction="sum")
        self.watch.stop_asked = bool(flat[1] > 0)
        sums = flat[2:].split([factor.numel() for factor in factors])
        for factor, summed in zip(factors, sums, strict=True):
            factor.grad.copy_(summed.view_as(factor))
        total: torch.Tensor = flat[0].clone()
        return total

    def _clip_grad_norm(self, model: Any) -> Any:
        norm = super()._clip_grad_norm(model)  # type: ignore[no-untyped-call]
        value = float(norm)
        if not math.isfinite(value):  # before the optimizer would make every factor so
            raise NotFinite(f"the gradient norm is {value} at step {self.state.global_step + 1}")
        return norm

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.loraplus_ratio is None or self.optimizer is not None:
            return super().create_optimizer(model)
        from peft.optimizers import create_loraplus_optimizer

        factors: Any = self.model
        kind, arguments = self.get_optimizer_cls_and_kwargs(self.args, factors)
        self.optimizer = create_loraplus_optimizer(
            factors,
            kind,
            loraplus_lr_ratio=self.loraplus_ratio,
            loraplus_weight_decay=self.args.weight_decay,
            **arguments,
        )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The Trainer's schedule one step further on: the first step and the last one learn, too."""
        scheduler: Any = super().create_scheduler(num_training_steps + 1, optimizer)

        def later(rate: Callable[[int], float]) -> Callable[[int], float]:
            return lambda step: rate(step + 1)

        scheduler.lr_lambdas = [later(rate) for rate in scheduler.lr_lambdas]
        for group, first, rate in zip(
            scheduler.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True
        ):
            group["lr"] = first * rate(0)
        scheduler._last_lr = [group["lr"] for group in scheduler.optimizer.param_groups]
        return scheduler

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:  # a full disk is a RuntimeError to torch
            folder = Path(str(self.args.output_dir))
            shutil.rmtree(folder / f"checkpoint-{self.state.global_step}", ignore_errors=True)
            reason = getattr(error, "strerror", None) or "it could not be written whole"
            raise NotSaved(
                f"the state of step {self.state.global_step} cannot be saved in {folder}: {reason}. Free some space"
            ) from error

    def get_train_dataloader(self) -> DataLoader[Packed]:
        loader = super().get_train_dataloader()
        if isinstance(loader.batch_sampler, BatchSamplerShard):  # every process has the whole batch
            loader.batch_sampler.num_processes, loader.batch_sampler.process_index = 1, 0
            loader.batch_sampler.even_batches = False  # nor is a last small batch filled up
        return loader

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0  # the Trainer would count padded batches


class NotFinite(QhubError):
    """The loss or the gradient is not a number; the factors are still those of the step before."""


class NotSaved(QhubError):
    """A checkpoint could not be written; those before it are whole."""


def make_rows(
    model: Any, examples: Sequence[Example], train: Train, world_size: int = 1
) -> Callable[[Sequence[Example]], list[Packed]]:
    """How this model's batches are cut into rows: packed and with a shared prefix only where that is exact.

    One dropout mask for a shared prefix would not be what was asked for, so dropout shares nothing.
    """
    size = examples_a_row(train, world_size)
    share = not any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in model.modules())
    if size > 1 and not is_exact(model.eval(), examples, share=share):
        size = 1

    def rows(batch: Sequence[Example]) -> list[Packed]:
        return [pack(row, share=share) for row in pack_rows(batch, train.packed_tokens, size, share=share)]

    return rows


def make_trainer(
    model: Any, examples: Sequence[Example], train: Train, folder: Path, report: Report, watch: Watch | None = None
) -> tuple[AdapterTrainer, Watch]:
    """A trainer of the recipe's [train] table, and the watch by which it can be stopped.

    Model: PEFT over a frozen base. Checkpoints go into `folder`, when the watch says so.
    """
    steps = num_steps(len(examples), train)
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=train.batch_size,
        max_steps=steps,
        learning_rate=train.learning_rate,
        lr_scheduler_type=train.schedule if train.schedule != "constant" else "constant_with_warmup",
        warmup_steps=math.ceil(train.warmup * steps),
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        optim=OPTIMIZERS[optimizer_on(train.optimizer, model.device.type)],
        seed=train.seed,
        data_seed=train.seed,
        use_cpu=model.device.type == "cpu",
        logging_steps=1,
        logging_nan_inf_filter=False,  # a loss that is not a number must be seen
        save_strategy="no",
        save_total_limit=1,
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=False,  # rows are small, and made while the device computes
        disable_tqdm=True,
        report_to="none",
    )
    # one process, one GPU: with several in sight the Trainer would wrap the model in DataParallel, and multiply batches
    arguments._n_gpu = min(1, arguments.n_gpu)
    rows = make_rows(model, examples, train, arguments.world_size)
    watch = watch or Watch(report)
    trainer = AdapterTrainer(
        model=model,
        args=arguments,
        train_dataset=list(examples),
        data_collator=lambda batch: {"rows": rows(batch)},
        callbacks=[watch],
    )
    trainer.watch = watch
    trainer.head = output_head(model.eval(), examples[0])
    trainer.loraplus_ratio = train.loraplus_ratio
    trainer.model_accepts_loss_kwargs = True
    trainer.remove_callback(PrinterCallback)
    enable_checkpointing(model, train.activation_checkpointing)
    if trainer.args.world_size > 1:
        # the gradients are summed in `training_step`: DDP would sum them after every row
        model._is_accelerate_prepared = True
    return trainer, watch
