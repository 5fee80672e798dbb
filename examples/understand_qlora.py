"""What QLoRA does to one real weight matrix, step by step, with its bytes and its error at every step.

    python -m examples.understand_qlora                                  # a matrix of the demo base, seconds on a CPU
    python -m examples.understand_qlora --matrix blk.29.ffn_up               # another one of it
    python -m examples.understand_qlora --model FOLDER_OR_GGUF           # of another 16-bit model

Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs", https://arxiv.org/abs/2305.14314. Every step
is written out in a few lines of torch, then held against bitsandbytes, which does it in real runs.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from adapterhub_local.base.load import import_bitsandbytes
from adapterhub_local.base.source import open_source
from adapterhub_local.errors import QhubError
from examples.demo import demo_base

BLOCK = 64  # weights that share one constant
GROUP = 256  # constants that share one constant of their own
RANK, ALPHA = 8, 16
STEPS, ROWS = 60, 96
console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)


# -- the four-bit types: sixteen numbers between -1 and 1 each ---------------------------------------------


def nf4() -> torch.Tensor:
    """NormalFloat: levels that normal weights use equally often, as means of neighbouring quantiles would have it.

    The positive half has one level more, so that zero is exact. Appendix E of the paper.
    """
    normal = torch.distributions.Normal(0.0, 1.0)
    offset = 0.9677083  # leaves room beyond the outermost levels: (1 - 1/30 + 1 - 1/32) / 2
    positive = normal.icdf(torch.linspace(offset, 0.5, 9)[:-1])
    negative = -normal.icdf(torch.linspace(offset, 0.5, 8)[:-1])
    levels = torch.cat([positive, torch.zeros(1), negative]).sort().values
    return levels / levels.max()


def int4() -> torch.Tensor:
    """Integers -7 to 7, evenly spaced."""
    return torch.arange(-7, 8) / 7


def fp4() -> torch.Tensor:
    """A sign, two bits of exponent, one of mantissa (E2M1): dense at zero, coarse at the ends."""
    positive = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6]) / 6
    return torch.cat([-positive[1:], positive]).sort().values


# -- quantising -----------------------------------------------------------------------------------------------


def quantise(weight: torch.Tensor, levels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (n / BLOCK, BLOCK), each the number of the nearest level, and the largest magnitude of each block."""
    blocks = weight.float().reshape(-1, BLOCK)
    absmax = blocks.abs().amax(1, keepdim=True)
    middles = (levels[1:] + levels[:-1]) / 2
    return torch.bucketize(blocks / absmax, middles), absmax[:, 0]


def dequantise(codes: torch.Tensor, absmax: torch.Tensor, levels: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The weight again: the level of each code times its block's constant."""
    return (levels[codes] * absmax[:, None]).reshape(shape)


def double_quantise(absmax: torch.Tensor) -> torch.Tensor:
    """The constants as they come back from 8 bits: mean taken off, 256 levels a group, one float32 a group."""
    functional = import_bitsandbytes().functional
    mean = absmax.mean()
    codes, state = functional.quantize_blockwise(absmax - mean, blocksize=GROUP)
    return functional.dequantize_blockwise(codes, state) + mean


def relative_error(weight: torch.Tensor, other: torch.Tensor) -> float:
    """|weight - other| / |weight|, in the Frobenius norm."""
    return ((weight.float() - other).norm() / weight.float().norm()).item()


# -- the lesson ---------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a 16-bit transformers folder or .gguf file; the demo base if not")
    parser.add_argument("--matrix", default="", help="part of the name of a weight matrix")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    try:
        name, weight = find_matrix(arguments.model or demo_base(), arguments.matrix)
    except QhubError as error:
        sys.exit(str(error))

    rows, columns = weight.shape
    size = weight.numel()
    console.print(
        f"[bold]1. One matrix[/]  {name}, {rows} x {columns}: {size:,} weights, {2 * size:,} bytes in 16 bits\n"
    )
    histogram(weight)

    console.print(
        "\n[bold]2. Sixteen levels[/]  A block of 64 is divided by its largest magnitude; each weight becomes"
    )
    console.print("the number of the nearest of sixteen levels. What the levels are is all the difference:\n")
    errors = {}
    for kind, levels in {"NF4": nf4(), "INT4": int4(), "FP4": fp4()}.items():
        codes, absmax = quantise(weight, levels)
        errors[kind] = relative_error(weight, dequantise(codes, absmax, levels, weight.shape))
        console.print(f"  {kind:5} {ruler(levels)}  error {errors[kind]:.2%}")
    console.print("\nTrained weights are near normal, so levels at the quantiles of a normal lose least.")

    codes, absmax = quantise(weight, nf4())
    console.print(
        f"\n[bold]3. The constants[/]  One float32 for {BLOCK} weights is {32 / BLOCK} bits a weight: as much as an"
    )
    console.print("eighth of the codes. So the constants are quantised too, to 8 bits, 256 of them to one float32:")
    again = dequantise(codes, double_quantise(absmax), nf4(), weight.shape)
    bits = 4 + 8 / BLOCK + 32 / (BLOCK * GROUP)
    console.print(f"4 + 8/{BLOCK} + 32/({BLOCK} x {GROUP}) = {bits:.3f} bits a weight instead of {4 + 32 / BLOCK}.")
    console.print(f"Error {errors['NF4']:.3%} before, {relative_error(weight, again):.3%} after.")
    theirs = by_bitsandbytes(weight)
    console.print(
        f"bitsandbytes' own NF4 with double quantisation differs from ours by {relative_error(theirs, again):.1e}."
    )

    console.print(
        f"\n[bold]4. A and B[/]  y = W x + s B (A x), rank {RANK}, s = {ALPHA}/{RANK}. W is frozen; B begins at zero,"
    )
    console.print("so nothing changes at first. Here they learn a change of W of rank 4, as a task would ask for:\n")
    adapter = Adapter(rows, columns)
    before = again.clone()
    optimizer = learn(again, adapter)
    console.print(f"\nW is what it was, bit for bit: {torch.equal(before, again)}.")

    console.print("\n[bold]5. What it all takes[/]")
    bytes_table(size, codes.numel(), absmax.numel(), adapter, optimizer)


def find_matrix(model: Path, part: str) -> tuple[str, torch.Tensor]:
    """The first weight matrix whose name has `part` in it. Raises QhubError with some names if there is none."""
    names, read = open_gguf(model) if model.suffix == ".gguf" else open_folder(model)
    name = next((name for name in sorted(names) if part in name), None)
    if name is None:
        raise QhubError(
            f"no matrix of {model.name} has '{part}' in its name: it has {', '.join(sorted(names)[:5])}, ..."
        )
    return name, read(name).to(torch.bfloat16)


def open_gguf(path: Path) -> tuple[list[str], Callable[[str], torch.Tensor]]:
    """The matrices of the blocks in a GGUF file."""
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors if len(tensor.shape) == 2}

    def read(name: str) -> torch.Tensor:
        return torch.tensor(gguf.dequantize(stored[name].data, stored[name].tensor_type))

    return [name for name in stored if name.startswith("blk.")], read


def open_folder(folder: Path) -> tuple[list[str], Callable[[str], torch.Tensor]]:
    """The matrices of the blocks in a transformers folder."""
    source = open_source(folder)
    return [name for name in source.names if name.endswith(("proj.weight", "dense.weight"))], source.read


def histogram(weight: torch.Tensor) -> None:
    """The weights' distribution beside the normal one of the same spread."""
    flat = weight.float().flatten()
    edges = torch.linspace(-3, 3, 13)
    counts = torch.histogram(flat / flat.std(), edges).hist / flat.numel()
    normal = torch.distributions.Normal(0.0, 1.0).cdf(edges).diff()
    for low, share, expected in zip(edges, counts.tolist(), normal.tolist(), strict=False):
        bar = list("█" * round(150 * share))
        at = round(150 * expected)
        bar += " " * (at + 1 - len(bar))
        bar[at] = "|"
        console.print(f"  {low:+.1f} {''.join(bar)}", markup=False)
    console.print("  bars: the weights by standard deviations; | where a normal distribution would end")


def ruler(levels: torch.Tensor) -> str:
    """The levels as ticks from -1 to 1."""
    line = ["·"] * 61
    for level in levels.tolist():
        line[round((level + 1) * 30)] = "|"
    return "".join(line)


def by_bitsandbytes(weight: torch.Tensor) -> torch.Tensor:
    """The weight through the kernels that real runs use."""
    functional = import_bitsandbytes().functional
    codes, state = functional.quantize_4bit(weight.float(), blocksize=BLOCK, compress_statistics=True, quant_type="nf4")
    return functional.dequantize_4bit(codes, state)


class Adapter(torch.nn.Module):
    """A (r x in), random; B (out x r), zero."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.A = torch.nn.Parameter(torch.randn(RANK, columns) / columns**0.5)
        self.B = torch.nn.Parameter(torch.zeros(rows, RANK))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ALPHA / RANK * x @ self.A.T @ self.B.T


def learn(frozen: torch.Tensor, adapter: Adapter) -> torch.optim.Optimizer:
    """Train A and B until W x + s B A x is what another W would give; prints the error on the way."""
    rows, columns = frozen.shape
    up, down = torch.randn(rows, 4), torch.randn(4, columns)
    up *= 0.5 * frozen.norm() / (up @ down).norm()
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.02, weight_decay=0)
    for step in range(STEPS + 1):
        x = torch.randn(ROWS, columns)
        base = x @ frozen.T
        wanted = base + x @ down.T @ up.T
        loss = (base + adapter(x) - wanted).square().mean() / wanted.square().mean()
        if step % (STEPS // 4) == 0:
            console.print(f"  step {step:3}   error {loss.sqrt().item():.1%}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return optimizer


def bytes_table(size: int, codes: int, constants: int, adapter: Adapter, optimizer: torch.optim.Optimizer) -> None:
    """The bytes of each part, measured from the tensors where they exist, beside training all of W."""
    factors = sum(part.nbytes for part in adapter.parameters())
    gradients = sum(part.grad.nbytes for part in adapter.parameters() if part.grad is not None)
    states = sum(
        value.nbytes for state in optimizer.state.values() for value in state.values() if value.ndim
    )  # the two moments; the step count is one number
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in ("part", "QLoRA, bytes", "training W in 16 bits, bytes"):
        table.add_column(column, justify="left" if column == "part" else "right")
    base = codes // 2
    nested = constants + 4 * -(-constants // GROUP)
    lines = [
        ("4-bit codes", base, 0),
        ("constants, doubly quantised", nested, 0),
        ("weights", 0, 2 * size),
        ("A and B, float32", factors, 0),
        ("gradients", gradients, 2 * size),
        ("AdamW's two moments, float32", states, 8 * size),
    ]
    totals = ("together", sum(line[1] for line in lines), sum(line[2] for line in lines))
    for part, ours, full in [*lines, totals]:
        table.add_row(part, f"{ours:,}" if ours else "", f"{full:,}" if full else "")
    console.print(table)
    console.print(f"{8 * (base + nested) / size:.3f} bits a weight; {totals[2] / totals[1]:.1f} times less in all.")


if __name__ == "__main__":
    main()
