"""A recipe's [train] table in the words of transformers' Trainer."""

from pathlib import Path

from transformers import TrainingArguments

from adapterhub_local.recipe.derived import optimizer_on
from adapterhub_local.recipe.schema import Train

# our name -> the Trainer's
OPTIMIZERS = {
    "adamw": "adamw_torch_fused",
    "adamw_8bit": "adamw_bnb_8bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
    "paged_adamw_32bit": "paged_adamw_32bit",
}


def arguments_of(train: Train, steps: int, folder: Path, device: str) -> TrainingArguments:
    """The arguments of a run of `steps` steps on `device`, `cpu` or `cuda`, with its checkpoints in `folder`."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=train.batch_size,
        max_steps=steps,
        learning_rate=train.learning_rate,
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        optim=OPTIMIZERS[optimizer_on(train.optimizer, device)],
        seed=train.seed,
        data_seed=train.seed,
        use_cpu=device == "cpu",
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
    return arguments
