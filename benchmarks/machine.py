"""What a figure was measured on, a child process with its time and peak memory, and the cases of a GPU's benchmark."""

import argparse
import gc
import json
import os
import platform
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def machine() -> dict[str, Any]:
    """Processor, cores, memory and the versions that matter."""
    import torch

    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")]
    packages = ("torch", "transformers", "peft", "bitsandbytes", "safetensors")
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in packages},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # a copy without its metadata
        return None


def peak_memory_mb() -> float:
    """The largest resident size of this process so far."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000, 1)


def child(script: str, *arguments: str) -> dict[str, Any]:
    """Run `python script arguments` and return the JSON of its last line; what it says goes to standard error."""
    done = subprocess.run([sys.executable, script, *arguments], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


class Meter:
    """Peak memory and time, on either kind of device."""

    def __init__(self, device: str) -> None:
        self.device = device

    def reset(self) -> None:
        import torch

        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> dict[str, float]:
        import torch

        if self.device != "cuda":
            return {"resident_gib": round(peak_memory_mb() * 1e6 / 2**30, 3)}
        allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        return {"allocated_gib": round(allocated / 2**30, 3), "reserved_gib": round(reserved / 2**30, 3)}

    def now(self) -> float:
        import torch

        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def kernel_times(step: Callable[[], object], steps: int, most: int = 24) -> dict[str, Any]:
    """Of one step on a GPU, the mean of `steps`: milliseconds on the clock, of the GPU's kernels, and of the costliest
    of them with how often they ran."""
    import torch

    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    torch.cuda.synchronize()
    clock = 1e3 * (time.perf_counter() - start) / steps
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    rows = [
        (each.self_device_time_total / 1e3 / steps, each.count / steps, each.key) for each in profile.key_averages()
    ]
    rows = sorted((row for row in rows if row[0] > 0), reverse=True)
    return {
        "clock": round(clock, 3),
        "kernels": round(sum(row[0] for row in rows), 3),
        "launches": round(sum(row[1] for row in rows)),
        "costliest": [[name[:80], round(times), round(took, 4)] for took, times, name in rows[:most]],
    }


def run_cases(
    module: str,
    cases: Sequence[Any],
    measure: Callable[[Any, str, bool], dict[str, Any]],
    summary: Callable[[list[dict[str, Any]]], dict[str, Any]],
    description: str | None,
) -> None:
    """The command line of a benchmark for a GPU: `cases`, which have a name each, in processes of their own.

    Each is told on standard error as it ends, and the whole document is written to `--out` after each: what is killed
    keeps what it had. A case that fails or takes too long is noted, with the last line of JSON that it printed.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, in this process, kernels interpreted")
    parser.add_argument("--only", action="append", help="run the cases whose name begins so; repeatable, in this order")
    parser.add_argument("--seconds", type=float, default=240, help="that one case may take")
    parser.add_argument("--minutes", type=float, default=1e6, help="that all may take; what is left then is left out")
    parser.add_argument("--out", type=Path, help="a file for the document, written after every case")
    parser.add_argument("--case", help="one measurement, for the parent process")
    chosen = parser.parse_args()
    if chosen.device == "cpu":
        if not chosen.tiny:
            parser.error("these shapes are for a GPU: add --tiny")
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    import torch

    if chosen.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU: --device cpu --tiny runs the same code on tiny shapes")
    if chosen.case:
        case = next(case for case in cases if case.name == chosen.case)
        print(json.dumps(measure(case, chosen.device, chosen.tiny)), flush=True)
        return
    wanted = [case for only in chosen.only or [""] for case in cases if case.name.startswith(only)]
    if not wanted:
        parser.error(f"no case begins so; there are {', '.join(case.name for case in cases)}")
    end = time.monotonic() + 60 * chosen.minutes
    results: list[dict[str, Any]] = []
    for case in dict.fromkeys(wanted):
        begun, left = time.monotonic(), end - time.monotonic()
        if left < 10:
            result: dict[str, Any] = {"case": case.name, "left_out": "no time was left"}
        elif chosen.tiny:
            result = measure(case, chosen.device, True)
        else:
            arguments = [sys.executable, "-m", module, "--case", case.name, "--device", chosen.device]
            result = {"case": case.name, **_timed(arguments, min(chosen.seconds, left))}
        results.append({**result, "took_seconds": round(time.monotonic() - begun, 1)})
        print(json.dumps(results[-1]), file=sys.stderr, flush=True)
        document = json.dumps({"machine": machine(), **summary(results), "cases": results})
        if chosen.out:
            staged = chosen.out.with_name(f"{chosen.out.name}.new")
            staged.write_text(document)
            staged.replace(chosen.out)
    print(document)


def say(result: dict[str, Any]) -> None:
    """What is known so far, for the parent process, should this one not come to its end."""
    print(json.dumps(result), flush=True)


def _timed(command: Sequence[str], seconds: float) -> dict[str, Any]:
    """The last line of JSON that a command prints, and why it did not end well if it did not."""
    with tempfile.TemporaryFile("w+") as printed:
        child = subprocess.Popen(command, stdout=printed, start_new_session=True)
        try:
            code = child.wait(seconds)
            failed = f"exit code {code}" if code else None
        except subprocess.TimeoutExpired:
            failed = f"took longer than {seconds:.0f} s"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        printed.seek(0)
        lines = [line for line in printed if line.startswith("{")]
    found: dict[str, Any] = {}
    for line in reversed(lines):
        with suppress(ValueError):  # of a line that was not finished
            found = json.loads(line)
            break
    return {**found, "failed": failed} if failed else found
