"""Kernels of CUDA C++, compiled by the NVRTC that torch carries: no CUDA toolkit is needed, and no header.

See https://docs.nvidia.com/cuda/nvrtc and, for the launch, cuLaunchKernel of the driver's API.
"""

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from serve.kernels.compiled import CannotCompile

Grid = tuple[int, int]


class Kernel:
    """A kernel on the GPU; what it is called with are tensors, as pointers, and numbers, as int."""

    def __init__(self, cubin: bytes, name: str) -> None:
        self._driver = _library(["libcuda.so.1"])
        self._module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        torch.empty(1, device="cuda")  # torch's context is the current one, from the first tensor on
        self._check(self._driver.cuModuleLoadData(ctypes.byref(self._module), cubin))
        self._check(self._driver.cuModuleGetFunction(ctypes.byref(self._function), self._module, name.encode()))

    def launch(self, grid: Grid, threads: int, *args: torch.Tensor | int) -> None:
        """Start it on torch's current stream. Raises RuntimeError."""
        values = [
            ctypes.c_void_p(each.data_ptr()) if isinstance(each, torch.Tensor) else ctypes.c_int(each) for each in args
        ]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(each) for each in values))
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        self._check(self._driver.cuLaunchKernel(self._function, *grid, 1, threads, 1, 1, 0, stream, pointers, None))

    def _check(self, result: int) -> None:
        if result:
            text = ctypes.c_char_p()
            self._driver.cuGetErrorString(result, ctypes.byref(text))
            raise RuntimeError(f"CUDA: {(text.value or b'unknown error').decode()} ({result})")


def compile_source(source: Path, capability: str, macros: dict[str, int]) -> bytes:
    """The machine code (cubin) of a source for GPUs of a capability, such as "90". Raises CannotCompile."""
    nvrtc = _nvrtc()
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    options = [f"--gpu-architecture=sm_{capability}", "--std=c++17", *(f"-D{key}={macros[key]}" for key in macros)]
    flags = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    if nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.read_bytes(), source.name.encode(), 0, None, None):
        raise CannotCompile("NVRTC takes no program")
    try:
        if nvrtc.nvrtcCompileProgram(program, len(options), flags):
            nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            nvrtc.nvrtcGetProgramLog(program, log)
            lines = log.value.decode(errors="replace").splitlines() or ["NVRTC gives no reason"]
            raise CannotCompile(next((line for line in lines if "error" in line), lines[0])[:200])
        nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
        cubin = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetCUBIN(program, cubin)
        return cubin.raw
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


@cache
def _nvrtc() -> Any:
    """NVRTC of the CUDA that torch was built for, from beside torch or from where the system's libraries are."""
    major = (torch.version.cuda or "").partition(".")[0]
    beside = Path(torch.__file__).parents[1] / "nvidia"
    found = sorted(map(str, beside.glob("*/lib/libnvrtc.so.[0-9]*")))
    return _library([*found, f"libnvrtc.so.{major}", "libnvrtc.so"])


def _library(names: Sequence[str]) -> Any:
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise CannotCompile(f"there is no {names[-1]}")
