"""What only a GPU can show, within a time: kernels compiled and run, graphs captured, answers with and without them,
a training run.

    python -m tests.gpu.check                 # at most 9 minutes; `make check-gpu`
    python -m tests.gpu.check --only engine --minutes 3

A process a part, since an error of the GPU lasts as long as its process; each has its bound, and all run, whatever
fails. Without a GPU, or without what a part needs, the part is skipped with its reason. Needs pytest and hypothesis
beside the project, no network, no compiler of CUDA; with pytest-xdist the parts that compile do so in parallel.
"""

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("torch", "triton", "transformers", "peft", "accelerate", "bitsandbytes", "numpy", "llguidance")
NO_GPU = "torch sees no CUDA GPU"
GRACE = 5  # seconds in which a part that is ended may say what it had


@dataclass(frozen=True)
class Part:
    """Tests that run together: at most `seconds`, which leaves time for the parts behind it."""

    name: str
    arguments: tuple[str, ...]
    seconds: int
    compiles: bool = False  # much, with Triton


PARTS = (
    Part("kernels", ("tests/gpu/test_kernels.py",), 130, compiles=True),
    Part("engine", ("tests/gpu/test_engine.py",), 130),
    Part("train", ("tests/gpu/test_attention.py", "tests/gpu/test_train.py"), 110),
    Part(
        "shapes",
        ("--noconftest", "tests/serve/kernels/test_kernels.py", "tests/serve/kernels/test_pointwise.py"),
        140,
        compiles=True,
    ),
)


def why_no_triton() -> str | None:
    """Why Triton cannot start a kernel here, or None: it compiles a launcher in C for each."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton starts kernels by way of a C compiler, and there is neither gcc nor clang, nor does CC name one"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        return "Triton starts kernels by way of Python.h, which is not there: Debian has it in python3-dev"
    return None


def facts() -> list[str]:
    """What the checks ran on: one line each."""
    import torch

    found = [f"python {platform.python_version()} on {os.cpu_count()} cores"]
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{name} {importlib.metadata.version(name)}")
    lines = [", ".join(found)]
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        one = torch.cuda.get_device_properties(index)
        lines.append(f"{one.name}, sm_{one.major}{one.minor}, {one.total_memory / 1e9:.1f} GB")
    return [*lines, f"no kernels of Triton: {reason}"] if (reason := why_no_triton()) else lines


def run(part: Part, seconds: float) -> tuple[str, str]:
    """passed, failed, or too long; and what pytest counted. What it prints goes to standard output as it comes."""
    command = [sys.executable, "-m", "pytest", "-rfEs", "--tb=short", "-o", "addopts=", "-p", "no:cacheprovider"]
    if part.compiles and importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(min(8, os.cpu_count() or 1))]
    with tempfile.TemporaryFile("w+") as printed:
        child = subprocess.Popen(
            [*command, *part.arguments], cwd=ROOT, stdout=printed, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = child.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
            with suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(child.pid, signal.SIGINT)  # for which pytest prints what it has
                child.wait(GRACE)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        printed.seek(0)
        text = printed.read()
    sys.stdout.write(text)
    counts = re.findall(r"^=*\s*(\d+ (?:passed|failed|skipped|errors?).*?)(?: in [\d.]+s.*)?$", text, re.M)
    result = f"took longer than {seconds:.0f} s" if code is None else "passed" if code == 0 else f"failed ({code})"
    return result, counts[-1].strip("= ") if counts else "no test ended"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts one after the other; 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9, help="that all may take")
    parser.add_argument("--only", action="append", choices=[part.name for part in PARTS], help="repeatable")
    chosen = parser.parse_args(arguments)
    end = time.monotonic() + 60 * chosen.minutes - 2 * GRACE
    import torch

    say(*facts())
    has_gpu, no_triton = torch.cuda.is_available(), why_no_triton()
    rows = []
    for part in PARTS:
        if chosen.only and part.name not in chosen.only:
            continue
        begun, left = time.monotonic(), end - time.monotonic()
        if not has_gpu:
            result = ("skipped", NO_GPU)
        elif part.compiles and no_triton:
            result = ("skipped", no_triton)
        elif left < GRACE:
            result = ("skipped", "no time was left")
        else:
            say(f"{part.name}: {' '.join(part.arguments)}")
            result = run(part, min(part.seconds, left))
        rows.append((part.name, f"{time.monotonic() - begun:.0f} s", *result))
    say(*("  ".join(each.ljust(width) for each, width in zip(row, (8, 6, 8, 0), strict=True)) for row in rows))
    return int(any(row[2] not in ("passed", "skipped") for row in rows))


def say(*lines: str) -> None:
    """Print lines now, before a part's own."""
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
