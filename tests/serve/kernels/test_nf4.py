"""The CUDA C++ product with 4-bit weights: its source, run on the CPU lane by lane, computes what plain torch does."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from serve.kernels import nf4, reference
from serve.kernels.nf4 import VARIANTS, macros

HERE = Path(__file__).parent
MAIN = """
#include "cuda_on_cpu.h"
#include "nf4.cu"
extern "C" void run(int x_grid, int y_grid, const u16 *x, const unsigned char *packed, const float *absmax,
                    const float *code, u16 *out, int x_stride, int tokens, int in_features, int out_features) {
  launch(x_grid, y_grid, [=] { multiply(x, packed, absmax, code, out, x_stride, tokens, in_features, out_features); });
}
"""


@pytest.fixture(scope="module", params=[(8, torch.bfloat16), (16, torch.float16), (64, torch.bfloat16)], ids=str)
def product(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """(x, packed, absmax, code, out_features, grid) -> out by a variant of the source; that variant's tokens; dtype."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed, which compiles the CUDA source for the CPU")
    most, dtype = request.param
    folder = tmp_path_factory.mktemp("nf4")
    (folder / "main.cpp").write_text(MAIN)
    defined = [f"-D{name}={value}" for name, value in macros(VARIANTS[most], dtype).items()]
    command = [compiler, "-std=c++20", "-O1", "-fPIC", "-shared", "-pthread", "-w", *defined]
    found = [f"-I{HERE}", f"-I{nf4.SOURCE.parent}", str(folder / "main.cpp"), "-o", str(folder / "nf4.so")]
    done = subprocess.run([*command, *found], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[:2000]
    library = ctypes.CDLL(str(folder / "nf4.so"))

    def multiply(x, packed, absmax, code, out_features: int, grid: tuple[int, int]) -> torch.Tensor:
        out = torch.full((len(x), out_features), float("nan"), dtype=dtype)
        pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (x, packed, absmax, code, out)]
        library.run(*grid, *pointers, x.stride(0), *x.shape, out_features)
        return out

    return multiply, most, dtype


@pytest.mark.parametrize(("blocks", "out_features"), [(3, 40), (10, 17)])
def test_source_on_the_cpu(product, blocks: int, out_features: int) -> None:
    """Fewer blocks than warps and more, outputs and tokens that fill no tile, more tokens than a program takes, and
    rows that lie apart: the reference's results, every one written, whoever else is in the batch."""
    multiply, most, dtype = product
    torch.manual_seed(blocks)
    packed = torch.randint(256, (out_features * blocks * 32,), dtype=torch.uint8)
    absmax, code = torch.rand(out_features * blocks) + 0.5, torch.linspace(-1, 1, 16)
    rows = torch.randn(most + 3, blocks * 64 + 8).to(dtype)[:, : blocks * 64]
    alone = multiply(rows[:1], packed, absmax, code, out_features, (1, 1))
    for tokens in (1, most - 1, most + 3):
        x = rows[:tokens]
        got = multiply(x, packed, absmax, code, out_features, (2, -(-tokens // most)))
        wanted = reference.multiply(x.float(), packed, absmax, code, out_features)
        torch.testing.assert_close(got.float(), wanted, rtol=0, atol=1e-2 * float(wanted.abs().max()))
        assert torch.equal(alone[0], got[0])


def test_what_it_needs() -> None:
    """Where it cannot be used there is a reason: the device, the dtype."""
    assert "NVIDIA" in (nf4.why_not(torch.device("cpu"), torch.bfloat16) or "")
    if torch.cuda.is_available():
        assert "16 bits" in (nf4.why_not(torch.device("cuda"), torch.float32) or "")
