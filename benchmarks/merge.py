"""Merging beside PEFT's `add_weighted_adapter` in one run: error, seconds, peak memory. The last line is JSON.

    python benchmarks/merge.py                       # 224 modules of a 7B model, rank 16, float16
    python benchmarks/merge.py --layers 4 --repeat 1 # a small machine, or a busy one

PEFT works on one 4096 x 4096 module, for on 7B shapes its dense routes take half an hour; ours on that module
and on all of them. Errors are against the dense sum in float64. Torch's thread count is the machine's default.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

SIZE, RANK, WEIGHTS = 4096, 16, (0.7, 0.3)
SHAPES = {  # (in, out) of one layer of a 7B Llama with 8 key-value heads
    "self_attn.q_proj": (4096, 4096),
    "self_attn.o_proj": (4096, 4096),
    "self_attn.k_proj": (4096, 1024),
    "self_attn.v_proj": (4096, 1024),
    "mlp.gate_proj": (4096, 14336),
    "mlp.up_proj": (4096, 14336),
    "mlp.down_proj": (14336, 4096),
}


def seconds(work: Callable[[], Any], repeat: int) -> float:
    """Median time of `work`, after one call to warm up if there are several."""
    if repeat > 1:
        work()
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def peak_mb() -> float:
    """The most resident memory of this process so far, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


def save_pair(folder: Path, layers: int) -> list[Path]:
    """Two random float16 adapters of a 7B model's shapes."""
    from adapterhub_local.lora.config import CONFIG, WEIGHTS, AdapterConfig
    from adapterhub_local.lora.write import tensor_name, write_adapter

    paths = []
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        tensors = {}
        for layer in range(layers):
            for name, (size_in, size_out) in SHAPES.items():
                module = f"model.layers.{layer}.{name}"
                tensors[tensor_name(module, "A")] = (torch.randn(RANK, size_in, generator=generator) / 64).half()
                tensors[tensor_name(module, "B")] = (torch.randn(size_out, RANK, generator=generator) / 64).half()
        shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        part = folder / f"part{seed}"
        part.mkdir()
        config = AdapterConfig(RANK, 32, tuple(name.split(".")[1] for name in SHAPES))
        write_adapter(part, config, shapes, tensors.items(), None)
        (part / CONFIG).unlink()
        paths.append((part / WEIGHTS).rename(folder / f"{seed}.safetensors"))
    return paths


def whole(folder: Path, layers: int, repeat: int) -> dict[str, Any]:
    """Our merges of the pair, from files to a file on disk."""
    from adapterhub_local.merge.formula import Formula
    from adapterhub_local.merge.plan import make_plan
    from adapterhub_local.merge.rank import RankRule
    from adapterhub_local.merge.run import merge_to_path
    from adapterhub_local.registry import Registry

    paths = save_pair(folder, layers)
    registry = Registry(folder / "home")
    formulas = {
        "exact": Formula(),
        "exact, stored in float16": Formula(dtype="float16"),
        f"reduced to rank {RANK}": Formula(rule=RankRule("rank", RANK)),
        "ties in core space": Formula("ties"),
    }
    results = {}
    for name, formula in formulas.items():
        reports = []

        def work(formula: Formula = formula, reports: list = reports) -> None:
            plan = make_plan([str(path) for path in paths], WEIGHTS, registry, formula=formula)
            target = folder / "merged.safetensors"
            reports.append(merge_to_path(plan, target))
            target.unlink()

        before = peak_mb()
        taken = seconds(work, repeat)
        results[name] = {
            "seconds": taken,
            "modules": reports[-1].num_modules,
            "relative_error": reports[-1].relative_error,
            "truncation_error": reports[-1].truncation_error,
            "dtype": reports[-1].dtype,
            "peak_mb_more_than_before": peak_mb() - before,
        }
        print(f"{name}: {results[name]}", flush=True)
    return results


def one_module(dense_repeat: int, repeat: int) -> dict[str, Any]:
    """One 4096 x 4096 module: ours beside PEFT's own code on the same factors."""
    from peft import LoraConfig, get_peft_model

    from adapterhub_local.lora.adapter import Delta
    from adapterhub_local.merge.algebra import decompose, weighted_sum
    from adapterhub_local.merge.entries import ties
    from adapterhub_local.merge.space import merge_in_core

    class Linear(torch.nn.Module):
        """A model of one layer, for PEFT to adapt."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(SIZE, SIZE, bias=False)

    generator = torch.Generator().manual_seed(0)
    deltas = [
        Delta(*(torch.randn(shape, generator=generator) / 64 for shape in ((RANK, SIZE), (SIZE, RANK))), 2.0)
        for _ in WEIGHTS
    ]
    truth = sum(w * d.scaling * (d.B.double() @ d.A.double()) for w, d in zip(WEIGHTS, deltas, strict=True))
    assert isinstance(truth, torch.Tensor)
    size = float(truth.norm())

    def error(matrix: torch.Tensor) -> float:
        return float((matrix.double() - truth).norm()) / size

    results: dict[str, Any] = {}

    def note(name: str, taken: float, matrix: torch.Tensor | None = None) -> None:
        results[name] = {"seconds": taken, **({} if matrix is None else {"relative_error": error(matrix)})}
        print(f"{name}: {results[name]}", flush=True)

    exact = weighted_sum(deltas, WEIGHTS)
    note("ours exact", seconds(lambda: weighted_sum(deltas, WEIGHTS), repeat), exact.dense())
    taken = seconds(lambda: decompose(exact, RANK).truncate(RANK), repeat)
    note("ours reduced", taken, decompose(exact, RANK).truncate(RANK).dense())
    parameters = {"density": 0.2, "scale": 1.0, "variant": "peft"}
    core_seconds = seconds(lambda: merge_in_core(deltas, lambda stack: ties(stack, WEIGHTS, parameters, ())), repeat)
    note("ours ties in core space", core_seconds)

    model = get_peft_model(Linear(), LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["layer"]), "first")
    model.add_adapter("second", LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["layer"]))
    layer = model.base_model.model.layer
    for name, delta in zip(("first", "second"), deltas, strict=True):
        layer.lora_A[name].weight.data = delta.A.clone()
        layer.lora_B[name].weight.data = delta.B.clone()
    options: dict[str, dict[str, Any]] = {
        "cat": {},
        "linear": {},
        "svd": {"svd_rank": RANK, "svd_full_matrices": False},
        "ties": {"density": 0.2},
        "ties_svd": {"density": 0.2, "svd_rank": RANK, "svd_full_matrices": False},
    }
    for kind, more in options.items():

        def work(kind: str = kind, more: dict[str, Any] = more) -> None:
            if kind in model.peft_config:
                model.delete_adapter(kind)
            model.add_weighted_adapter(["first", "second"], list(WEIGHTS), kind, combination_type=kind, **more)

        with torch.no_grad():
            taken = seconds(work, dense_repeat if "svd" in kind else repeat)
            note(f"PEFT {kind}", taken, None if "ties" in kind else layer.get_delta_weight(kind))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description="Merge two adapters, beside PEFT, in one run.")
    parser.add_argument("--layers", type=int, default=32, help="layers of 7 modules each; 32 are 224 modules")
    parser.add_argument("--repeat", type=int, default=5, help="timed runs, of which the median is told")
    parser.add_argument("--dense-repeat", type=int, default=1, help="the same for PEFT's dense decompositions")
    arguments = parser.parse_args()
    import peft

    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        ours = whole(Path(folder), arguments.layers, arguments.repeat)
    module = one_module(arguments.dense_repeat, arguments.repeat)
    ratios = {
        "reduced against PEFT svd": module["PEFT svd"]["seconds"] / module["ours reduced"]["seconds"],
        "core-space ties against dense ties": module["PEFT ties_svd"]["seconds"]
        / module["ours ties in core space"]["seconds"],
        "error of PEFT linear against ours": module["PEFT linear"]["relative_error"]
        / module["ours exact"]["relative_error"],
    }
    document = {
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, load {load:.2f}",
        "versions": {"torch": torch.__version__, "peft": peft.__version__, "python": platform.python_version()},
        "workload": f"2 float16 adapters, {7 * arguments.layers} 7B-shaped modules, rank {RANK}; one {SIZE}^2 module",
        "whole": ours,
        "one_module": module,
        "ratios": ratios,
    }
    print(json.dumps(document))


if __name__ == "__main__":
    main()
