"""How long a run takes: its arithmetic over what the device does in practice. Good to a factor of two, no better."""

import re
import time
from dataclasses import asdict, dataclass
from typing import Any

from adapterhub_local.plan.activations import Pass, adapted
from adapterhub_local.plan.device import Device
from adapterhub_local.plan.rows import Rows
from adapterhub_local.plan.shape import Shape

# dense bf16 TFLOP/s of the makers' data sheets, by what the driver calls the card
TFLOPS = {
    "H200": 989, "H100": 989, "A100": 312, "L40S": 362, "L4": 121, "A10": 125, "RTX 6000 Ada": 364, "RTX A6000": 155,
    "RTX 5090": 209, "RTX 4090": 165, "RTX 4080": 97, "RTX 3090": 71, "RTX 3080": 60, "RTX 3060": 26, "T4": 65,
}  # fmt: skip
UNKNOWN_GPU = 70
# share of the peak that remains after dequantising, attention and small operations: on the CPU as seen with the demo
# base (benchmarks/RESULTS.md), on a GPU what QLoRA trainers report; the latter was not measured here
CPU_EFFICIENCY = 0.5
GPU_EFFICIENCY = 0.3
DEQUANTISED_PER_SECOND = {"cpu": 4e8, "cuda": 2e11}  # weights
SECONDS_A_LAYER = 1.2e-3  # of Python and kernel launches, a pass of one row: what small rows and models wait for


@dataclass(frozen=True)
class Duration:
    """Seconds of training without evaluation, in `steps` optimizer steps, and on what the estimate rests."""

    seconds: float
    steps: int
    tokens_per_second: float
    basis: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def duration(shape: Shape, rows: Rows, run: Pass, steps: int, epochs: float, device: Device) -> Duration:
    """The time of a run by its floating-point operations: forward, backward through a frozen base, A and B."""
    passes = (
        3 if run.is_checkpointed else 2
    )  # forward and the gradient of inputs; a frozen weight needs no gradient of its own
    factors = sum(
        linear.active * run.rank * (linear.in_features + linear.out_features) for linear in adapted(shape, run.targets)
    )
    factors *= shape.layers
    row = rows.computed / max(1, rows.rows)
    keys = row if shape.makes_mask else min(row, rows.mean)  # examples of a row attend each to itself
    attention = 2 * 2 * keys * shape.heads * shape.head_dim * shape.layers  # scores and values, a token, forward
    a_token = 2 * passes * shape.active_size + 2 * (passes + 1) * factors + (passes + 1) * attention
    head = 4 * rows.epoch_labels * shape.vocabulary * shape.hidden
    if device.kind == "cpu":
        rate, basis = _cpu_flops() * CPU_EFFICIENCY, "this CPU's matrix product, measured now"
    else:
        peak = next((value for name, value in TFLOPS.items() if re.search(rf"\b{name}\b", device.name)), UNKNOWN_GPU)
        rate, basis = peak * 1e12 * GPU_EFFICIENCY, f"{peak} TFLOP/s in bf16 from the data sheet"
    one_epoch = (rows.computed * a_token + head) / rate
    one_epoch += rows.rows * passes * shape.linear_size / DEQUANTISED_PER_SECOND[device.kind]
    one_epoch += rows.rows * passes * shape.layers * SECONDS_A_LAYER
    looking = (2 * shape.active_size + 2 * factors + attention) / rate  # seconds a token without gradients
    seconds = (one_epoch + rows.looked_at * looking) * epochs + rows.referred * looking
    return Duration(round(seconds, 3), steps, round(rows.epoch_tokens * epochs / seconds, 1), basis)


def _cpu_flops() -> float:
    """Floating-point operations a second of float32 matrix products on this machine's cores.

    Measured on one core in processor time, so that other work on the machine counts little.
    """
    import torch  # loaded already by the tokenizer; numpy's BLAS may have other threads

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    matrix, best = torch.rand(768, 768), float("inf")
    try:
        with torch.inference_mode():
            for _ in range(8):
                start = time.thread_time()
                matrix @ matrix
                best = min(best, time.thread_time() - start)
    finally:
        torch.set_num_threads(threads)
    return 2 * 768**3 / best * threads
