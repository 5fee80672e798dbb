"""What is here, what is missing and what is slow, each with its fix. Looks at files and versions; loads no torch."""

import platform
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path

from adapterhub_local.base.bases import list_bases
from adapterhub_local.durable import may_write
from adapterhub_local.errors import QhubError
from adapterhub_local.machine import usable_cores
from adapterhub_local.registry import Registry
from adapterhub_local.registry.config import read_config
from adapterhub_local.registry.hooks.state import read_state
from adapterhub_local.registry.mounts import check_local
from adapterhub_local.registry.quota import measure
from adapterhub_local.registry.report import state_problems
from adapterhub_local.settings import Home, device, trusted_keys
from adapterhub_local.sizes import write_size

STATES = ("ok", "slow", "missing", "broken")
EXTRAS = {  # extra -> a module that it brings, and what for
    "sign": ("model_signing", "signatures"),
    "s3": ("s3fs", "remotes at s3:// URLs"),
    "redis": ("redis", "limits that several servers share"),
    "otel": ("opentelemetry.sdk", "traces of requests"),
    "ray": ("ray", "`qhub cluster`"),
    "parquet": ("pyarrow", "data in Parquet and Arrow files"),
    "tune": ("optuna", "samplers of `qhub tune-merge`"),
    "plot": ("PIL", "curves as PNG"),
    "gpu": ("liger_kernel", "Liger's kernels for training on a GPU"),
    "lm-eval": ("lm_eval", "tasks of lm-evaluation-harness"),
    "llama-cpp": ("xllamacpp", "tests of what is exported for llama.cpp"),
}
LITTLE_ROOM, LITTLE_MEMORY = 5_000_000_000, 4_000_000_000  # bytes


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at, and what fixes it; `state` is ok, slow, missing (what is optional) or broken."""

    about: str
    state: str
    what: str
    fix: str | None = None


def examine(home: Home) -> list[Finding]:
    """Everything that can be seen in a moment. A check that cannot be made is a finding, not an error."""
    found: list[Finding] = []
    for about, check in CHECKS.items():
        try:
            found += check(home)
        except (QhubError, OSError) as error:
            found.append(Finding(about, "broken", str(error)))
    return found


def _python(home: Home) -> Iterator[Finding]:
    yield Finding("python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    own = _version("adapterhub-local")
    if own is None:
        yield Finding("qhub", "broken", "is run from a folder that is not installed", "pip install .")
    else:
        yield Finding("qhub", "ok", own)


def _packages(home: Home) -> Iterator[Finding]:
    needed = [line for line in requires("adapterhub-local") or () if "extra ==" not in line] if _version(
        "adapterhub-local") else []  # fmt: skip
    names = [_name_of(line) for line in needed]
    if gone := [name for name in names if _version(name) is None]:
        yield Finding("packages", "broken", f"not installed: {', '.join(gone)}", f"pip install {' '.join(gone)}")
    shown = [
        f"{name} {found}" for name in ("torch", "transformers", "peft", "bitsandbytes") if (found := _version(name))
    ]
    if shown:
        yield Finding("packages", "ok", ", ".join(shown))


def _extras(home: Home) -> Iterator[Finding]:
    for extra, (module, purpose) in EXTRAS.items():
        if _has(module):
            yield Finding(f"extra {extra}", "ok", purpose)
        else:
            yield Finding(f"extra {extra}", "missing", f"no {purpose}", f"pip install 'adapterhub-local[{extra}]'")


def _has(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package around it
        return False


def _gpu(home: Home) -> Iterator[Finding]:
    wanted, torch = device(), _version("torch") or ""
    cards = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    names = [line.split(":", 1)[1].strip() for card in cards for line in card.read_text(errors="replace").splitlines()
             if line.startswith("Model:")]  # fmt: skip
    if not names:
        is_asked = wanted == "cuda"
        yield Finding("gpu", "broken" if is_asked else "missing", "no NVIDIA GPU is seen, so the CPU computes",
                      "unset QHUB_DEVICE" if is_asked else None)  # fmt: skip
    elif "+cpu" in torch:
        yield Finding("gpu", "slow", f"{names[0]} is there, and torch {torch} is built for CPUs only",
                      "install torch from https://pytorch.org for CUDA")  # fmt: skip
    elif wanted == "cpu":
        yield Finding("gpu", "slow", f"{names[0]} is there, and QHUB_DEVICE=cpu leaves it", "unset QHUB_DEVICE")
    else:
        yield Finding("gpu", "ok", ", ".join(names))


def _processor(home: Home) -> Iterator[Finding]:
    flags = ""
    for line in _lines("/proc/cpuinfo"):
        if line.startswith(("flags", "Features")):
            flags = f" {line.partition(':')[2]} "
            break
    cores = len(usable_cores())
    widest = next((name for name in ("avx512f", "avx2", "asimd") if f" {name} " in flags), None)
    if flags and widest is None:
        yield Finding("processor", "slow", f"{cores} cores without AVX2: products take several times as long")
    else:
        yield Finding("processor", "ok", f"{cores} cores{f' with {widest}' if widest else ''}")
    free = next(
        (int(line.split()[1]) * 1024 for line in _lines("/proc/meminfo") if line.startswith("MemAvailable")), None
    )
    if free is not None and free < LITTLE_MEMORY:
        yield Finding(
            "memory", "slow", f"{free:,} bytes are free: only small bases fit", "`qhub plan` estimates what a run takes"
        )
    elif free is not None:
        yield Finding("memory", "ok", f"{free / 1e9:.1f} GB are free")


def _home(home: Home) -> Iterator[Finding]:
    if not home.root.is_dir():
        yield Finding("home", "missing", f"{home.root} is not there yet", "the first command that writes creates it")
        return
    check_local(home.root)
    if not may_write(home.root):
        yield Finding("home", "slow", f"{home.root} is not writable: only commands that read work", "set QHUB_HOME")
    problems = list(state_problems(home))
    for problem in problems[:5]:
        yield Finding("registry", "broken", f"{problem.subject}: {problem.message}", "qhub fsck --repair")
    if not problems:
        registry = Registry(home)
        count = len(registry.versions())
        yield Finding("registry", "ok", f"{count} version{'' if count == 1 else 's'} in {home.root}")
    trusted_keys()
    free = shutil.disk_usage(home.root).free
    if free < LITTLE_ROOM:
        yield Finding(
            "disk", "slow", f"{free / 1e9:.1f} GB are free at {home.root}", "qhub gc --keep 5 --apply; qhub runs rm"
        )
    else:
        yield Finding("disk", "ok", f"{free / 1e9:.1f} GB are free")


def _config(home: Home) -> Iterator[Finding]:
    config = read_config(home)
    if config.max_bytes is not None:
        used = sum(measure(home).values())
        is_full = used > 0.9 * config.max_bytes
        yield Finding("quota", "slow" if is_full else "ok", f"{used:,} bytes of {write_size(config.max_bytes)} used",
                      "qhub gc --keep 5 --apply" if is_full else None)  # fmt: skip
    for hook in config.hooks:
        state = read_state(home, hook.name)
        if state is not None and state.failed:
            error = next(iter(state.failed.values())).error
            yield Finding(f"hook {hook.name}", "broken", f"{len(state.failed)} changes were given up: {error}",
                          f"qhub hook deliver {hook.name} --failed")  # fmt: skip
        else:
            waiting = len(state.waiting) if state is not None else 0
            yield Finding(
                f"hook {hook.name}", "ok", f"{waiting} changes wait" if waiting else "has been notified of everything"
            )


def _bases(home: Home) -> Iterator[Finding]:
    bases = list_bases(home)
    if not bases:
        yield Finding(
            "base", "missing", "there is none yet", "qhub base add smollm2 HuggingFaceTB/SmolLM2-135M-Instruct"
        )
    for base in bases:
        gone = [name for name in ("config.json",) if not (base.folder / name).is_file()]
        weights = sum(path.stat().st_size for path in base.folder.glob("*.safetensors"))
        if gone or not weights:
            lacks = gone[0] if gone else "its weights"
            yield Finding(f"base {base.name}", "broken", f"{base.folder} lacks {lacks}",
                          f"qhub base rm {base.name}, then add it again")  # fmt: skip
        else:
            yield Finding(f"base {base.name}", "ok", f"{base.architecture}, {weights / 1e6:.0f} MB")


CHECKS: dict[str, Callable[[Home], Iterator[Finding]]] = {
    "python": _python,
    "packages": _packages,
    "extras": _extras,
    "gpu": _gpu,
    "processor": _processor,
    "home": _home,
    "config": _config,
    "base": _bases,
}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _name_of(requirement: str) -> str:
    end = next((place for place, letter in enumerate(requirement) if letter in " <>=!~;[("), len(requirement))
    return requirement[:end]


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(errors="replace").splitlines()
    except OSError:  # not Linux
        return []
