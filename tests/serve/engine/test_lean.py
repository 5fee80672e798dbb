"""A decoder's forward in few launches gives what the model's own code gives, for every batch, adapter and kind."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adapterhub_local.base.load import LoadedBase
from adapterhub_local.errors import Incompatible
from serve.engine.build import build_engine
from serve.engine.engine import Engine
from serve.engine.graphs import Graphs
from serve.engine.lean import NEEDED, LeanForward
from serve.engine.options import EngineOptions
from serve.engine.runner import in_segments
from serve.engine.self_check import choose_lean, use_packed_attention
from serve.kernels import reference
from serve.kernels.choose import Kernels
from tests.serve.engine.forwards import fill, plain
from tests.serve.engine.test_architectures import CONFIGS, nf4_base

KINDS = ("llama", "mistral", "qwen2", "qwen3")
RANKS = (3, 8)
OWN = {name: getattr(reference, name) for name in (*NEEDED, "add_lora", "paged_attention")}


def base_of(kind: str, folder: Path) -> LoadedBase:
    """A base of its own, whose config no other test has changed."""
    return nf4_base(type(CONFIGS[kind])(**CONFIGS[kind].to_dict()), kind, folder)


@pytest.fixture(scope="module", params=KINDS)
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """An engine of each kind by the kernels' references, with an adapter of each of two ranks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("serve.engine.build.choose_kernels", lambda *_: Kernels(dict(OWN)))
        base = base_of(request.param, tmp_path_factory.mktemp("base"))
        engine = build_engine(base, EngineOptions(max_rows=8))
    for rank in RANKS:
        generator = torch.Generator().manual_seed(rank)
        factors = {
            name: (
                torch.randn(layer.in_features, rank, generator=generator) / layer.in_features**0.5,
                torch.randn(rank, layer.out_features, generator=generator) / 4,
            )
            for place, (name, layer) in enumerate(engine.slots.layers.items())
            if rank == 3 or place % 2
        }
        engine.slots.put(str(rank), factors, set())
    return engine


ROWS = st.lists(
    st.tuples(st.sampled_from([0, 1, 15, 16, 40]), st.integers(1, 9), st.sampled_from([None, *map(str, RANKS)])),
    min_size=1,
    max_size=5,
)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=ROWS)
def test_any_batch_gives_the_models_logits(engine: Engine, rows: list[tuple[int, int, str | None]]) -> None:
    """One token a row or several, any mix of adapters: the same logits, and the same keys and values in the cache."""
    assert engine.runner.lean is not None
    slots = engine.slots.find({adapter for *_, adapter in rows if adapter})
    batch = in_segments(fill(engine, rows), slots)
    wanted = plain(engine, batch, slots)
    layers = range(len(engine.runner.lean.layers))
    written = [torch.stack([each.clone() for each in engine.runner.cache.pair(layer, 0, 0)]) for layer in layers]
    got = engine.runner.forward(batch, slots)
    torch.testing.assert_close(got, wanted, atol=1e-4 * float(wanted.abs().max()), rtol=0)
    for layer, before in zip(layers, written, strict=True):
        now = torch.stack(engine.runner.cache.pair(layer, 0, 0))
        torch.testing.assert_close(now, before, atol=1e-4 * float(before.abs().max()), rtol=0)


def test_static_steps_are_lean(engine: Engine) -> None:
    """What is captured on a GPU is the short forward, and gives what the model gives."""
    runner = engine.runner
    rows = [(40, 1, "3"), (15, 1, "8"), (16, 1, None)]
    slots = engine.slots.find(map(str, RANKS))
    batch = in_segments(fill(engine, rows), slots)
    wanted = plain(engine, batch, slots)
    calls: Counter[str] = Counter()
    kernels = Kernels({name: _counted(name, own, calls) for name, own in OWN.items()})
    lean = LeanForward(runner.model, kernels, runner.lean.kinds)
    before, runner.context.kernels = runner.context.kernels, kernels
    runner.graphs = Graphs(
        runner.model, runner.cache, runner.context, engine.slots, kernels, engine.max_length, lean=lean,
        is_captured=False, settled=0,
    )  # fmt: skip
    try:
        for _ in range(2):  # captured, then replayed
            calls.clear()
            got = runner.forward(batch, slots)
            torch.testing.assert_close(got, wanted, atol=1e-4 * float(wanted.abs().max()), rtol=0)
            layers = len(lean.layers)
            assert [calls[name] for name in NEEDED] == [2 * layers + 1, layers, layers]
            assert calls["paged_attention"] == layers
        assert runner.graphs.reason is None
    finally:
        runner.graphs, runner.context.kernels = None, before


def _counted(name, own, calls):
    def work(*args, **options):
        calls[name] += 1
        return own(*args, **options)

    return work


def test_a_forward_that_differs_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With a kernel that is wrong for this model a warning says by how much, and the model's own code goes on."""
    model = base_of("llama", tmp_path).model
    kernels = Kernels(dict(OWN))
    checked = use_packed_attention(model, kernels)
    assert choose_lean(model, checked, kernels) is not None
    wrong = Kernels({**OWN, "silu_multiply": lambda gate, up: gate * up})
    assert choose_lean(model, checked, wrong) is None
    assert "kernels between products are not used: logits differ" in caplog.messages[-1]


@pytest.mark.parametrize(("kind", "reason"), [("gemma2", "not of a kind"), ("llama", "there is no kernel add_norm")])
def test_what_it_does_not_compute(kind: str, reason: str, tmp_path: Path) -> None:
    """Another kind of model, or a kernel that was dropped, is a reason."""
    model = base_of(kind, tmp_path).model
    own = {name: each for name, each in OWN.items() if kind != "llama" or name != "add_norm"}
    with pytest.raises(Incompatible, match=reason):
        LeanForward(model, Kernels(own), [None] * 2)
