"""The examples run, and what they teach is so."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import get_4bit_type

from adapterhub_local.errors import QhubError
from examples.demo import demo_base
from examples.understand_qlora import (
    by_bitsandbytes,
    dequantise,
    double_quantise,
    find_matrix,
    fp4,
    int4,
    nf4,
    open_gguf,
    quantise,
    relative_error,
)

ROOT = Path(__file__).parent.parent


def test_understand_qlora(tiny_folder: Path) -> None:
    """The lesson runs on any 16-bit model, learns, leaves the base alone, and says when there is no such matrix."""
    command = [sys.executable, "-m", "examples.understand_qlora", "--model", str(tiny_folder), "--matrix", "down_proj"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    errors = [float(line.split()[-1].rstrip("%")) for line in done.stdout.splitlines() if line.startswith("  step")]

    assert done.returncode == 0, done.stderr
    assert "4.127 bits a weight instead of 4.5" in done.stdout
    assert "bit for bit: True" in done.stdout
    assert errors[-1] < errors[0] / 5
    with pytest.raises(QhubError, match="has 'nothing' in its name"):
        find_matrix(tiny_folder, "nothing")


def test_the_levels_are_those_of_bitsandbytes() -> None:
    """NormalFloat as the example derives it is the table that bitsandbytes has."""
    assert torch.allclose(nf4(), get_4bit_type("nf4", device="cpu"), atol=1e-6)


def test_nf4_loses_least_on_the_demo_base() -> None:
    """On the demo base's own weights NF4's error is below INT4's and FP4's, and is bitsandbytes' to rounding."""
    names, read = open_gguf(demo_base())
    assert len(names) == 7 * 30
    for name in [name for name in names if name.startswith(("blk.0.", "blk.14.", "blk.29."))]:
        weight = read(name)
        errors = {}
        for kind, levels in {"nf4": nf4(), "int4": int4(), "fp4": fp4()}.items():
            codes, absmax = quantise(weight, levels)
            errors[kind] = relative_error(weight, dequantise(codes, absmax, levels, weight.shape))
        codes, absmax = quantise(weight, nf4())
        ours = dequantise(codes, double_quantise(absmax), nf4(), weight.shape)

        assert errors["nf4"] < min(errors["int4"], errors["fp4"])
        assert relative_error(by_bitsandbytes(weight), ours) < 1e-5
