"""`qhub plan`: what a recipe's run takes, before it takes it."""

from dataclasses import replace
from pathlib import Path

import click

from adapterhub_local.cli.output import echo, print_json, print_table, size_text
from adapterhub_local.counts import counted
from adapterhub_local.errors import InputError
from adapterhub_local.settings import home

PURPOSES = {
    "base": "the frozen base, 4 bits and 16 or 32 bits for the rest",
    "adapter": "A and B",
    "gradients": "of A and B",
    "optimizer": "the states of AdamW",
    "activations": "kept for the backward pass",
    "logits": "at the labels only",
    "workspace": "for a moment: dequantised weights, gradients of activations",
    "drawing": "keys and values of the answers that are drawn, constants of the base in float32",
    "libraries": "torch and what it loads",
}


@click.command(name="plan")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--set", "overrides", multiple=True, metavar="TABLE.KEY=VALUE", help="Change a key of the recipe.")
@click.option("--gpu", metavar="SIZE", help="Plan for a GPU with this memory, such as 24GB.")
@click.option("--ram", metavar="SIZE", help="Plan for a CPU with this much free memory.")
@click.option(
    "--nproc", type=click.IntRange(1), default=1, help="Processes to train in, a GPU each; memory is that of one."
)
@click.option("--shard-base", is_flag=True, help="Hold a part of the base in each of them.")
@click.option(
    "--base-config",
    type=click.Path(path_type=Path),
    help="The config.json of a model that is not there; tokens are then estimated.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    recipe: Path,
    overrides: tuple[str, ...],
    gpu: str | None,
    ram: str | None,
    nproc: int,
    shard_base: bool,
    base_config: Path | None,
    as_json: bool,
) -> int:
    """Estimate what training RECIPE takes: memory by purpose, the largest rows that fit, time.

    Exit code 0 if it fits the device, 1 if it does not. Without --gpu or --ram: the GPU here, else the free RAM.
    """
    from adapterhub_local.plan.device import find_device
    from adapterhub_local.plan.memory import estimate
    from adapterhub_local.plan.run_plan import plan
    from adapterhub_local.recipe import load_recipe
    from adapterhub_local.train.check import check_processes

    for option, size in (("--gpu", gpu), ("--ram", ram)):
        if size and size.strip().isdigit():
            raise InputError(f"{option} {size} has no unit: write {size}GB, 7.4GiB or 900MB")
    device = find_device(gpu, ram)
    if device.kind == "cpu" and nproc > 1:
        device = replace(device, memory=device.memory // nproc, name=f"{device.name}, divided by {nproc}")
    loaded = load_recipe(recipe, overrides)
    check_processes(loaded, nproc, shard_base=shard_base)
    planned = plan(loaded, home(), device, base_config, num_processes=nproc, shard_base=shard_base)
    if as_json:
        print_json(planned.to_json())
        return 0 if planned.fits else 1
    for choice in planned.choices:
        echo(str(choice))
    memory = planned.memory.to_json()
    rows = [(name, size_text(memory[name]), meaning) for name, meaning in PURPOSES.items()
            if memory[name] or name != "drawing"]  # fmt: skip
    rows += [("total", size_text(memory["total"]), ""), ("device", size_text(device.memory), device.name)]
    rows.append(("headroom", ("-" if planned.headroom < 0 else "") + size_text(abs(planned.headroom)), ""))
    print_table(("memory", "peak", ""), rows)
    data, run = planned.rows, planned.run
    echo(
        f"{counted(data.examples, 'example')} of {data.mean} tokens{' (estimated)' if data.is_estimated else ''}, "
        f"rows of up to {data.row_tokens} tokens with {data.row_labels} labels; {planned.optimizer}, "
        f"{'bfloat16' if run.compute == 2 else 'float32'}"
    )
    echo(
        f"{'Fits' if planned.fits else 'Does not fit'}. The most that fits: one example of {planned.longest_example:,} "
        f"tokens, or {planned.largest_batch:,} average ones in a row of {planned.largest_row:,}"
    )
    echo(
        f"About {_time_text(planned.duration.seconds)} for {counted(planned.duration.steps, 'step')} "
        f"({planned.duration.basis})"
    )
    if nproc > 1 and not shard_base:
        divided = estimate(planned.shape, replace(planned.run, shards=nproc), planned.optimizer, device.kind)
        total, base = size_text(divided.total), size_text(divided.base)
        echo(f"With --shard-base each process takes {total}, {base} of it for the base")
    if memory["paged"]:
        echo(f"{size_text(memory['paged'])} of optimizer states can move to the host when the GPU is full")
    if memory["host"]:
        echo(f"{size_text(memory['host'])} of activations and embeddings are in the host's memory")
    if device.kind == "cuda":
        echo("GPU figures are computed; the two cases measured on a GPU took 7 and 8 % less memory")
    if not planned.shape.is_known:
        echo(f"{planned.shape.model_type} is counted as a llama")
    return 0 if planned.fits else 1


def _time_text(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
