"""Training speed and memory: ours beside plain transformers Trainer + PEFT + bitsandbytes, on the same NF4 base.

    python -m benchmarks.train [--examples 96] [--rounds 2]

Same base, data, order of magnitude of work: rank 16 on all linear layers, batch 16, one AdamW, float32 on the CPU.
The baseline pads each batch and computes logits at every position, as its defaults do; ours packs a batch behind
what its examples share and computes logits where there are labels. Each side is a process of its own, in turn
A B A B, so that a noisy machine hits both; the median is reported. Both print their loss: the work is the same.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

from benchmarks.machine import child, machine, peak_memory_mb

RECIPE = Path(__file__).parent.parent / "recipes" / "sentiment.toml"


def ours(examples: int) -> dict[str, float]:
    from adapterhub_local.train.trainer import make_trainer

    model, data, recipe = prepare(examples)
    with tempfile.TemporaryDirectory() as folder:
        trainer, _ = make_trainer(model, data, recipe.train, Path(folder), lambda entry: None)
        return run(trainer, data)


def baseline(examples: int) -> dict[str, float]:
    from transformers import DataCollatorForSeq2Seq, PrinterCallback, Trainer, TrainingArguments

    from adapterhub_local.base.load import load_base
    from adapterhub_local.base.store import find_base
    from adapterhub_local.settings import home

    model, data, recipe = prepare(examples)
    tokenizer = load_base(find_base(recipe.base.name, home())).tokenizer
    rows = []
    for example in data:
        labels = [-100] * len(example.ids)
        for start, end in example.spans:
            labels[start:end] = example.ids[start:end]
        rows.append({"input_ids": list(example.ids), "attention_mask": [1] * len(labels), "labels": labels})
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=recipe.train.batch_size,
            num_train_epochs=1,
            learning_rate=recipe.train.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=1,
            optim="adamw_torch_fused",
            use_cpu=True,
            logging_steps=1,
            save_strategy="no",
            disable_tqdm=True,
            report_to="none",
            dataloader_pin_memory=False,
            seed=recipe.train.seed,
        )
        collator = DataCollatorForSeq2Seq(tokenizer, padding=True)
        trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collator)
        trainer.remove_callback(PrinterCallback)
        return run(trainer, data)


def prepare(examples: int):
    """The PEFT model over the shared base and the tokenised examples: the same for both sides."""
    from adapterhub_local.base.load import load_base
    from adapterhub_local.base.store import find_base
    from adapterhub_local.recipe import load_recipe
    from adapterhub_local.settings import home
    from adapterhub_local.train.examples import read_chats, tokenise
    from adapterhub_local.train.run import with_adapter

    recipe = load_recipe(RECIPE, [f"data.limit={examples}"])
    base = load_base(find_base(recipe.base.name, home()))
    data = tokenise(read_chats(recipe.data.train, examples), base.tokenizer, recipe.data.max_length)
    return with_adapter(base, recipe), data, recipe


def run(trainer, data) -> dict[str, float]:
    """Train and report; the first step, which warms caches, is part of both."""
    start = time.perf_counter()
    result = trainer.train()
    seconds = time.perf_counter() - start
    tokens = sum(len(example.ids) for example in data)
    return {
        "seconds": round(seconds, 2),
        "examples_per_second": round(len(data) / seconds, 3),
        "tokens_per_second": round(tokens / seconds, 1),
        "peak_memory_mb": peak_memory_mb(),
        "mean_loss": round(result.training_loss, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--side", choices=("ours", "baseline"), help="one measurement, for the parent process")
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps({"ours": ours, "baseline": baseline}[arguments.side](arguments.examples)))
        return
    results: dict[str, list[dict]] = {"ours": [], "baseline": []}
    for _ in range(arguments.rounds):
        for side, kept in results.items():
            kept.append(child("-m", "benchmarks.train", "--side", side, "--examples", str(arguments.examples)))
    medians = {
        side: {key: statistics.median(one[key] for one in kept) for key in kept[0]} for side, kept in results.items()
    }
    print(
        json.dumps(
            {
                "benchmark": "train",
                "machine": machine(),
                "workload": f"demo base, sentiment, {arguments.examples} examples, r 16 all linear, batch 16, fp32",
                "rounds": arguments.rounds,
                "ours": medians["ours"],
                "baseline": {"name": "transformers Trainer + PEFT + bitsandbytes", **medians["baseline"]},
                "ratio_examples_per_second": round(
                    medians["ours"]["examples_per_second"] / medians["baseline"]["examples_per_second"], 2
                ),
                "ratio_peak_memory": round(
                    medians["ours"]["peak_memory_mb"] / medians["baseline"]["peak_memory_mb"], 2
                ),
            }
        )
    )


if __name__ == "__main__":
    from adapterhub_local.noise import hush

    hush()
    main()
