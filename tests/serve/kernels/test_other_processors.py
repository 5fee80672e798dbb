"""Steps compiled for other processors than this one: AVX2, and ARM's NEON under an emulator, give the same logits."""

import itertools
import math
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from serve.kernels.compiled import FLAGS, FOLDER, CannotCompile, find_compiler
from serve.kernels.cpu import BF16, FOUR_BIT, FP16, FP32
from tests.patience import PATIENCE

pytestmark = pytest.mark.slow
ARM = "aarch64-linux-gnu-gcc", "qemu-aarch64"
HARNESS = Path(__file__).with_name("one_step.c")
# of what is held, layers, head: each kind of weight once; then tokens, the longest sequence, a rank, and all else
CASES = {
    "one token": (FP32, FOUR_BIT, FOUR_BIT, 1, 30, 4, 0),
    "a few, biases, norms, window and cap": (FP32, FOUR_BIT, BF16, 5, 700, 3, 1),
    "layers in 16 bits": (FP32, BF16, FP16, 7, 100, 16, 0),
    "layers in half precision": (FP32, FP16, FP32, 2, 20, 8, 1),
    "layers in float32": (FP32, FP32, BF16, 3, 50, 1, 0),
    "many": (FP32, FOUR_BIT, FP16, 33, 600, 8, 1),
    "keys and values in bfloat16": (BF16, FOUR_BIT, BF16, 16, 200, 8, 0),
}


def compiled(folder: Path, name: str, compiler: list[str], *options: str) -> Path:
    """The harness as a program."""
    path = folder / name
    flags = ["-O1", *(each for each in FLAGS if each not in ("-O3", "-march=native"))]  # a third of the time
    sources = [HARNESS, FOLDER / "cpu.c", FOLDER / "attention.c"]
    command = [*compiler, *flags, *options, f"-I{FOLDER}", *map(str, sources), "-lm", "-o", str(path)]
    subprocess.run(command, check=True, capture_output=True, timeout=PATIENCE)
    return path


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What runs the harness on each processor that can be had here."""
    folder = tmp_path_factory.mktemp("programs")
    try:
        compiler = find_compiler()
    except CannotCompile as error:
        pytest.skip(f"the kernels cannot be compiled: {error}")
    wanted: dict[str, tuple[list[str], list[str], list[str]]] = {"here": (compiler, ["-march=native"], [])}
    flags = Path("/proc/cpuinfo").read_text() if platform.machine() == "x86_64" else ""
    if " avx2 " in flags:
        wanted["avx2"] = (compiler, ["-march=x86-64-v3"], [])
    if all(map(shutil.which, ARM)):
        wanted["neon"] = ([ARM[0]], ["-static"], [ARM[1]])
    with ThreadPoolExecutor(len(wanted)) as pool:
        made = {name: pool.submit(compiled, folder, name, *each[:1], *each[1]) for name, each in wanted.items()}
    return {name: [*wanted[name][2], str(each.result())] for name, each in made.items()}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("processor", ["avx2", "neon"])
def test_same_logits(processor: str, case: str, programs: dict[str, list[str]]) -> None:
    """float32 to the last digits; where this processor multiplies in bfloat16 and the other does not, nearly."""
    if processor not in programs:
        pytest.skip("this processor has no AVX2" if processor == "avx2" else f"{' and '.join(ARM)} are not both here")
    found, wanted = (logits(programs[name], CASES[case]) for name in (processor, "here"))
    assert len(found) == len(wanted) == 77 * CASES[case][3]
    norm = math.sqrt(sum(each**2 for each in wanted))
    assert norm > 1
    distance = math.sqrt(sum((a - b) ** 2 for a, b in zip(found, wanted, strict=True)))
    assert distance <= norm * (2e-6 if CASES[case][0] == FP32 else 1e-2)


def test_cases_differ(programs: dict[str, list[str]]) -> None:
    """Each case computes something of its own, with finite numbers."""
    first = [logits(programs["here"], case)[:77] for case in CASES.values()]
    assert all(all(map(math.isfinite, each)) for each in first)
    assert all(a != b for a, b in itertools.combinations(first, 2))


def logits(program: list[str], case: tuple[int, ...]) -> list[float]:
    done = subprocess.run(
        [*program, *map(str, case)], capture_output=True, text=True, check=True, timeout=PATIENCE
    )  # fmt: skip
    return [float(line) for line in done.stdout.split()]
