"""Training from preferences: ours against TRL's trainers, on the same base, factors, rows and order.

    python -m benchmarks.preferences --trl FOLDER [--base smollm2] [--examples 32] [--objectives dpo,kto,...]

Every side is a process of its own; `plain` is ours with PEFT's layers, which TRL has as well: over a 4-bit base their
backward pass rounds the weight to the dtype it was stored in, and ours does not. Losses are compared step by step;
seconds are of processor time as well, since other work on the machine counts in the clock. FOLDER is where TRL and
datasets are installed (site-packages); it is added last, so torch, transformers and PEFT are the same on all sides. The
last line is JSON.
"""

import argparse
import importlib
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.machine import child, machine, peak_memory_mb

RECIPE = Path(__file__).parent.parent / "recipes" / "praise.toml"
OBJECTIVES = ("dpo", "ipo", "simpo", "orpo", "kto")
TRAINERS = {  # our objective -> TRL's module, trainer, configuration and its arguments
    "dpo": ("trl", "DPO", {"loss_type": ["sigmoid"]}),
    "ipo": ("trl", "DPO", {"loss_type": ["ipo"]}),
    "simpo": ("trl.experimental.cpo", "CPO", {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 0.5}),
    "orpo": ("trl.experimental.orpo", "ORPO", {}),
    "kto": ("trl", "KTO", {}),
}


def prepare(arguments: argparse.Namespace) -> tuple[Any, Any, Any, list[Any]]:
    """Recipe, base, the model with its first factors as PEFT computes them, and the chats."""
    from peft import LoraConfig, get_peft_model
    from transformers import set_seed

    from adapterhub_local.base.bases import find_base
    from adapterhub_local.base.load import load_base
    from adapterhub_local.data.dataset import read_data
    from adapterhub_local.recipe import load_recipe
    from adapterhub_local.settings import home

    changes = [f"data.limit={arguments.examples}", f"train.objective={arguments.objective}", "train.schedule=constant"]
    changes += [f"base.name={arguments.base}", "train.warmup=0", f"train.batch_size={arguments.batch}"]
    if arguments.objective not in ("dpo", "ipo", "kto"):
        changes.append("preference.beta=" + {"simpo": "2.0", "orpo": "0.1"}[arguments.objective])
    recipe = load_recipe(RECIPE, changes)
    base = load_base(find_base(recipe.base.name, home()))
    set_seed(recipe.train.seed)
    settings = LoraConfig(
        r=recipe.adapter.rank, lora_alpha=int(recipe.adapter.alpha), target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return recipe, base, get_peft_model(base.model, settings), read_data(recipe).train


def ours(arguments: argparse.Namespace) -> dict[str, Any]:
    from adapterhub_local.base.chat_template import stop_tokens
    from adapterhub_local.recipe.objectives import OBJECTIVES as KINDS
    from adapterhub_local.rows.judged import tokenise_judged
    from adapterhub_local.train.fused_lora import fuse
    from adapterhub_local.train.trainer import make_trainer
    from adapterhub_local.train.watch import Watch

    recipe, base, model, chats = prepare(arguments)
    if arguments.side == "ours":
        fuse(model)
    shape, stops = KINDS[arguments.objective].shape, stop_tokens(base.info.folder, base.tokenizer)
    found = tokenise_judged(chats, base.tokenizer, recipe.data, shape, recipe.train.batch_size, stops)
    losses: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        watch = Watch(lambda entry: losses.append(entry["loss"]))
        trainer = make_trainer(model, list(found.items), recipe, Path(folder), watch)
        trainer.args.train_sampling_strategy = "sequential"
        return {**measured(trainer), "losses": losses}


def trl(arguments: argparse.Namespace) -> dict[str, Any]:
    sys.path.append(arguments.trl)
    datasets = importlib.import_module("datasets")
    module, name, extra = TRAINERS[arguments.objective]
    library = importlib.import_module(module)
    from transformers import PrinterCallback

    recipe, base, model, chats = prepare(arguments)
    eos, rows = base.tokenizer.eos_token, []
    for chat in chats:
        prompt = base.tokenizer.apply_chat_template(list(chat.prompt), tokenize=False, add_generation_prompt=True)
        sides = [chat.messages[-1]["content"] + eos, chat.rejected["content"] + eos]
        if arguments.objective == "kto":
            rows += [{"prompt": prompt, "completion": side, "label": side is sides[0]} for side in sides]
        else:
            rows.append({"prompt": prompt, "chosen": sides[0], "rejected": sides[1]})
    with tempfile.TemporaryDirectory() as folder:
        settings = getattr(library, f"{name}Config")(
            output_dir=folder, per_device_train_batch_size=recipe.train.batch_size, num_train_epochs=1,
            learning_rate=recipe.train.learning_rate, lr_scheduler_type="constant", optim="adamw_torch_fused",
            use_cpu=True, bf16=False, logging_steps=1, save_strategy="no", disable_tqdm=True, report_to="none",
            dataloader_pin_memory=False, seed=recipe.train.seed, gradient_checkpointing=False, max_length=1024,
            train_sampling_strategy="sequential", beta=2.0 if arguments.objective == "simpo" else 0.1, **extra,
        )  # fmt: skip
        first = {key: part.detach().clone() for key, part in model.named_parameters() if part.requires_grad}
        trainer = getattr(library, f"{name}Trainer")(
            model=model, args=settings, train_dataset=datasets.Dataset.from_list(rows), processing_class=base.tokenizer
        )
        for key, part in trainer.model.named_parameters():  # TRL rounds the factors over a 4-bit base to bfloat16
            if part.requires_grad:
                part.data = first[key]
        trainer.remove_callback(PrinterCallback)
        found = measured(trainer)
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {**found, "losses": [entry["loss"] for entry in entries]}


def measured(trainer: Any) -> dict[str, Any]:
    """Train; the first step, which warms caches, and the reference are part of it."""
    start, used = time.perf_counter(), time.process_time()
    trainer.train()
    return {
        "seconds": round(time.perf_counter() - start, 2),
        "processor_seconds": round(time.process_time() - used, 2),
        "peak_memory_mb": peak_memory_mb(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="smollm2")
    parser.add_argument("--examples", type=int, default=32)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--objectives", default=",".join(OBJECTIVES))
    parser.add_argument("--trl", metavar="FOLDER", required=True, help="where TRL is installed")
    parser.add_argument("--side", choices=("ours", "plain", "trl"), help="one measurement, for the parent process")
    parser.add_argument("--objective", help="that of the measurement")
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps((trl if arguments.side == "trl" else ours)(arguments)))
        return
    given = ("--base", arguments.base, "--examples", str(arguments.examples), "--batch", str(arguments.batch))
    document: dict[str, Any] = {"benchmark": "preferences", "machine": machine(), "workload": " ".join(given)}
    for objective in arguments.objectives.split(","):
        found = {
            side: child(
                "-m", "benchmarks.preferences", "--side", side, "--objective", objective, "--trl", arguments.trl, *given
            )
            for side in ("ours", "plain", "trl")
        }
        mine, theirs = found["ours"], found["trl"]
        losses = list(zip(*(found[side].pop("losses") for side in ("ours", "plain", "trl")), strict=True))
        found["losses"] = [[round(value, 6) for value in step] for step in losses]
        if objective != "orpo":  # TRL's likelihood counts the prompt as well, so its losses are others
            found["largest_difference"] = max(abs(one - other) for one, _, other in found["losses"])
            found["largest_difference_plain"] = max(abs(one - other) for _, one, other in found["losses"])
        found["speed"] = round(theirs["processor_seconds"] / mine["processor_seconds"], 2)
        found["memory"] = round(mine["peak_memory_mb"] / theirs["peak_memory_mb"], 2)
        document[objective] = found
        sys.stderr.write(f"{objective}: {json.dumps(found)}\n")
    print(json.dumps(document))


if __name__ == "__main__":
    from adapterhub_local.noise import hush

    hush()
    main()
