"""Training from preferences, and on calls of tools: ours against TRL's trainers, on the same base, factors and order.

    python -m benchmarks.preferences --trl FOLDER [--base smollm2] [--examples 32] [--objectives dpo,kto,sft,...]

Every side is a process of its own; `plain` is ours with PEFT's layers, which TRL has as well: over a 4-bit base their
backward pass rounds the weight to the dtype it was stored in, and ours does not. Losses are compared step by step;
seconds are of processor time as well, since other work on the machine counts in the clock. TRL's ORPO takes the
likelihood of prompt and answer; here it is given that of the paper, of the answer alone. `sft` is conversations with a
call, its result and an answer, as Qwen 2.5 writes them: tokens and masks are those of TRL's training template for it,
less the line breaks around an answer, which are not learned here. FOLDER is where TRL and
datasets are installed (site-packages); it is added last, so torch, transformers and PEFT are the same on all sides. The
last line is JSON.
"""

import argparse
import gzip
import importlib
import itertools
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.machine import child, machine, peak_memory_mb

RECIPES = Path(__file__).parent.parent / "recipes"
OBJECTIVES = ("dpo", "ipo", "simpo", "orpo", "kto", "sft")
TEMPLATES = "trl/chat_templates"
TRAINERS = {  # our objective -> TRL's module, trainer, configuration and its arguments
    "dpo": ("trl", "DPO", {"loss_type": ["sigmoid"]}),
    "ipo": ("trl", "DPO", {"loss_type": ["ipo"]}),
    "simpo": ("trl.experimental.cpo", "CPO", {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 0.5}),
    "orpo": ("trl.experimental.orpo", "ORPO", {}),
    "kto": ("trl", "KTO", {}),
    "sft": ("trl", "SFT", {}),
}


def prepare(arguments: argparse.Namespace, folder: Path) -> tuple[Any, Any, Any, Any]:
    """Recipe, base, the model with its first factors as PEFT computes them, and the data set."""
    from peft import LoraConfig, get_peft_model
    from transformers import set_seed

    from adapterhub_local.base.bases import find_base
    from adapterhub_local.base.load import load_base
    from adapterhub_local.data.dataset import read_data
    from adapterhub_local.recipe import load_recipe
    from adapterhub_local.settings import home

    changes = [f"data.limit={arguments.examples}", f"train.objective={arguments.objective}", "train.schedule=constant"]
    changes += [f"base.name={arguments.base}", "train.warmup=0", f"train.batch_size={arguments.batch}"]
    if arguments.objective == "sft":
        write_calls(folder / "calls.jsonl", arguments.examples)
        template = Path(arguments.trl).absolute() / TEMPLATES / "qwen2_5.jinja"
        changes += [
            "train.epochs=1",
            f"data.train={folder}/calls.jsonl",
            f"data.chat_template={template}",
            "data.max_length=1024",
        ]
    if arguments.objective in ("simpo", "orpo"):
        changes.append("preference.beta=" + {"simpo": "2.0", "orpo": "0.1"}[arguments.objective])
    recipe = load_recipe(RECIPES / ("tools.toml" if arguments.objective == "sft" else "praise.toml"), changes)
    base = load_base(find_base(recipe.base.name, home()))
    set_seed(recipe.train.seed)
    settings = LoraConfig(
        r=recipe.adapter.rank, lora_alpha=int(recipe.adapter.alpha), target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return recipe, base, get_peft_model(base.model, settings), read_data(recipe)


def write_calls(path: Path, count: int) -> None:
    """Conversations of the tools' recipe, each gone on with the call's result and an answer."""
    with gzip.open(RECIPES / "data" / "tools.train.jsonl.gz", "rt") as file, open(path, "w") as out:
        calling = (row for row in map(json.loads, file) if row["messages"][-1].get("tool_calls"))  # some are small talk
        for number, row in enumerate(itertools.islice(calling, count)):
            call = row["messages"][-1]["tool_calls"][0]
            row["messages"] += [
                {"role": "tool", "tool_call_id": call["id"], "content": json.dumps({"ok": True, "number": number})},
                {"role": "assistant", "content": f"Done, number {number}."},
            ]
            out.write(json.dumps(row) + "\n")


def ours(arguments: argparse.Namespace) -> dict[str, Any]:
    from adapterhub_local.base.chat_template import stop_tokens
    from adapterhub_local.recipe.objectives import OBJECTIVES as KINDS
    from adapterhub_local.rows.judged import tokenise_items
    from adapterhub_local.train.fused_lora import fuse
    from adapterhub_local.train.trainer import make_trainer
    from adapterhub_local.train.watch import Watch

    losses: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        recipe, base, model, dataset = prepare(arguments, Path(folder))
        if arguments.side == "ours":
            fuse(model)
        shape, stops = KINDS[arguments.objective].shape, stop_tokens(base.info.folder, base.tokenizer)
        found, _ = tokenise_items(dataset, base.tokenizer, recipe.data, shape, recipe.train.batch_size, stops)
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

    with tempfile.TemporaryDirectory() as folder:
        recipe, base, model, dataset = prepare(arguments, Path(folder))
    eos, rows = base.tokenizer.eos_token, []
    for chat in dataset.train:
        if arguments.objective == "sft":
            rows.append(masked(base.tokenizer, chat, Path(arguments.trl) / TEMPLATES / "qwen2_5_training.jinja"))
            continue
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
            train_sampling_strategy="sequential", **extra,
            **({} if name == "SFT" else {"beta": 2.0 if arguments.objective == "simpo" else 0.1}),
        )  # fmt: skip
        first = {key: part.detach().clone() for key, part in model.named_parameters() if part.requires_grad}
        kind = getattr(library, f"{name}Trainer")
        trainer = (of_answers(kind) if name == "ORPO" else kind)(
            model=model, args=settings, train_dataset=datasets.Dataset.from_list(rows), processing_class=base.tokenizer
        )
        for key, part in trainer.model.named_parameters():  # TRL rounds the factors over a 4-bit base to bfloat16
            if part.requires_grad:
                part.data = first[key]
        trainer.remove_callback(PrinterCallback)
        found = measured(trainer)
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {**found, "losses": [entry["loss"] for entry in entries]}


def masked(tokenizer: Any, chat: Any, template: Path) -> dict[str, list[int]]:
    """A conversation's tokens and those of them that TRL learns, less line breaks at an answer's beginning and end."""
    messages = [dict(message) for message in chat.messages]
    for message in messages:
        for call in message.get("tool_calls") or ():
            if isinstance(call["function"]["arguments"], str):
                call["function"] = {**call["function"], "arguments": json.loads(call["function"]["arguments"])}
    found = tokenizer.apply_chat_template(
        messages, tools=list(chat.tools), chat_template=template.read_text(), return_dict=True,
        return_assistant_tokens_mask=True,
    )  # fmt: skip
    ids, mask = list(found["input_ids"]), list(found["assistant_masks"])
    at = 0
    for learned, span in itertools.groupby(list(mask)):
        size = len(list(span))
        for edge in (at, at + size - 1):
            if learned and not tokenizer.decode([ids[edge]]).strip():
                mask[edge] = 0
        at += size
    return {"input_ids": ids, "labels": [token if learned else -100 for token, learned in zip(ids, mask, strict=True)]}


def of_answers(kind: Any) -> Any:
    """TRL's ORPO trainer with the likelihood of the chosen answers alone (arXiv 2403.07691, Eq. 6)."""
    from torch.nn.functional import cross_entropy, pad

    class OfAnswers(kind):  # type: ignore[misc]
        def concatenated_forward(self, model: Any, batch: Any) -> Any:
            chosen, rejected, logits, other_logits, _ = super().concatenated_forward(model, batch)
            labels = batch["chosen_labels"][:, 1:]
            labels = pad(labels, (0, logits.shape[1] - labels.shape[1]), value=-100)
            return chosen, rejected, logits, other_logits, cross_entropy(logits.flatten(0, 1), labels.flatten())

    return OfAnswers


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
