"""Decode steps over tensors that stay where they are give what ordinary steps give; capturing them is left to a GPU."""

from contextlib import suppress
from itertools import combinations
from pathlib import Path

import pytest

from adapterhub_local.base.bases import read_record
from adapterhub_local.base.load import load_base
from adapterhub_local.registry import Registry
from serve.engine import graphs as graphs_module
from serve.engine.build import build_engine
from serve.engine.engine import Engine
from serve.engine.graphs import Graphs
from serve.engine.options import EngineOptions
from serve.engine.request import Request, SamplingParams, Scheduled
from serve.engine.runner import in_segments
from serve.kernels import reference
from serve.kernels.choose import Kernels

PROMPTS = [tuple(range(start, start + length)) for start, length in ((3, 5), (20, 17), (9, 30), (50, 2), (31, 14))]
ADAPTERS = ["alpha", None, "beta", "gamma", "alpha"]


def engine_of(built_base: Path, **options) -> Engine:
    """An engine of its own over the tiny base, with stacks as on a GPU."""
    options = {"kernels": "torch", "max_rows": 8, **options}
    return build_engine(load_base(read_record(built_base), device="cpu"), EngineOptions(**options))


def with_steps(engine: Engine, settled: int = 0) -> Graphs:
    """Give an engine on the CPU static steps, which run instead of being captured; kernels by plain torch."""
    runner = engine.runner
    kernels = runner.context.kernels = Kernels({})
    runner.graphs = Graphs(
        runner.model, runner.cache, runner.context, engine.slots, kernels, engine.max_length,
        is_captured=False, settled=settled,
    )  # fmt: skip
    return runner.graphs


def answers(engine: Engine, registry: Registry, adapters: list[str | None], tokens: int = 20) -> list[list[int]]:
    """Greedy answers to the prompts, all at once; the second one ends early, so that the batch changes its size."""
    requests = []
    for number, (prompt, name) in enumerate(zip(PROMPTS, adapters, strict=False)):
        params = SamplingParams(max_tokens=min(tokens, 6) if number == 1 else tokens, temperature=0)
        digest = engine.pool.acquire(registry.resolve(name)).digest if name else None
        requests.append(Request(f"{number}-{len(engine._requests)}", prompt, params, digest))
    engine.submit(*requests)
    while engine.has_work:
        assert not [output.error for output in engine.step() if output.error]
    return [request.output for request in requests]


@pytest.fixture
def wanted(built_base: Path, served_registry: Registry) -> dict[str, list[list[int]]]:
    """What the ordinary way answers, with and without adapters."""
    engine = engine_of(built_base)
    return {
        "mixed": answers(engine, served_registry, ADAPTERS),
        "base": answers(engine, served_registry, [None] * 5),
    }


def test_static_steps_equal_ordinary_steps(built_base: Path, served_registry: Registry, wanted) -> None:
    """Mixed adapters of three ranks and none at all, batches filled up to the next size: the same tokens."""
    engine = engine_of(built_base)
    graphs = with_steps(engine)

    assert answers(engine, served_registry, ADAPTERS) == wanted["mixed"]
    assert answers(engine, served_registry, [None] * 5) == wanted["base"]
    assert graphs.reason is None
    assert {(8, (), 0), (4, (), 0)} <= set(graphs._captured)  # five rows, then four
    assert {rank for _, ranks, _ in graphs._captured for rank in ranks} == {3, 8, 16}


def test_steps_follow_factors_that_move(built_base: Path, served_registry: Registry, wanted) -> None:
    """A step whose adapters were moved or replaced in their stacks is captured anew."""
    engine = engine_of(built_base, max_adapters=3)
    graphs = with_steps(engine)
    assert answers(engine, served_registry, ADAPTERS) == wanted["mixed"]
    before = dict(graphs._captured)
    for name in ("alpha", "beta", "gamma"):
        engine.unload(served_registry.resolve(name).content_digest)
    assert answers(engine, served_registry, ["beta", None, None, None, None])[1:] == wanted["base"][1:]
    assert answers(engine, served_registry, ADAPTERS) == wanted["mixed"]
    assert any(graphs._captured[key] is not captured for key, captured in before.items() if key in graphs._captured)


def test_no_step_is_made_of_stacks_that_are_exchanged(built_base: Path, served_registry: Registry, wanted) -> None:
    """While adapters move steps go the ordinary way, a step holds what it reads, and a growth that fails is counted."""
    engine = engine_of(built_base)
    graphs = with_steps(engine)
    with engine.slots.moving:
        assert answers(engine, served_registry, [None] * 5) == wanted["base"]
    assert not len(graphs)
    assert answers(engine, served_registry, ADAPTERS) == wanted["mixed"]
    captured = graphs._captured[4, (3, 8, 16), 4]
    assert {id(stack) for stack in captured.stacks} >= {id(engine.slots.groups[0].a[rank]) for rank in (3, 8, 16)}

    before = engine.slots.moves[8]
    with suppress(MemoryError), engine.slots._exchanging(8):
        engine.slots.groups[0].a[8] = engine.slots.groups[0].a[8].clone()
        raise MemoryError
    assert engine.slots.moves[8] == before + 1


def test_the_engine_on_kernels(built_base: Path, served_registry: Registry, wanted) -> None:
    """With the kernels, interpreted here, and static steps on top, mixed adapters get the tokens that torch gives."""
    pytest.importorskip("triton", reason="Triton is for Linux on x86-64")
    engine = engine_of(built_base, kernels="triton")
    kernels = ("add_lora", "add_norm", "paged_attention", "rotate_and_write", "silu_multiply", "lean")
    assert engine.snapshot().kernels == kernels
    assert answers(engine, served_registry, ADAPTERS, tokens=2) == [each[:2] for each in wanted["mixed"]]

    runner = engine.runner
    assert runner.context.kernels is not None
    runner.graphs = Graphs(
        runner.model, runner.cache, runner.context, engine.slots, runner.context.kernels,
        engine.max_length, is_captured=False, settled=0,
    )  # fmt: skip
    assert answers(engine, served_registry, ADAPTERS, tokens=2) == [each[:2] for each in wanted["mixed"]]
    assert len(runner.graphs)
    kernels = ("add_lora", "add_norm", "paged_attention", "rotate_and_write", "silu_multiply", "lean")
    assert engine.snapshot().kernels == kernels


def test_a_wrong_kernel_is_found_by_the_check_at_load(
    built_base: Path,
    served_registry: Registry,
    wanted,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Attention that is right on its own but not in the model is dropped with the reason, and plain torch answers."""
    sound = reference.paged_attention

    def wrong(query, keys, *args):  # as if the model's pages lay in another order
        return sound(query, keys.flip(0), *args)

    kernels = Kernels({"paged_attention": wrong})
    monkeypatch.setattr("serve.engine.build.choose_kernels", lambda *_: kernels)
    engine = engine_of(built_base)

    assert engine.snapshot().kernels == ()
    assert "paged_attention is not used: a packed batch gives other logits" in caplog.records[0].getMessage()
    assert answers(engine, served_registry, ADAPTERS) == wanted["mixed"]


def test_a_kind_of_step_is_made_once_it_is_common(built_base: Path, served_registry: Registry, wanted) -> None:
    """What comes a few times only goes the ordinary way."""
    engine = engine_of(built_base)
    graphs = with_steps(engine, settled=10)
    assert answers(engine, served_registry, [None] * 5) == wanted["base"]
    assert set(graphs._captured) == {(4, (), 0)}


def steps_of(engine: Engine, registry: Registry, kinds: list[tuple[int, tuple[str, ...]]], rounds: int) -> list[object]:
    """The steps that are made while batches of these (rows, adapters) come in turn, 20 of each a round."""
    made: list[object] = []
    ordinary = graphs_module.StaticStep.__init__

    def counted(self, graphs, size, ranks, num_tiles) -> None:
        made.append((size, ranks))
        ordinary(self, graphs, size, ranks, num_tiles)

    digests = {name: engine.pool.acquire(registry.resolve(name)).digest for name in ("alpha", "beta", "gamma")}
    for digest in digests.values():
        engine.slots.put(digest, engine.pool.get(digest), set(digests.values()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs_module.StaticStep, "__init__", counted)
        for _ in range(rounds):
            for rows, names in kinds:
                adapters = [digests[names[row % len(names)]] if names else None for row in range(rows)]
                requests = [
                    Request(str(row), (5, 6, 7), SamplingParams(max_tokens=9), adapter, pages=[1 + row])
                    for row, adapter in enumerate(adapters)
                ]
                slots = engine.slots.find({adapter for adapter in adapters if adapter})
                batch = in_segments([Scheduled(each, 2, 1) for each in requests], slots)
                for _ in range(20):
                    engine.runner.forward(batch, slots)
    return made


def test_more_kinds_than_room(built_base: Path, served_registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kinds that push each other out are captured anew ever more rarely, not whenever they come again."""
    monkeypatch.setattr(graphs_module, "MAX_GRAPHS", 4)
    engine = engine_of(built_base)
    with_steps(engine, settled=4)
    kinds = [(rows, names) for rows in (1, 2, 4) for names in ((), ("alpha",))]
    made = steps_of(engine, served_registry, kinds, rounds=12)
    assert set(made) == {(rows, ranks) for rows in (1, 2, 4) for ranks in ((), (8,))}
    assert 6 <= len(made) <= 30  # 72 if each were made whenever it comes


def test_many_sets_of_ranks_share_a_step(built_base: Path, served_registry: Registry) -> None:
    """Beyond a few sets of ranks a step takes all ranks there are, and gives what the ordinary way gives."""
    engine = engine_of(built_base)
    with_steps(engine, settled=2)
    names = ("alpha", "beta", "gamma")
    sets = [tuple(each) for count in (1, 2, 3) for each in combinations(names, count)]
    made = steps_of(engine, served_registry, [(3, each) for each in sets], rounds=2)
    assert len(made) == graphs_module.MAX_SETS + 1
    assert made[-1] == (4, (3, 8, 16))
    wanted = engine_of(built_base)
    for each in ([*names, None], ["alpha", "gamma", None, "alpha"], ["beta"]):
        assert answers(engine, served_registry, [*each]) == answers(wanted, served_registry, [*each])


def test_steps_without_adapters_are_captured_at_start(built_base: Path, served_registry: Registry, wanted) -> None:
    """Every size up to the most rows is there before the first request, and answers as the ordinary way does."""
    engine = engine_of(built_base)
    graphs = with_steps(engine, settled=1000)
    graphs.prepare(max_rows=6)
    assert set(graphs._captured) == {(size, (), 0) for size in (1, 2, 4, 8)}
    before = dict(graphs._captured)
    assert answers(engine, served_registry, [None] * 5) == wanted["base"]
    assert dict(graphs._captured) == before


def test_what_cannot_be_captured_goes_on_without(
    built_base: Path, served_registry: Registry, wanted, caplog: pytest.LogCaptureFixture
) -> None:
    """A failing capture costs a warning with its reason, once, and no answer."""
    engine = engine_of(built_base)
    graphs = with_steps(engine)
    graphs.is_captured = True  # as on a GPU; there is none
    graphs.kernels = Kernels({"add_lora": reference.add_lora, "paged_attention": reference.paged_attention})

    assert answers(engine, served_registry, [None] * 5) == wanted["base"]
    assert graphs.reason is not None
    assert not len(graphs)
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == [
        "steps are not captured as CUDA graphs"
    ]
