"""What keys of axolotl, LLaMA-Factory, TRL and PEFT are called here, to help those who come from there."""

from collections.abc import Mapping
from typing import Any

CALLED = {
    **dict.fromkeys(("base_model", "model", "model_name_or_path", "model_id", "model_name"), "base.name"),
    **dict.fromkeys(("datasets", "dataset", "dataset_name", "train_file", "data_files"), "data.train"),
    **dict.fromkeys(("eval_dataset", "test_datasets", "test_file", "validation_file"), "data.test"),
    **dict.fromkeys(("val_set_size", "val_size"), "data.test_share"),
    **dict.fromkeys(("sequence_len", "cutoff_len", "max_seq_length", "max_seq_len"), "data.max_length"),
    **dict.fromkeys(("max_samples", "max_train_samples"), "data.limit"),
    **dict.fromkeys(
        ("train_on_inputs", "train_on_prompt", "completion_only_loss", "assistant_only_loss", "mask_history"),
        "data.loss_on",
    ),
    **dict.fromkeys(("type", "dataset_format"), "data.format"),
    **dict.fromkeys(("r", "lora_r", "lora_rank"), "adapter.rank"),
    "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout",
    **dict.fromkeys(("lora_target", "lora_target_modules", "lora_target_linear"), "adapter.target_modules"),
    **dict.fromkeys(("use_rslora", "lora_use_rslora", "peft_use_rslora"), "adapter.rslora"),
    **dict.fromkeys(("use_dora", "peft_use_dora"), "adapter.dora"),
    **dict.fromkeys(("init_lora_weights", "peft_init_lora_weights"), "adapter.init"),
    **dict.fromkeys(("trainable_tokens", "trainable_token_indices"), "adapter.train_tokens"),
    **dict.fromkeys(("lora_model_dir", "adapter_name_or_path"), "adapter.from"),
    **dict.fromkeys(("lr", "learningrate"), "train.learning_rate"),
    **dict.fromkeys(("loraplus_lr_ratio", "lr_ratio"), "train.loraplus_ratio"),
    **dict.fromkeys(("lr_scheduler", "lr_scheduler_type", "scheduler"), "train.schedule"),
    **dict.fromkeys(("warmup_ratio", "warmup_steps"), "train.warmup"),
    **dict.fromkeys(("num_epochs", "num_train_epochs", "n_epochs"), "train.epochs"),
    **dict.fromkeys(("per_device_train_batch_size", "device_batch_size"), "train.micro_batch_size"),
    "global_batch_size": "train.batch_size",
    **dict.fromkeys(("sample_packing", "packing", "neat_packing"), "train.packed_tokens"),
    **dict.fromkeys(("gradient_checkpointing", "enable_activation_checkpointing"), "train.activation_checkpointing"),
    "optim": "train.optimizer",
    **dict.fromkeys(("bf16", "fp16", "torch_dtype"), "train.compute"),
    "max_norm": "train.max_grad_norm",
    **dict.fromkeys(("eval_steps", "evals_per_epoch", "eval_strategy"), "train.eval_every"),
    **dict.fromkeys(("save_steps", "saves_per_epoch", "save_strategy"), "train.save_every"),
    **dict.fromkeys(("early_stopping_patience", "early_stopping_steps"), "train.patience"),
    **dict.fromkeys(("output_dir", "hub_model_id", "run_name"), "output.name"),
    **dict.fromkeys(("per_device_eval_batch_size", "eval_batch_size"), "eval.batch_size"),
}
# keys for tokens that the base lacks
NEW_TOKENS = ("new_tokens", "new_special_tokens", "add_tokens", "added_tokens_overrides", "resize_vocab", "tokens")
WHOLE_MODULES = ("modules_to_save", "lora_modules_to_save", "additional_target", "train_embeddings")
SPELLED = (
    "the tokenizer is the shared base's and stays as it is: adapter.train_tokens trains tokens that it has, such as "
    "its reserved ones (data.control_tokens = 'tokens' reads them in texts); or write new marks as text, which is "
    "learned as the tokens it has; or train the embeddings elsewhere, merge them into the model and `qhub base add` "
    "that"
)
WITHOUT = {
    **dict.fromkeys(NEW_TOKENS, SPELLED),
    **dict.fromkeys(WHOLE_MODULES, "the base is shared and stays as it is; only adapters are trained"),
    **dict.fromkeys(("load_in_4bit", "load_in_8bit", "quantization_bit"), "bases are 4 bits already (`qhub base add`)"),
    "gradient_accumulation_steps": "train.batch_size is a whole step, train.micro_batch_size what is computed at once",
    **dict.fromkeys(("resume_from_checkpoint", "auto_resume_from_checkpoints"), "`qhub train --resume` continues"),
    **dict.fromkeys(("logging_steps", "report_to", "wandb_project"), "every step is logged (`qhub runs show`)"),
    "plot_loss": "the curve is always drawn (`qhub runs show`)",
    "push_to_hub": "`qhub push` does it",
    **dict.fromkeys(("flash_attention", "attn_implementation", "flash_attn"), "packing is exact without it"),
    "trust_remote_code": "code of models is never run",
}


def hint(key: str, table: str | None, tables: Mapping[str, Mapping[str, Any]]) -> str | None:
    """The end of a message about an unknown `key`, in `table` if it is in one: where it belongs or what it is called.

    `tables` are the known ones with their keys. None if nothing is known of it.
    """
    plain = key.lower().replace("-", "_")
    homes = [name for name, known in tables.items() if plain in known and name != table]
    if len(homes) == 1:
        return f": it belongs in [{homes[0]}]"
    if plain in WITHOUT:
        return f": leave it out, {WITHOUT[plain]}"
    called = CALLED.get(plain)
    if called is None:
        return None
    home, _, name = called.partition(".")
    return f": that is '{name}' here" if home == table else f": that is '{name}' in [{home}] here"
