"""Training on one GPU: does it fit the card named, how fast is it, how long a context, beside plain HF + PEFT.

    python -m benchmarks.train_gpu                        # all cases on a GPU of 80 GB or more; others leave some out
    python -m benchmarks.train_gpu --only llama-8b --minutes 9 --out train.json   # some, within a time, kept in a file
    python -m benchmarks.train_gpu --device cpu --tiny    # the same code on tiny shapes, to see that it runs

Weights are random, of the real shape, quantised to NF4 on the GPU one layer at a time: memory and speed do not
depend on their values. The allocator is capped to the card named, less what the CUDA context takes. Each case is a
process of its own. `planned_gib` is what `qhub plan` says of it.
"""

import importlib.util
import itertools
import json
import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.machine import Meter, kernel_times, run_cases

LLAMA = {"model_type": "llama", "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000}
SHAPES: dict[str, dict[str, Any]] = {
    "7b": {**LLAMA, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32},
    "8b": {
        **LLAMA, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "65b": {
        **LLAMA, "hidden_size": 8192, "intermediate_size": 22016, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 64,
    },
    "70b": {
        **LLAMA, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}  # fmt: skip
TINY = {
    **LLAMA, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 320,
}  # fmt: skip
CONTEXT_GIB = 0.6  # CUDA context and library workspaces: on the card, outside the allocator
# tokens that fit, by GiB: Unsloth's documentation, Llama-3.1-8B, QLoRA r 32, batch 1, HF + FlashAttention 2 in brackets
UNSLOTH = {8: (2972, None), 12: (21848, 932), 24: (78475, 5789), 48: (191728, 15502), 80: (342733, 28454)}


@dataclass(frozen=True)
class Case:
    """`examples` of `length` tokens a step, all in one row; `card`: GiB it must fit, `limit`: GiB it should take."""

    name: str
    shape: str
    rank: int
    length: int
    examples: int = 1
    card: float | None = None
    limit: float | None = None
    factors: str = "float32"
    optimizer: str = "adamw_8bit"
    checkpointing: bool | str = True
    mode: str = "fits"  # fits, longest, speed, plain
    liger: bool = False


CASES = (
    Case("llama-65b-r64-512-on-48", "65b", 64, 512, card=48),
    Case("llama-2-70b-r16-512-on-40", "70b", 16, 512, card=40, factors="bfloat16"),
    Case("llama-7b-r64-512-on-12", "7b", 64, 512, card=12),
    Case("llama-8b-2x2048-in-7.4", "8b", 8, 2048, examples=2, limit=7.4, factors="bfloat16", checkpointing="offload"),
    *(
        Case(
            f"llama-8b-longest-on-{card}", "8b", 32, 0, card=card, factors="bfloat16", checkpointing="offload",
            mode="longest",
        )
        for card in UNSLOTH
    ),
    # each with and without computing activations again, and with the kernels of Liger (pip install liger-kernel)
    *(
        Case(
            f"llama-8b-speed-{side}{'' if again else '-whole'}{'-liger' if liger else ''}", "8b", 16, 512, examples=8,
            optimizer="adamw", checkpointing=again, mode="plain" if side == "plain" else "speed", liger=liger,
        )
        for side, again, liger in itertools.product(("ours", "plain"), (True, False), (False, True))
    ),
)  # fmt: skip


def random_base(shape: dict[str, Any], device: str) -> Any:
    """A model of this shape with random NF4 weights, never whole in 16 bits."""
    import torch
    from torch import nn
    from transformers import AutoConfig, AutoModelForCausalLM

    from adapterhub_local.base.load import close_packing_trap, import_bitsandbytes
    from adapterhub_local.base.quantise import quantised_modules

    bnb = import_bitsandbytes().nn
    dtype = torch.bfloat16
    keys = {key: value for key, value in shape.items() if key != "model_type"}
    config = AutoConfig.for_model(
        shape["model_type"], **keys, max_position_embeddings=2**20, pad_token_id=0, bos_token_id=None, eos_token_id=1
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    generator = torch.Generator(device).manual_seed(0)

    def drawn(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device=device, dtype=dtype) * 0.02

    for name in quantised_modules(model):
        old = model.get_submodule(name)
        layer = bnb.Linear4bit(
            old.in_features, old.out_features, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta"
        )
        weight = drawn(old.out_features, old.in_features)
        layer.weight = bnb.Params4bit(weight, requires_grad=False, quant_type="nf4").to(device)
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, layer)
        del weight
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            parent, _, own = name.rpartition(".")
            one = (
                torch.ones(parameter.shape, device=device, dtype=dtype)
                if parameter.ndim == 1
                else drawn(*parameter.shape)
            )
            setattr(model.get_submodule(parent), own, nn.Parameter(one, requires_grad=False))
    model.tie_weights()  # the head of a shape whose embeddings it shares was left where it was
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    model.is_loaded_in_4bit = True
    close_packing_trap(model, dtype)
    return model.requires_grad_(False).eval()


def recipe_of(case: Case, folder: Path) -> Any:
    """The recipe of a case; its data are made here, so that it names a file only for the form."""
    from adapterhub_local.recipe import load_recipe

    (folder / "data.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (folder / "recipe.toml").write_text(
        '[base]\nname = "random"\n[data]\ntrain = "data.jsonl"\n'
        f'[adapter]\nrank = {case.rank}\ndtype = "{case.factors}"\n'
        f"[train]\nbatch_size = {case.examples}\npacked_tokens = {case.examples * max(case.length, 8)}\n"
        f"activation_checkpointing = {json.dumps(case.checkpointing)}\n"
        f'optimizer = "{case.optimizer}"\ncompute = "bfloat16"\n'
        '[output]\nname = "measured"\n'
    )
    return load_recipe(folder / "recipe.toml")


def random_examples(count: int, length: int, vocabulary: int) -> list[Any]:
    """Chats of random tokens, all but the first of which are learned."""
    import torch

    from adapterhub_local.rows.examples import Example

    ids = torch.randint(2, vocabulary, (count, length), generator=torch.Generator().manual_seed(0)).tolist()
    return [Example(tuple(row), ((1, length),)) for row in ids]


def cap(gib: float, device: str) -> str | None:
    """Hold the allocator to a card of so many GiB; says why that cannot be done here, if it cannot."""
    import torch

    if device != "cuda":
        return None
    total = torch.cuda.get_device_properties(0).total_memory / 2**30
    if gib - CONTEXT_GIB > total:
        return f"this GPU has {total:.0f} GiB"
    torch.cuda.set_per_process_memory_fraction(min(1.0, (gib - CONTEXT_GIB) / total))
    return None


def planned_gib(case: Case, shape: dict[str, Any], length: int) -> float:
    """What qhub plan says of a case."""
    from adapterhub_local.plan.activations import Pass
    from adapterhub_local.plan.memory import estimate
    from adapterhub_local.plan.shape import read_shape

    tokens = case.examples * length
    run = Pass(
        tokens, tokens, case.examples > 1, 2, 2 if case.factors == "bfloat16" else 4, case.rank, ("all-linear",),
        is_checkpointed=bool(case.checkpointing), is_offloaded=case.checkpointing == "offload",
    )  # fmt: skip
    return round(estimate(read_shape(shape), run, case.optimizer, "cuda").total / 2**30, 3)


def prepared(case: Case, shape: dict[str, Any], device: str, folder: Path) -> tuple[Any, Any]:
    """A random base with fresh factors, and the recipe."""
    from adapterhub_local.base.load import LoadedBase
    from adapterhub_local.train.adapter import with_adapter

    recipe = recipe_of(case, folder)
    model = random_base(shape, device)
    if case.liger:
        use_liger(model)
    base = LoadedBase(info=None, model=model, tokenizer=None)  # type: ignore[arg-type]
    return with_adapter(base, recipe), recipe


def use_liger(model: Any) -> None:
    """Liger's kernels in a Llama: its norms, rotary embeddings and MLPs; the loss stays whose it is."""
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    apply_liger_kernel_to_llama(fused_linear_cross_entropy=False, model=model)


def fits(case: Case, shape: dict[str, Any], device: str, steps: int) -> dict[str, Any]:
    """Train some steps with our trainer: peak memory and tokens a second, the first step left out of the time."""
    from adapterhub_local.train.trainer import make_trainer
    from adapterhub_local.train.watch import Watch

    meter = Meter(device)
    with tempfile.TemporaryDirectory() as folder:
        model, recipe = prepared(case, shape, device, Path(folder))
        examples = random_examples(case.examples * steps, case.length, shape["vocab_size"])
        stamps: list[float] = []
        meter.reset()
        watch = Watch(lambda entry: stamps.append(meter.now()))
        trainer = make_trainer(model, examples, recipe, Path(folder), watch)
        rows = len(trainer.objective.rows(examples[: case.examples]))  # more than one where packing was not exact
        trainer.train()
        tokens = case.examples * case.length * (len(stamps) - 1)
        found = {**meter.peak(), "rows_a_step": rows, "tokens_per_second": round(tokens / (stamps[-1] - stamps[0]), 1)}
        if case.mode == "speed" and device == "cuda":
            batch = {"rows": trainer.objective.rows(examples[: case.examples])}
            found["milliseconds_of_a_pass"] = kernel_times(lambda: trainer.training_step(model, batch), steps=2)
    return found


def longest(case: Case, shape: dict[str, Any], device: str, most: int) -> dict[str, Any]:
    """The longest single example that trains under the cap, by bisection to 2 %."""
    import torch

    from adapterhub_local.rows.packing import pack
    from adapterhub_local.train.checkpointing import enable_checkpointing
    from adapterhub_local.train.loss import answer_loss, output_head

    meter = Meter(device)
    with tempfile.TemporaryDirectory() as folder:
        model, recipe = prepared(replace(case, length=8), shape, device, Path(folder))
    probe = random_examples(1, 64, shape["vocab_size"])[0]
    head = output_head(model, probe)
    enable_checkpointing(model, recipe.train.activation_checkpointing)
    model.train()
    factors = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(factors, lr=1e-4)  # its states are as large as the update after the pass needs

    def trains(length: int) -> bool:
        try:
            row = pack(random_examples(1, length, shape["vocab_size"]))
            (answer_loss(model, row, head) / length).backward()
            optimizer.step()
        except torch.cuda.OutOfMemoryError:
            return False
        finally:
            optimizer.zero_grad(set_to_none=True)
            meter.reset()
        return True

    if not trains(64):
        return {"longest": 0, "recipe_rank": recipe.adapter.rank}
    low, high = 64, 128
    while high <= most and trains(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > max(1, low // 50):
        middle = (low + high) // 2
        low, high = (middle, high) if trains(middle) else (low, middle)
    return {"longest": low, "recipe_rank": recipe.adapter.rank}


def plain(case: Case, shape: dict[str, Any], device: str, steps: int) -> dict[str, Any]:
    """The same work with transformers' Trainer and PEFT as their documentation shows it."""
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    meter, stamps = Meter(device), []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            stamps.append(meter.now())

    model = prepare_model_for_kbit_training(random_base(shape, device), use_gradient_checkpointing=case.checkpointing)
    config = LoraConfig(r=case.rank, lora_alpha=2 * case.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    rows = [
        {"input_ids": list(one.ids), "labels": [-100, *one.ids[1:]]}
        for one in random_examples(case.examples * steps, case.length, shape["vocab_size"])
    ]
    meter.reset()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, per_device_train_batch_size=case.examples, max_steps=steps, use_cpu=device == "cpu",
            bf16=device == "cuda", optim="adamw_torch_fused", save_strategy="no", report_to="none", disable_tqdm=True,
            dataloader_pin_memory=False, use_liger_kernel=case.liger,
        )  # fmt: skip
        trainer = Trainer(
            model=model, args=arguments, train_dataset=rows, callbacks=[Clock()],
            data_collator=lambda batch: {key: torch.tensor([row[key] for row in batch]) for key in batch[0]},
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    tokens = case.examples * case.length * (len(stamps) - 1)
    return {**meter.peak(), "tokens_per_second": round(tokens / (stamps[-1] - stamps[0]), 1)}


def measure(case: Case, device: str, tiny: bool) -> dict[str, Any]:
    """One case: what was measured, or why it was not."""
    import torch

    from adapterhub_local.noise import hush

    hush()
    shape = TINY if tiny else SHAPES[case.shape]
    case = replace(case, length=min(case.length, 32), rank=4) if tiny else case
    if case.card and (reason := cap(case.card, device)):
        return {"case": case.name, "left_out": reason}
    if case.liger and importlib.util.find_spec("liger_kernel") is None:
        return {"case": case.name, "left_out": "liger-kernel is not installed"}
    steps = 3 if tiny else 6
    try:
        if case.mode == "longest":
            result = longest(case, shape, device, most=256 if tiny else 2**20)
            result["unsloth"], result["hf_flash_attention_2"] = UNSLOTH[int(case.card or 0)]
            length = result["longest"]
        else:
            result = (plain if case.mode == "plain" else fits)(case, shape, device, steps)
            result["fits"] = True
            length = case.length
    except torch.cuda.OutOfMemoryError as error:
        return {"case": case.name, "fits": False, "reason": str(error).splitlines()[0][:200]}
    if case.mode != "plain":
        result["planned_gib"] = planned_gib(case, shape, length)
    if case.limit and "allocated_gib" in result:
        result["limit_gib"], result["within_limit"] = case.limit, result["allocated_gib"] <= case.limit
    return {"case": case.name, **result}


# what is most worth knowing first; the rest behind it
ORDER = ("llama-8b-speed", "llama-8b-2x2048", "llama-7b", "llama-8b-longest-on-8", "llama-65b", "llama-8b-longest")


def summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    """What all cases together show."""
    by_name = {result["case"]: result for result in results}
    ours, theirs = (by_name.get(f"llama-8b-speed-{side}", {}).get("tokens_per_second") for side in ("ours", "plain"))
    return {
        "benchmark": "train_gpu",
        "workload": "random NF4 weights of the real shape, LoRA on all linear layers, checkpointing, bfloat16",
        "ours": ours,
        "baseline": {"name": "transformers Trainer + PEFT + bitsandbytes", "tokens_per_second": theirs},
        "ratio_tokens_per_second": round(ours / theirs, 2) if ours and theirs else None,
    }


def main() -> None:
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # before torch looks for the GPU

    def rank(case: Case) -> int:
        return next((place for place, begin in enumerate(ORDER) if case.name.startswith(begin)), len(ORDER))

    run_cases("benchmarks.train_gpu", sorted(CASES, key=rank), measure, summary, __doc__)


if __name__ == "__main__":
    main()
