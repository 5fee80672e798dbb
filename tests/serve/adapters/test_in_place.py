"""Adapters that are served where they are kept: counted as they are, and in a slot only while they are there."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from adapterhub_local.base.bases import BaseInfo, read_record
from adapterhub_local.base.load import load_base
from adapterhub_local.registry import Registry
from serve.engine.build import build_engine
from serve.engine.engine import Engine
from serve.engine.options import EngineOptions
from serve.engine.request import Request, SamplingParams
from serve.kernels.arena import Arena
from serve.kernels.compiled import CannotCompile, find_compiler
from serve.lora.in_place import FactorsInPlace
from tests.serve.adapter_makers import publish

try:
    find_compiler()
except CannotCompile as error:
    pytest.skip(f"the kernels cannot be compiled: {error}", allow_module_level=True)


@pytest.fixture
def base(built_base: Path) -> BaseInfo:
    return read_record(built_base)


@pytest.fixture
def engine(base: BaseInfo) -> Engine:
    return build_engine(load_base(base, device="cpu"), EngineOptions(max_rows=4, max_adapters=4, max_length=64))


def test_who_leaves_while_a_slot_is_filled_takes_nothing_with_him(
    engine: Engine, base: BaseInfo, served_registry: Registry
) -> None:
    """A request that is given up just then, and another adapter that needs the memory: no slot of what is not there."""
    one, other = (publish(served_registry, name, base, seed=seed) for seed, name in enumerate(("one", "other")))
    digest = engine.acquire(one).digest
    engine.pool.max_bytes = engine.pool.num_bytes  # room for one
    put, seen = engine.slots.put, []

    def late(*given: object) -> object:
        engine.abort("r")
        with engine._lock:
            engine._reap()
        with pytest.raises(Exception, match="while other adapters are in use"):
            engine.acquire(other)
        seen.append(digest in engine.pool)
        return put(*given)

    engine.slots.put = late
    engine.submit(Request("r", (3, 4, 5), SamplingParams(max_tokens=4), digest))
    engine.loader.wait(20)
    assert seen == [True]
    assert digest in engine.slots
    second = engine.acquire(other).digest  # now its memory is free, and the slot goes with it
    assert second in engine.pool
    assert digest not in engine.slots
    assert digest not in engine.pool
    assert len(engine.slots) == 0


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_counted_is_what_is_held(engine: Engine, dtype: torch.dtype, dora: bool) -> None:
    """Every storage that an adapter keeps is its own memory, counted once."""
    reader = replace(engine.pool.reader, dtype=dtype)
    factors = {}
    for name, layer in engine.slots.layers.items():
        pair = torch.randn(layer.in_features, 8), torch.randn(8, layer.out_features)
        scale = (torch.rand(layer.out_features),) if dora else ()
        factors[name] = tuple(each.to(dtype) for each in (*pair, *scale))
    held = reader.placed(factors)
    assert isinstance(held, FactorsInPlace)
    tensors = [tensor for own in held.values() for tensor in own]
    tensors += [each for part in held.parts for each in (part.a, *part.bs, *part.scales) if each is not None]
    places = {tensor.data_ptr(): tensor.nbytes for tensor in tensors if tensor.is_contiguous()}
    assert sum(places.values()) == held.parts.nbytes


def test_more_than_was_expected_takes_no_more_than_it_is() -> None:
    """Tensors beyond what was mapped at first: what is mapped for them and never written is not resident."""
    half = torch.ones((512 << 10) + 64, dtype=torch.uint8)
    before = resident()
    arenas = [Arena(1 << 20, is_huge=False) for _ in range(40)]
    tensors = [arena.moved(half) for arena in arenas for _ in range(3)]
    assert resident() - before < 1.2 * sum(tensor.nbytes for tensor in tensors)


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
