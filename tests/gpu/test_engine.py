"""On a GPU: kernels and graphs in the engine answer as plain torch does."""

from pathlib import Path

import pytest
import torch

from adapterhub_local.base.bases import read_record
from adapterhub_local.base.load import load_base
from adapterhub_local.registry import Registry
from serve.engine.build import build_engine
from serve.engine.options import EngineOptions
from tests.gpu.check import NO_GPU, why_no_triton
from tests.serve.adapter_makers import served_registry
from tests.serve.engine.test_graphs import ADAPTERS, answers

__all__ = ["served_registry"]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_GPU),
    pytest.mark.skipif(why_no_triton() is not None, reason=why_no_triton() or ""),
]


def test_the_engine_answers_the_same(built_base: Path, served_registry: Registry) -> None:
    """Kernels alone and with graphs, in float32: the tokens of plain torch, for mixed adapters and for none."""
    answered = []
    for options in (
        EngineOptions(kernels="torch", cuda_graphs=False),
        EngineOptions(kernels="auto", cuda_graphs=False),
        EngineOptions(kernels="auto"),
    ):
        base = load_base(read_record(built_base), device="cuda", dtype=torch.float32)
        engine = build_engine(base, options)
        mixed = answers(engine, served_registry, ADAPTERS, tokens=48)
        alone = answers(engine, served_registry, [None] * 5, tokens=48)
        answered.append((mixed, alone))
        if options.kernels == "auto":
            assert engine.runner.context.kernels is not None
    assert engine.runner.graphs is not None
    assert engine.runner.graphs.reason is None
    assert len(engine.runner.graphs) >= 2  # with adapters and without
    assert answered[1] == answered[0]
    assert answered[2] == answered[0]
