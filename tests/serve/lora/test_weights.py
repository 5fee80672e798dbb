"""Ways to compute the base: a copy of the dequantised weights gives what the 4-bit weights give."""

import pytest
import torch

from adapterhub_local.base.bases import read_record
from adapterhub_local.base.load import load_base
from adapterhub_local.errors import InputError
from adapterhub_local.registry import Registry
from serve.engine.build import build_engine, free_bytes
from serve.engine.engine import Engine
from serve.engine.options import EngineOptions
from serve.engine.request import Request, SamplingParams
from serve.kernels.choose import choose_kernels
from serve.lora.crossover import gain
from serve.lora.weights import (
    dense_bytes,
    dense_product,
    dense_weight,
    is_four_bit,
    padded_count,
    use_dense,
    use_four_bit_always,
)

LENGTHS = (3, 17, 40)


@pytest.fixture(scope="module")
def engines(built_base) -> dict[str, Engine]:
    """One engine for each way."""
    return {
        mode: build_engine(
            load_base(read_record(built_base), device="cpu"), EngineOptions(max_rows=8, base_exec=mode, max_adapters=4)
        )
        for mode in ("nf4", "dequant-cache", "auto")
    }


def answers(engine: Engine, registry: Registry) -> dict[str, tuple[list[int], list[float]]]:
    """Greedy tokens and their log-probabilities of a mixed batch."""
    params = SamplingParams(max_tokens=20, temperature=0, logprobs=0)
    requests = []
    for name in (None, "alpha", "beta", "gamma"):
        for length in LENGTHS[: 2 if name else 3]:
            prompt = tuple(torch.randint(250, (length,), generator=torch.Generator().manual_seed(length)).tolist())
            adapter = engine.pool.acquire(registry.resolve(name)).digest if name else None
            requests.append(Request(f"{name}-{length}", prompt, params, adapter))
    for request in requests:
        engine.submit(request)
    logprobs: dict[str, list[float]] = {request.id: [] for request in requests}
    while engine.has_work:
        for output in engine.step():
            assert output.error is None
            logprobs[output.request_id].append(output.sampled.logprob)
    return {request.id: (request.output, logprobs[request.id]) for request in requests}


def test_every_way_gives_the_same_answers(engines: dict[str, Engine], served_registry: Registry) -> None:
    """Greedy tokens are the same and log-probabilities within 1e-4, base and adapters mixed in one batch."""
    expected = answers(engines["nf4"], served_registry)
    assert not any(group.dense for group in engines["nf4"].slots.groups)
    assert all(group.dense for group in engines["dequant-cache"].slots.groups)
    for mode in ("dequant-cache", "auto"):
        for name, (tokens, logprobs) in answers(engines[mode], served_registry).items():
            assert tokens == expected[name][0], (mode, name)
            assert logprobs == pytest.approx(expected[name][1], abs=1e-4), (mode, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_copy_is_what_nf4_multiplies_with(built_base, dtype: torch.dtype) -> None:
    """Products with unit vectors read the 4-bit weights out: the copy holds the very same numbers."""
    model = load_base(read_record(built_base), device="cpu", dtype=dtype).model
    for name in ("q_proj", "k_proj"):
        layer = getattr(model.model.layers[1].self_attn, name)
        columns = layer(torch.eye(layer.in_features, dtype=dtype))
        assert torch.equal(dense_weight(layer, dtype), columns.T)


def test_biases_and_missing_ones_are_kept() -> None:
    """Layers computed together keep their own bias, or none."""
    bases = [torch.nn.Linear(8, 4), torch.nn.Linear(8, 3, bias=False)]
    x = torch.randn(5, 8)
    with torch.inference_mode():
        expected = torch.cat([base(x) for base in bases], -1)
        got = torch.cat(dense_product(bases, torch.float32)(x), -1)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_budget(built_base) -> None:
    """Copies are made as far as the bytes go and no further; none at zero."""
    engine = build_engine(load_base(read_record(built_base), device="cpu"), EngineOptions(base_exec="nf4"))
    groups = engine.slots.groups
    whole = sum(dense_bytes(group, torch.float32) for group in groups)
    assert use_dense(groups, torch.float32, "dequant-cache", 0) == 0
    assert not any(group.dense for group in groups)
    taken = use_dense(groups, torch.float32, "dequant-cache", whole // 2)
    assert 0 < taken <= whole // 2
    assert taken == sum(dense_bytes(group, torch.float32) for group in groups if group.dense)
    assert free_bytes(torch.device("cpu")) > 1 << 20


def test_crossover_is_where_the_copy_starts_to_win(monkeypatch: pytest.MonkeyPatch, engines: dict[str, Engine]) -> None:
    """`auto` uses a copy from the least number of tokens above which it was faster at every probe."""
    group = engines["nf4"].slots.groups[0]
    copy = dense_product(group.bases, torch.float32)

    def clock(times: dict[int, tuple[float, float]]) -> None:
        """Let the 4-bit weights and the copy take these seconds at so many tokens."""
        answers = iter([times[count] for count in sorted(times, reverse=True)])
        monkeypatch.setattr("serve.lora.crossover.race", lambda *_: next(answers))

    clock({1: (1.0, 2.0), 4: (1.0, 2.0), 16: (3.0, 2.0), 64: (5.0, 1.0)})
    assert gain(group, torch.float32, copy) == (5.0, 16)
    clock({1: (2.0, 1.0), 4: (2.0, 1.0), 16: (2.0, 1.0), 64: (2.0, 1.0)})
    assert gain(group, torch.float32, copy) == (4.0, 1)
    clock({1: (9.0, 1.0), 4: (9.0, 1.0), 16: (9.0, 1.0), 64: (1.0, 1.0)})
    assert gain(group, torch.float32, copy) == (0.0, 65)


@torch.inference_mode()
def test_the_kernel_of_a_cpu_multiplies_any_number_of_tokens(built_base) -> None:
    """It gives what the layers give, one token or several times what it takes together, and nothing is copied."""
    engine = build_engine(load_base(read_record(built_base), device="cpu"), EngineOptions(base_exec="nf4"))
    kernels = choose_kernels("c", torch.device("cpu"), torch.float32, (4, 2, 16))
    assert kernels is not None
    groups = [group for group in engine.slots.groups if is_four_bit(group.bases[0].weight)]
    assert use_four_bit_always(engine.slots.groups, kernels) == len(groups) > 0
    for group in groups:
        for count in (1, 2, 3, 64, 129, 300):
            x = torch.randn(1, count, group.in_features, generator=torch.Generator().manual_seed(count))
            for got, base in zip(group.base_products(x), group.bases, strict=True):
                torch.testing.assert_close(got, base(x), atol=1e-4, rtol=1e-4)


def test_unknown_way_is_refused() -> None:
    """Only the three ways there are can be asked for."""
    with pytest.raises(InputError, match="nf4"):
        EngineOptions(base_exec="fast")


def test_every_number_of_tokens_is_multiplied(engines: dict[str, Engine]) -> None:
    """Padding to one of few numbers of tokens changes no product, whatever the number."""
    group = engines["nf4"].slots.groups[0]
    product = dense_product(group.bases, torch.float32)
    weight = torch.cat([dense_weight(base, torch.float32) for base in group.bases])
    x = torch.randn(1, 300, group.in_features, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        for count in (*range(1, 70), 129, 255, 256, 257, 300):
            out = torch.cat(product(x[:, :count]), -1)
            assert out.shape == (1, count, sum(group.sizes))
            torch.testing.assert_close(out, torch.nn.functional.linear(x[:, :count], weight))


def test_few_numbers_of_tokens() -> None:
    """So that oneDNN keeps little code: 36 numbers up to 512, each at most a quarter more than asked for."""
    padded = [padded_count(count) for count in range(1, 513)]
    assert len(set(padded)) == 36
    assert all(count <= more < 1.25 * count for count, more in enumerate(padded, 1))
    assert padded[:16] == list(range(1, 17))
    assert padded_count(512) == 512
