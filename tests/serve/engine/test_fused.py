"""Steps as one call of C: what the model gives, for every kind of model, batch and adapter that they take."""

import gc
import shutil
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

from adapterhub_local.base.bases import read_record
from adapterhub_local.base.load import load_base
from adapterhub_local.cores import Cores
from adapterhub_local.errors import Incompatible
from serve.engine.build import build_engine
from serve.engine.decoder import read_decoder
from serve.engine.engine import Engine
from serve.engine.fused import FEW_TOKENS, MAX_PLACES, MAX_TOKENS
from serve.engine.options import EngineOptions
from serve.engine.runner import _segments
from serve.kernels.compiled import CannotCompile, find_compiler
from serve.kernels.cpu import BF16, FP16, FP32
from serve.kernels.step import narrowest
from tests.serve.engine.forwards import fill, plain
from tests.serve.engine.test_architectures import CONFIGS, GROUPED, nf4_base

RANKS = (3, 8)
KINDS = ("llama", "mistral", "qwen2", "qwen3")
LONG = 600  # places of a row: more than one task of attention reads

try:
    find_compiler()
except CannotCompile as error:
    pytest.skip(f"the kernels cannot be compiled: {error}", allow_module_level=True)


@pytest.fixture(scope="module", params=KINDS)
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """An engine of each kind, with two adapters of each of two ranks; the second of a rank lacks half of the layers."""
    folder = tmp_path_factory.mktemp("base")
    config = type(CONFIGS[request.param])(**{**CONFIGS[request.param].to_dict(), "max_position_embeddings": 1024})
    engine = build_engine(nf4_base(config, request.param, folder), EngineOptions(max_rows=8, max_length=1024))
    for rank in RANKS:
        for number in range(2):
            engine.slots.put(f"{rank}-{number}", factors(engine, rank, number), set())
    return engine


def factors(engine: Engine, rank: int, number: int, *, dora: bool = False, head: bool = False) -> dict:
    generator = torch.Generator().manual_seed(10 * rank + number)
    found: dict = {}
    for place, (name, layer) in enumerate(engine.slots.layers.items()):
        if (name == "lm_head") != head and (head or name == "lm_head" or (number and place % 2)):
            continue
        a = torch.randn(layer.in_features, rank, generator=generator) / layer.in_features**0.5
        b = torch.randn(rank, layer.out_features, generator=generator) / 4
        found[name] = (a, b, torch.full((layer.out_features,), 0.5)) if dora else (a, b)
    return found


NAMES = st.sampled_from([None, *(f"{rank}-{number}" for rank in RANKS for number in range(2))])
ROWS = st.lists(st.tuples(st.sampled_from([0, 1, 15, 16, 40, LONG]), st.integers(1, 12), NAMES), min_size=1, max_size=5)
PROMPTS = st.lists(st.tuples(st.sampled_from([0, 16]), st.integers(1, 100), NAMES), min_size=1, max_size=2)


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.one_of(ROWS, PROMPTS))
def test_any_batch_gives_the_models_logits(engine: Engine, rows: list[tuple[int, int, str | None]]) -> None:
    """One token a row, several or a prompt, short and long, any mix of adapters: keys and values are the same too."""
    assert engine.runner.fused is not None
    batch = sorted(fill(engine, rows), key=lambda item: str(item.request.adapter))
    slots = engine.slots.find({item.request.adapter for item in batch if item.request.adapter})
    wanted = plain(engine, batch, slots)
    written = [torch.cat([each.clone() for each in engine.runner.cache.pair(layer, 0, 0)]) for layer in range(2)]
    calls: list[int] = []
    call = engine.runner.fused._call
    engine.runner.fused._call = lambda *given: (calls.append(1), call(*given))
    try:
        got = engine.runner.forward(batch, slots)
    finally:
        engine.runner.fused._call = call
    assert len(calls) == 1
    torch.testing.assert_close(got, wanted, atol=1e-4 * float(wanted.abs().max()), rtol=0)
    for layer, before in enumerate(written):
        now = torch.cat(engine.runner.cache.pair(layer, 0, 0))
        torch.testing.assert_close(now, before, atol=1e-4 * float(before.abs().max()), rtol=0)


def test_neither_threads_nor_neighbours_change_a_bit(engine: Engine) -> None:
    """A token has the same logits, bit for bit, alone and beside others, whatever the number of threads."""
    fused = engine.runner.fused
    assert fused is not None
    batch = fill(engine, [(40, 1, "3-0"), (16, 1, "3-0"), (LONG, 1, None), (15, 1, None)])
    slots = engine.slots.find({"3-0"})
    found = []
    for threads in (1, 2, 3):
        fused.cores = Cores(threads, use=lambda: None)
        found.append(engine.runner.forward(batch, slots))
    fused.cores = Cores(1, use=lambda: None)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    for number, item in enumerate(batch):
        alone = engine.runner.forward([item], slots)
        assert torch.equal(alone[0], found[0][number]), number


def test_it_stands_aside(engine: Engine) -> None:
    """Too many tokens, many with long contexts, an adapted output head: None, and the model computes."""
    fused, slots = engine.runner.fused, engine.slots
    assert fused is not None
    for row in ((0, MAX_TOKENS + 1, None), (MAX_PLACES, FEW_TOKENS + 1, None)):
        assert fused.forward(fill(engine, [row]), [], [0]) is None
    slots.put("head", factors(engine, 6, 0, head=True), set())
    one = fill(engine, [(3, 1, "head")])
    found = slots.find(["head"])
    torch.testing.assert_close(engine.runner.forward(one, found), plain(engine, one, found))
    slots.free("head")


@pytest.mark.parametrize("held", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_adapters_as_they_are_held(engine: Engine, held: torch.dtype, dora: bool) -> None:
    """With DoRA or without, in 32 bits or in either kind of 16, beside others: one call, the model's logits."""
    fused, slots = engine.runner.fused, engine.slots
    assert fused is not None
    own = factors(engine, 5, 0, dora=dora)
    slots.put("own", {name: (a.to(held), b.to(held), *scale) for name, (a, b, *scale) in own.items()}, {"3-0"})
    batch = fill(engine, [(3, 2, "3-0"), (16, 3, "own"), (0, 1, None), (40, 20, "own")])
    batch.sort(key=lambda item: str(item.request.adapter))
    found = slots.find(["3-0", "own"])
    wanted = plain(engine, batch, found)
    segments = _segments(batch, found, [item.num_tokens for item in batch])
    ends = [sum(item.num_tokens for item in batch[: number + 1]) - 1 for number in range(len(batch))]
    got = fused.forward(batch, segments, ends)
    slots.free("own")
    assert got is not None
    torch.testing.assert_close(got, wanted, atol=1e-4 * float(wanted.abs().max()), rtol=0)


def test_an_adapter_that_is_read_again_is_found_again(engine: Engine) -> None:
    """What C knows of an adapter goes with its memory: another at the same name is read where it is now."""
    logits = []
    for seed in (0, 7, 0):
        engine.slots.put("8-9", factors(engine, 8, seed), {"8-0", "8-1"})
        batch = fill(engine, [(16, 1, "8-9")])
        slots = engine.slots.find(["8-9"])
        logits.append(engine.runner.forward(batch, slots))
        torch.testing.assert_close(logits[-1], plain(engine, batch, slots), atol=1e-4, rtol=1e-4)
        engine.slots.free("8-9")
    assert torch.equal(logits[0], logits[2])
    assert not torch.allclose(logits[0], logits[1])
    del slots
    gc.collect()
    assert engine.runner.fused is not None
    assert len(engine.runner.fused._parts) <= 4  # of those that have a slot


@pytest.mark.parametrize("name", sorted(set(CONFIGS) - set(KINDS)))
def test_other_kinds_are_left_to_the_model(name: str, tmp_path: Path) -> None:
    """An architecture that the step does not compute is served without it."""
    engine = build_engine(nf4_base(deepcopy(CONFIGS[name]), name, tmp_path), EngineOptions(max_rows=2, max_length=64))
    assert engine.runner.fused is None
    with pytest.raises(Incompatible, match="not of a kind"):
        read_decoder(engine.runner.model, [None, None])


def test_inputs_that_are_not_whole_blocks(tmp_path: Path) -> None:
    """A hidden size of 96 is not a multiple of 64."""
    config = LlamaConfig(**{**GROUPED, "hidden_size": 96, "head_dim": 24})
    engine = build_engine(nf4_base(config, "odd", tmp_path), EngineOptions(max_rows=2, max_length=64))
    assert engine.runner.fused is None


@pytest.mark.parametrize(
    ("numbers", "kind"), [([1.0, -0.5], BF16), ([1 + 2**-9, 0.0], FP16), ([1 + 2**-20, 3e38], FP32)]
)
def test_as_few_bits_as_hold_a_weight(numbers: list[float], kind: int) -> None:
    """bfloat16 where it is exact, then half precision, else float32."""
    weight = torch.tensor(numbers)
    dtype, found = narrowest(weight)
    assert found == kind
    assert torch.equal(weight.to(dtype).float(), weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_output_head_as_it_was_saved(dtype: torch.dtype, tmp_path: Path) -> None:
    """A head whose numbers fit 16 bits is read in 16 bits, with the same logits."""
    base = nf4_base(deepcopy(CONFIGS["llama"]), "llama", tmp_path)
    head = base.model.get_output_embeddings()
    head.weight.data = head.weight.data.to(dtype).float()
    engine = build_engine(base, EngineOptions(max_rows=2, max_length=64))
    assert engine.runner.fused is not None
    batch = fill(engine, [(3, 5, None)])
    torch.testing.assert_close(engine.runner.forward(batch, {}), plain(engine, batch, {}), atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not say what is mapped")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_bases_file_does_not_stay_in_memory(dtype: torch.dtype, built_base: Path, tmp_path: Path) -> None:
    """What steps read has moved, and what is left is copied, so that no base is in memory twice; it gives the same."""
    folder = shutil.copytree(built_base, tmp_path / "base")  # which nothing else in this process has loaded
    model = load_base(read_record(folder), dtype=dtype, device="cpu")
    weights = {name: each.data.clone() for name, each in model.model.named_parameters()}
    engine = build_engine(model, EngineOptions(max_rows=2, max_length=64))
    assert engine.runner.fused is not None
    gc.collect()
    assert str(folder) not in Path("/proc/self/maps").read_text()
    for name, each in model.model.named_parameters():
        assert torch.equal(each.data, weights[name.replace(".base.weight", ".weight").replace(".base.bias", ".bias")])
    batch = fill(engine, [(3, 5, None)])
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(
        engine.runner.forward(batch, {}), plain(engine, batch, {}), atol=tolerance, rtol=tolerance
    )
