"""Steps in bfloat16: as near to the model in float32 as the model's own bfloat16 is, whatever the batch."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from adapterhub_local.cores import Cores
from serve.engine.build import build_engine
from serve.engine.engine import Engine
from serve.engine.options import EngineOptions
from serve.engine.request import Scheduled
from tests.serve.engine.forwards import fill, plain
from tests.serve.engine.test_architectures import CONFIGS, nf4_base
from tests.serve.engine.test_fused import LONG, RANKS, ROWS, factors

Engines = tuple[Engine, Engine]  # of one base: in float32, and in bfloat16


@pytest.fixture(scope="module", params=("llama", "qwen2", "qwen3"))
def engines(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Engines:
    """The same weights and adapters, all of which bfloat16 holds, in both."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        config = CONFIGS[request.param]
        config = type(config)(**{**config.to_dict(), "max_position_embeddings": 1024})
        base = nf4_base(config, request.param, tmp_path_factory.mktemp("base"))
        round_to(base.model, dtype)
        engine = build_engine(base, EngineOptions(max_rows=8, max_length=1024))
        for rank in RANKS:
            for number in range(2):
                made = factors(engine, rank, number)
                rounded = {name: tuple(each.bfloat16().to(dtype) for each in pair) for name, pair in made.items()}
                engine.slots.put(f"{rank}-{number}", rounded, set())
        found.append(engine)
    return found[0], found[1]


def round_to(model: Any, dtype: torch.dtype) -> None:
    """Have all that is not in 4 bits be what bfloat16 holds of it, in `dtype`, and layers compute in that."""
    for parameter in model.parameters():
        if parameter.dtype.is_floating_point:
            parameter.data = parameter.data.bfloat16().to(dtype)
    for module in model.modules():
        if hasattr(module, "compute_dtype"):
            module.compute_dtype = module.weight.quant_state.dtype = dtype


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=ROWS)
def test_a_step_is_as_near_as_the_model(engines: Engines, rows: list[tuple[int, int, str | None]]) -> None:
    """Any batch: logits, keys and values differ from float32's by what the model's own do, or thrice that at most."""
    exact, narrow = engines
    assert narrow.runner.fused is not None
    logits, caches = [], []
    for engine, step in ((exact, False), (narrow, False), (narrow, True)):
        batch = sorted(fill(engine, rows), key=lambda item: str(item.request.adapter))
        slots = engine.slots.find({item.request.adapter for item in batch if item.request.adapter})
        logits.append(engine.runner.forward(batch, slots) if step else plain(engine, batch, slots))
        pairs = [torch.cat(engine.runner.cache.pair(layer, 0, 0)).float() for layer in range(2)]
        caches.append(torch.stack([each.clone() for each in pairs]))
    for wanted, own, got in (logits, caches):
        assert float((got - wanted).norm()) <= max(3 * float((own - wanted).norm()), 1e-2 * float(wanted.norm()))


def test_neither_threads_nor_neighbours_change_a_bit_of_it(engines: Engines) -> None:
    """A token has the same logits, bit for bit, alone and beside others, whatever the number of threads."""
    engine = engines[1]
    fused = engine.runner.fused
    assert fused is not None
    batch = fill(engine, [(40, 1, "3-0"), (16, 1, "3-0"), (LONG, 1, None), *[(15, 1, None)] * 6])
    slots = engine.slots.find({"3-0"})
    found = []
    for threads in (1, 2, 3):
        fused.cores = Cores(threads, use=lambda: None)
        found.append(engine.runner.forward(batch, slots))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    for number, item in enumerate(batch):
        assert torch.equal(engine.runner.forward([item], slots)[0], found[0][number]), number


def test_the_step_and_the_model_share_a_cache(tmp_path: Path) -> None:
    """Whichever of them writes first: pages are of the model's dtype, and the other goes on from them."""
    for is_first in (True, False):
        base = nf4_base(deepcopy(CONFIGS["llama"]), "llama", tmp_path)
        round_to(base.model, torch.bfloat16)
        engine = build_engine(base, EngineOptions(max_rows=4, max_length=64))
        assert engine.runner.fused is not None
        (item,) = fill(engine, [(0, 20, None)])
        found = []
        for start, is_step in ((0, is_first), (19, not is_first)):
            part = [Scheduled(item.request, start, 19 if start == 0 else 1)]
            found.append(engine.runner.forward(part, {}) if is_step else plain(engine, part, {}))
        assert engine.runner.cache.pair(0, 0, 0)[0].dtype == torch.bfloat16
        whole = engine.runner.forward([Scheduled(item.request, 0, 20)], {})
        assert float((found[1] - whole).norm()) <= 5e-2 * float(whole.norm())


def test_nan_stays_nan(tmp_path: Path) -> None:
    """An adapter that overflows gives NaN or infinity in its row's logits, which the engine sees; no other row does."""
    base = nf4_base(deepcopy(CONFIGS["llama"]), "llama", tmp_path)
    round_to(base.model, torch.bfloat16)
    engine = build_engine(base, EngineOptions(max_rows=4, max_length=64))
    assert engine.runner.fused is not None
    made = {name: tuple(each.bfloat16() * 3e38 for each in pair) for name, pair in factors(engine, 3, 0).items()}
    engine.slots.put("3-0", made, set())
    batch = fill(engine, [(0, 5, None), (0, 5, None)])
    batch[1].request.adapter = "3-0"
    logits = engine.runner.forward(batch, engine.slots.find({"3-0"}))
    assert torch.isfinite(logits[0]).all()
    assert not torch.isfinite(logits[1]).all()
