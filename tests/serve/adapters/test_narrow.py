"""Adapters whose files are in 16 bits are kept in 16 bits, and answer as if they had been kept in float32."""

import pytest
import torch

from adapterhub_local.base.bases import read_record
from adapterhub_local.base.load import load_base
from adapterhub_local.lora.adapter import open_adapter
from adapterhub_local.registry import Registry
from serve.adapters.mixture import mixture
from serve.engine.build import build_engine
from serve.engine.engine import Engine
from serve.engine.options import EngineOptions
from tests.serve.adapter_makers import publish
from tests.serve.adapters.test_mix import answer

KINDS = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture
def engine(built_base) -> Engine:
    """An engine in float32 that has seen no adapter."""
    return build_engine(load_base(read_record(built_base), device="cpu"), EngineOptions(max_rows=8))


@pytest.mark.parametrize("scaling", [2.0, 0.5, 1 / 3, 3.0])
@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_factors_are_the_files(dtype: torch.dtype, scaling: float, engine: Engine, built_base, home) -> None:
    """A as it is, B times the scaling in float32, both exactly: in 16 bits wherever these hold them."""
    version = publish(Registry(home), "one", read_record(built_base), seed=1, dtype=dtype, alpha=8 * scaling)
    found = engine.pool.reader.read(version)
    for module, delta in open_adapter(version.path).deltas():
        a, b = found[module]
        assert torch.equal(a.float(), delta.A.T.float())
        assert torch.equal(b.float(), delta.B.T.float() * delta.scaling)
        assert a.dtype == dtype
        if scaling in (2.0, 0.5) and dtype == torch.bfloat16:
            assert b.dtype == dtype
        if scaling in (1 / 3, 3.0):  # more digits than 16 bits have
            assert b.dtype == torch.float32


@pytest.mark.parametrize("dtype", KINDS[:2], ids=str)
def test_half_the_memory_and_the_same_answers(dtype: torch.dtype, engine: Engine, built_base, home) -> None:
    """The same numbers in a file of 16 bits and in one of float32: alone, and in a mix with another kind."""
    registry, base = Registry(home), read_record(built_base)
    narrow = publish(registry, "narrow", base, seed=1, dtype=dtype)
    wide = publish(registry, "wide", base, seed=1, dtype=dtype, held=torch.float32)
    other = publish(registry, "other", base, seed=2, dtype=KINDS[dtype == torch.bfloat16])
    sizes = {}
    for version in (narrow, wide):
        engine.pool.acquire(version)
        sizes[version.name] = next(
            each.num_bytes for each in engine.pool.records.all() if each.digest == version.content_digest
        )
    assert sizes["narrow"] * 2 == sizes["wide"]
    mixes = [mixture([(each, 0.75), (other, -0.5)]) for each in (narrow, wide)]
    alone, same, base_alone = answer(engine, narrow, wide, None)
    assert alone == same
    assert alone != base_alone
    (tokens, logprobs), (wanted, expected) = answer(engine, *mixes)
    assert tokens == wanted
    assert logprobs == pytest.approx(expected, abs=1e-4)  # parts are added up in the order of their digests
    assert logprobs != pytest.approx(alone[1], abs=1e-4)
