r"""Training speed, memory and result: ours beside transformers' Trainer and TRL's SFTTrainer, on the same NF4 base.

    python -m benchmarks.train [--examples 96] [--tests 100] [--rounds 2] [--trl FOLDER]

Same base, tokens and order of magnitude of work: rank 16 on all linear layers, batch 16, one epoch, one AdamW, float32
on the CPU. The baselines pad each batch and compute logits at every position, as their defaults do (TRL casts the
factors to bfloat16 as well); ours packs a batch behind what its examples share and computes logits where there are
labels. Each side is a process of its own, in turn, so that a noisy machine hits all; the median is reported, and the
held-out score of each, because speed that costs quality is none. TRL is not a dependency: --trl names a folder made by

    pip install --target FOLDER --no-deps trl datasets pandas pyarrow multiprocess dill xxhash aiohttp frozenlist \
      aiosignal multidict yarl attrs propcache aiohappyeyeballs python-dateutil pytz tzdata six
"""

import argparse
import importlib
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.machine import child, machine, peak_memory_mb

RECIPE = Path(__file__).parent.parent / "recipes" / "sentiment.toml"


def ours(arguments) -> dict[str, float]:
    from adapterhub_local.train.trainer import make_trainer
    from adapterhub_local.train.watch import Watch

    model, data, recipe, tests = prepare(arguments)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(model, data, recipe, Path(folder), Watch(lambda entry: None))
        return run(trainer, data, tests)


def baseline(arguments) -> dict[str, float]:
    """transformers' Trainer over PEFT, with its padding collator."""
    from transformers import DataCollatorForSeq2Seq, PrinterCallback, Trainer, TrainingArguments

    model, data, recipe, tests = prepare(arguments)
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(output_dir=folder, **common(recipe))
        collator = DataCollatorForSeq2Seq(tokenizer(recipe), padding=True)
        trainer = Trainer(model=model, args=settings, train_dataset=rows(data), data_collator=collator)
        trainer.remove_callback(PrinterCallback)
        return run(trainer, data, tests)


def trl(arguments) -> dict[str, float]:
    """TRL's SFTTrainer, given the same tokens and labels; it makes the adapter itself."""
    sys.path.append(arguments.trl)  # last: torch, transformers and PEFT are the ones of all sides
    datasets, library = importlib.import_module("datasets"), importlib.import_module("trl")
    from peft import LoraConfig
    from transformers import PrinterCallback

    model, data, recipe, tests = prepare(arguments, adapter=False)
    adapter = recipe.adapter
    config = LoraConfig(
        r=adapter.rank, lora_alpha=adapter.alpha, target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.0
    )
    with tempfile.TemporaryDirectory() as folder:
        settings = library.SFTConfig(
            output_dir=folder, **common(recipe), max_length=recipe.data.max_length, bf16=False,
            gradient_checkpointing=False,
        )  # fmt: skip
        trainer = library.SFTTrainer(
            model=model,
            args=settings,
            train_dataset=datasets.Dataset.from_list([dict(row) for row in rows(data)]),
            processing_class=tokenizer(recipe),
            peft_config=config,
        )
        trainer.remove_callback(PrinterCallback)
        return run(trainer, data, tests)


SIDES = {"ours": ours, "baseline": baseline, "trl": trl}
NAMES = {"baseline": "transformers Trainer + PEFT + bitsandbytes", "trl": "TRL SFTTrainer + PEFT + bitsandbytes"}


def common(recipe) -> dict:
    return {
        "per_device_train_batch_size": recipe.train.batch_size,
        "num_train_epochs": 1,
        "learning_rate": recipe.train.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0,  # the rates of our schedule, whose first step already has one: here all of it
        "optim": "adamw_torch_fused",
        "use_cpu": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "report_to": "none",
        "dataloader_pin_memory": False,
        "seed": recipe.train.seed,
    }


def rows(data) -> list[dict]:
    """The examples as the baselines take them."""
    made = []
    for example in data:
        labels = [-100] * len(example.ids)
        for start, end in example.spans:
            labels[start:end] = example.ids[start:end]
        made.append({"input_ids": list(example.ids), "attention_mask": [1] * len(labels), "labels": labels})
    return made


def tokenizer(recipe):
    from transformers import AutoTokenizer

    from adapterhub_local.base.bases import find_base
    from adapterhub_local.settings import home

    return AutoTokenizer.from_pretrained(find_base(recipe.base.name, home()).folder)


def prepare(arguments, adapter: bool = True):
    """The model over the shared base and the tokenised examples: the same for all sides."""
    from adapterhub_local.base.bases import find_base
    from adapterhub_local.base.load import load_base
    from adapterhub_local.recipe import load_recipe
    from adapterhub_local.rows.examples import read_chats, tokenise
    from adapterhub_local.settings import home
    from adapterhub_local.train.adapter import with_adapter

    recipe = load_recipe(RECIPE, [f"data.limit={arguments.examples}"])
    base = load_base(find_base(recipe.base.name, home()))

    def read(path, limit: int) -> list:
        return tokenise(read_chats(path, limit), base.tokenizer, recipe.data.max_length)

    data = read(recipe.data.train, arguments.examples)
    tests = read(recipe.data.test, arguments.tests) if arguments.tests else []
    return with_adapter(base, recipe) if adapter else base.model, data, recipe, tests


def run(trainer, data, tests) -> dict[str, float]:
    """Train and report; the first step, which warms caches, is part of each."""
    start = time.perf_counter()
    result = trainer.train()
    seconds = time.perf_counter() - start
    tokens = sum(len(example.ids) for example in data)
    measured = {
        "seconds": round(seconds, 2),
        "examples_per_second": round(len(data) / seconds, 3),
        "tokens_per_second": round(tokens / seconds, 1),
        "peak_memory_mb": peak_memory_mb(),
        "mean_loss": round(result.training_loss, 4),
    }
    if tests:  # after the memory was taken
        from adapterhub_local.evaluate.metrics import evaluate

        score = evaluate(trainer.model.eval(), tests, 16)
        measured |= {"held_out_loss": round(score.loss, 4), "held_out_exact_match": round(score.exact_match, 4)}
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=96)
    parser.add_argument("--tests", type=int, default=100, help="held-out examples to score each side on")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--trl", metavar="FOLDER", help="where TRL is installed")
    parser.add_argument("--side", choices=SIDES, help="one measurement, for the parent process")
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(SIDES[arguments.side](arguments)))
        return
    results: dict[str, list[dict]] = {side: [] for side in SIDES if side != "trl" or arguments.trl}
    given = ("--examples", str(arguments.examples), "--tests", str(arguments.tests))
    for _ in range(arguments.rounds):
        for side, kept in results.items():
            folder = ("--trl", arguments.trl) if side == "trl" else ()
            kept.append(child("-m", "benchmarks.train", "--side", side, *given, *folder))
    medians = {
        side: {key: statistics.median(one[key] for one in kept) for key in kept[0]} for side, kept in results.items()
    }
    document = {
        "benchmark": "train",
        "machine": machine(),
        "workload": f"demo base, sentiment, {arguments.examples} examples, r 16 all linear, batch 16, fp32",
        "rounds": arguments.rounds,
        "ours": medians["ours"],
    }
    for side, name in NAMES.items():
        if side not in medians:
            document[side] = {"name": name, "not_measured": "give --trl FOLDER, where TRL is installed"}
            continue
        document[side] = {"name": name, **medians[side]}
        document[f"ratio_to_{side}"] = {
            "examples_per_second": round(ratio(medians, side, "examples_per_second"), 2),
            "peak_memory": round(ratio(medians, side, "peak_memory_mb"), 2),
        }
    print(json.dumps(document))


def ratio(medians: dict[str, dict], side: str, key: str) -> float:
    return medians["ours"][key] / medians[side][key]


if __name__ == "__main__":
    from adapterhub_local.noise import hush

    hush()
    main()
