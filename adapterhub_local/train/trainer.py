"""The optimisation: transformers' Trainer with our batches, our loss, and a stop that keeps what was done."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from adapterhub_local.errors import QhubError
from adapterhub_local.recipe.schema import Train
from adapterhub_local.train.examples import Example
from adapterhub_local.train.packing import Packed, forward, is_exact, micro_batch_size, pack

# our name -> the Trainer's
OPTIMIZERS = {
    "adamw": "adamw_torch_fused",
    "adamw_8bit": "adamw_bnb_8bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
    "paged_adamw_32bit": "paged_adamw_32bit",
}
PACKED_TOKENS = 1024  # of one packed row: longer ones cost more attention than they save elsewhere
Report = Callable[[dict[str, float]], None]


class AdapterTrainer(Trainer):
    """Trains the adapter factors of a PEFT model; the loss is the mean over all answer tokens of a step."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        # the sum over this part of the batch by the labels of the whole step (transformers#34191)
        logits, targets, _ = forward(model, Packed(**inputs))
        loss = cross_entropy(logits.float(), targets, reduction="sum") / num_items_in_batch
        return (loss, logits) if return_outputs else loss


class Watch(TrainerCallback):
    """Reports each step, stops at a loss that is no number, and stops cleanly when asked to."""

    def __init__(self, report: Report) -> None:
        self.report = report
        self.stop_asked = False

    def on_log(self, args, state, control, logs=None, **_):
        if not logs or "loss" not in logs:
            return
        if not math.isfinite(logs["loss"]):
            raise QhubError(
                f"the loss is {logs['loss']} at step {state.global_step}: lower train.learning_rate or look at the data"
            )
        self.report({"step": state.global_step, "epoch": state.epoch, **logs})

    def on_step_end(self, args, state, control, **_):
        if self.stop_asked and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True


def choose_optimizer(wanted: str, device: str) -> str:
    """The optimizer that `auto` means on this device: a step of 8-bit AdamW takes ten times as long on a CPU."""
    if wanted != "auto":
        return wanted
    return "adamw" if device == "cpu" else "paged_adamw_8bit"


def steps_of(num_examples: int, train: Train) -> int:
    """How many optimizer steps a run takes."""
    return max(1, round(math.ceil(num_examples / train.batch_size) * train.epochs))


def make_trainer(
    model: Any, examples: Sequence[Example], train: Train, folder: Path, report: Report
) -> tuple[AdapterTrainer, Watch]:
    """A trainer of the recipe's [train] table, and the watch by which it can be stopped.

    Model: PEFT over a frozen base. Checkpoints go into `folder`, only when the run is stopped.
    """
    size = train.micro_batch_size or micro_batch_size(examples, train.batch_size, PACKED_TOKENS)
    has_dropout = any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in model.modules())
    if size > 1 and (has_dropout or not is_exact(model.eval(), examples)):
        size = 1  # one dropout mask for a shared prefix would not be what was asked for
    steps = steps_of(len(examples), train)
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=size,
        gradient_accumulation_steps=train.batch_size // size,
        max_steps=steps,
        learning_rate=train.learning_rate,
        lr_scheduler_type=train.schedule if train.schedule != "constant" else "constant_with_warmup",
        warmup_steps=math.ceil(train.warmup * steps),
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        optim=OPTIMIZERS[choose_optimizer(train.optimizer, model.device.type)],
        seed=train.seed,
        data_seed=train.seed,
        use_cpu=model.device.type == "cpu",
        logging_steps=1,
        logging_nan_inf_filter=False,  # a loss that is no number must be seen
        save_strategy="no",
        save_total_limit=1,
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=model.device.type != "cpu",
        disable_tqdm=True,
        report_to="none",
    )
    watch = Watch(report)
    trainer = AdapterTrainer(
        model=model, args=arguments, train_dataset=list(examples), data_collator=_collate, callbacks=[watch]
    )
    trainer.model_accepts_loss_kwargs = True
    trainer.remove_callback(PrinterCallback)
    return trainer, watch


def _collate(examples: list[Example]) -> dict[str, Any]:
    return vars(pack(examples))
