"""Merging beside PEFT's `add_weighted_adapter` and mergekit: error, seconds, peak memory. The last line is JSON.

    python benchmarks/merge.py                       # 224 modules of a 7B model, rank 16, float16
    python benchmarks/merge.py --layers 4 --repeat 1 # a small machine, or a busy one
    python benchmarks/merge.py --mergekit FOLDER     # pip install --no-deps --target FOLDER mergekit immutables scipy

PEFT and mergekit work on one 4096 x 4096 module, for on 7B shapes their dense routes take half an hour; ours on
that module and on all of them. Errors are against the dense sum in float64. Threads are torch's default. mergekit
merges models: an adapter is folded into its base, the models are merged, and an adapter is extracted by dense SVD.
"""

import argparse
import contextlib
import json
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

RANK, WEIGHTS = 16, (0.7, 0.3)
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


class Memory:
    """The most resident memory of this process since this was made, and how much more that is, MB."""

    def __init__(self) -> None:
        with contextlib.suppress(OSError):  # Linux forgets the old peak when 5 is written here
            Path("/proc/self/clear_refs").write_text("5")
        self.before = self._status("VmRSS")

    def more(self) -> float:
        return round(self._status("VmHWM") - self.before, 1)

    def _status(self, key: str) -> float:
        if not Path("/proc/self/status").exists():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024 / 1e6


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
    from adapterhub_local.merge.merge import merge_to_path
    from adapterhub_local.merge.plan import make_plan
    from adapterhub_local.merge.rank_rule import RankRule
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

        memory, before = Memory(), time.process_time()
        taken = seconds(work, repeat)
        results[name] = {
            "seconds": taken,
            "cpu_seconds": (time.process_time() - before) / (repeat + (repeat > 1)),  # the same on a busy machine
            "modules": reports[-1].num_modules,
            "relative_error": reports[-1].relative_error,
            "truncation_error": reports[-1].truncation_error,
            "dtype": reports[-1].dtype,
            "peak_mb_more_than_before": memory.more(),
        }
        print(f"{name}: {results[name]}", flush=True)
    return results


def one_module(size: int, dense_repeat: int, repeat: int, mergekit: Path | None) -> dict[str, Any]:
    """One size x size module: ours beside PEFT's and mergekit's own code on the same factors."""
    from peft import LoraConfig, get_peft_model

    from adapterhub_local.lora.adapter import Delta
    from adapterhub_local.merge.algebra import weighted_sum
    from adapterhub_local.merge.entries import ties
    from adapterhub_local.merge.space import merge_in_core
    from adapterhub_local.merge.stack import Stack

    class Linear(torch.nn.Module):
        """A model of one layer, for PEFT to adapt."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(size, size, bias=False)

    generator = torch.Generator().manual_seed(0)
    deltas = [
        Delta(*(torch.randn(shape, generator=generator) / 64 for shape in ((RANK, size), (size, RANK))), 2.0)
        for _ in WEIGHTS
    ]
    truth = sum(w * d.scaling * (d.B.double() @ d.A.double()) for w, d in zip(WEIGHTS, deltas, strict=True))
    assert isinstance(truth, torch.Tensor)
    length = float(truth.norm())

    def error(matrix: torch.Tensor) -> float:
        return float((matrix.double() - truth).norm()) / length

    results: dict[str, Any] = {}

    def note(name: str, taken: float, matrix: torch.Tensor | None = None, **more: float) -> None:
        results[name] = {"seconds": taken, **({} if matrix is None else {"relative_error": error(matrix)}), **more}
        print(f"{name}: {results[name]}", flush=True)

    exact = weighted_sum(deltas, WEIGHTS)
    note("ours exact", seconds(lambda: weighted_sum(deltas, WEIGHTS), repeat), exact.dense())

    def reduced() -> Delta:
        stack = Stack.of(deltas).weighted(WEIGHTS)
        return stack.decompose(stack.grams(precise=True), RANK).truncate(RANK)

    memory = Memory()
    taken = seconds(reduced, repeat)
    note("ours reduced", taken, reduced().dense(), peak_mb=memory.more())
    parameters = {"density": 0.2, "scale": 1.0, "variant": "peft"}
    memory = Memory()
    core_seconds = seconds(lambda: merge_in_core(deltas, lambda stack: ties(stack, WEIGHTS, parameters, ())), repeat)
    note("ours ties in core space", core_seconds, peak_mb=memory.more())

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

        memory = Memory()
        with torch.no_grad():
            taken = seconds(work, dense_repeat if "svd" in kind else repeat)
            more = memory.more()
            note(f"PEFT {kind}", taken, None if "ties" in kind else layer.get_delta_weight(kind), peak_mb=more)
    if mergekit is not None:
        with_mergekit(mergekit, size, deltas, dense_repeat, note)
    return results


def with_mergekit(folder: Path, size: int, deltas: list, repeat: int, note: Callable[..., None]) -> None:
    """mergekit's own functions on the same module in float32: fold, merge models, extract to the rank."""
    sys.path.append(str(folder))
    try:
        from mergekit.merge_methods import registry
        from mergekit.merge_methods.base import TensorGroup
        from mergekit.scripts.extract_lora import TaskVectorDecompositionTask
    except ImportError as reason:
        print(f"mergekit is left out: {reason}", flush=True)
        return
    base = torch.randn(size, size, generator=torch.Generator().manual_seed(1)) * 0.02
    extract = TaskVectorDecompositionTask.model_construct(max_rank=RANK, distribute_scale=True, transpose=False)
    for method, weights, normalize in (("task_arithmetic", WEIGHTS, False), ("ties", (1.0, 1.0), True)):
        parameters = {"int8_mask": False, "normalize": normalize, "rescale": False, "lambda": 1.0}
        parameters |= {"weight": {1: weights[0], 2: weights[1]}, "density": {1: 0.2, 2: 0.2}}
        made: dict[str, Any] = {}

        def merge(method: str = method, parameters: dict = parameters, made: dict = made) -> None:
            models = [base, *(base + delta.dense() for delta in deltas)]
            group = TensorGroup.from_tensors(models, ids=(0, 1, 2), base_index=0)
            made["change"] = registry.get(method).merge_group(group, **parameters) - base

        def reduce(made: dict = made) -> None:
            made["A"], made["B"] = extract.execute(made["change"])

        is_sum = method == "task_arithmetic"
        memory = Memory()
        taken = seconds(merge, repeat)
        note(f"mergekit {method}", taken, made["change"] if is_sum else None, peak_mb=memory.more())
        memory = Memory()
        taken += seconds(reduce, repeat)
        note(f"mergekit {method}, extracted", taken, made["B"] @ made["A"] if is_sum else None, peak_mb=memory.more())


def main() -> None:
    parser = argparse.ArgumentParser(description="Merge two adapters, beside PEFT, in one run.")
    parser.add_argument("--layers", type=int, default=32, help="layers of 7 modules each; 32 are 224 modules")
    parser.add_argument("--repeat", type=int, default=5, help="timed runs, of which the median is reported")
    parser.add_argument("--dense-repeat", type=int, default=1, help="the same for PEFT's dense decompositions")
    parser.add_argument("--size", type=int, default=4096, help="of the one module that is merged by PEFT too")
    parser.add_argument("--mergekit", type=Path, help="folder where mergekit is installed")
    arguments = parser.parse_args()
    if arguments.mergekit is None:
        print("mergekit is left out: give --mergekit FOLDER, see the docstring", flush=True)
    import peft

    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        ours = whole(Path(folder), arguments.layers, arguments.repeat)
    module = one_module(arguments.size, arguments.dense_repeat, arguments.repeat, arguments.mergekit)
    ratios = {
        "reduced against PEFT svd": module["PEFT svd"]["seconds"] / module["ours reduced"]["seconds"],
        "core-space ties against dense ties": module["PEFT ties_svd"]["seconds"]
        / module["ours ties in core space"]["seconds"],
        "error of PEFT linear against ours": module["PEFT linear"]["relative_error"]
        / module["ours exact"]["relative_error"],
    }
    if "mergekit ties, extracted" in module:
        ratios["core-space ties against mergekit"] = (
            module["mergekit ties, extracted"]["seconds"] / module["ours ties in core space"]["seconds"]
        )
    document = {
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, load {load:.2f}",
        "versions": {
            "torch": torch.__version__,
            "peft": peft.__version__,
            "python": platform.python_version(),
            **({"mergekit": version("mergekit")} if "mergekit ties" in module else {}),
        },
        "workload": (
            f"2 float16 adapters, {7 * arguments.layers} 7B-shaped modules, rank {RANK}; "
            f"one {arguments.size} x {arguments.size} module"
        ),
        "whole": ours,
        "one_module": module,
        "ratios": ratios,
    }
    print(json.dumps(document))


if __name__ == "__main__":
    main()
