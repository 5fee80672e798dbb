"""Of three ways to multiply a base's weights each number of tokens goes the fastest; all are the same function."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapterhub_local.base.bases import read_record
from adapterhub_local.base.load import load_base
from serve.engine.build import build_engine
from serve.engine.engine import Engine
from serve.engine.options import EngineOptions
from serve.kernels import reference
from serve.kernels.choose import Kernels
from serve.lora import crossover
from serve.lora.ways import COPY, KERNEL, OWN, PROBES, Ways, chosen, use_fastest
from serve.lora.weights import dense_bytes, is_four_bit

FP32 = torch.float32
SECONDS = st.sampled_from([1.0, 2.0, 3.0])


@pytest.fixture(scope="module")
def engine(built_base) -> Engine:
    """An engine whose layers all multiply in their own way."""
    return build_engine(load_base(read_record(built_base), device="cpu"), EngineOptions(base_exec="nf4"))


@pytest.fixture(autouse=True)
def undo(engine: Engine) -> None:
    """Every test begins with the layers' own way."""
    for group in engine.slots.groups:
        group.dense = None


def kernels() -> Kernels:
    return Kernels({"multiply": reference.multiply})


def clock(monkeypatch: pytest.MonkeyPatch, times: dict[str, list[float]]) -> None:
    """Let the ways take these seconds at the probes, whatever the layers."""
    order = [name for name in (OWN, KERNEL, COPY) if name in times]

    def race(works, x) -> list[float]:
        assert len(works) == len(order)
        return [times[name][PROBES.index(x.shape[1])] for name in order]

    monkeypatch.setattr(crossover, "race", race)


def four_bit(engine: Engine) -> list:
    return [group for group in engine.slots.groups if all(is_four_bit(base.weight) for base in group.bases)]


@settings(max_examples=15, deadline=None)
@given(times=st.fixed_dictionaries({name: st.lists(SECONDS, min_size=9, max_size=9) for name in (OWN, KERNEL, COPY)}))
@torch.inference_mode()
def test_every_number_of_tokens_goes_the_fastest_way(engine: Engine, times: dict[str, list[float]]) -> None:
    """Whatever was measured: at a probe, and below it, its fastest way; and each way gives what the layers give."""
    for group in engine.slots.groups:
        group.dense = None
    inputs = {
        (place, count): torch.randn(1, count, group.in_features, generator=torch.Generator().manual_seed(count))
        for place, group in enumerate(four_bit(engine)[:3])
        for count in (1, 2, 3, 5, 70)
    }
    wanted = {key: four_bit(engine)[key[0]].base_products(x) for key, x in inputs.items()}
    with pytest.MonkeyPatch.context() as patch:
        clock(patch, times)
        taken = use_fastest(engine.slots.groups, FP32, 1 << 40, kernels())
    groups = four_bit(engine)
    assert taken in (0, sum(dense_bytes(group, FP32) for group in groups))
    others = [min(each) for each in zip(times[OWN], times[KERNEL], strict=True)]
    gain = sum(max(0.0, other - own) for other, own in zip(others, times[COPY], strict=True))
    has_copy = gain >= 0.1 * sum(others)
    assert bool(taken) == has_copy
    for place, probe in enumerate(PROBES):
        best = min(times[name][place] for name in times if has_copy or name != COPY)
        for group in groups:
            if group.dense is None:
                assert times[OWN][place] == best
                continue
            assert isinstance(group.dense, Ways)
            steps = group.dense.steps
            name = next((name for most, name, _ in steps if probe <= most), steps[-1][1])
            assert times[name][place] == best
    for (place, count), one in wanted.items():
        for got, expected in zip(groups[place].base_products(inputs[place, count]), one, strict=True):
            torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_the_kernel_is_used_beside_copies(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is plenty and a copy beats the layers everywhere: where the kernel beats both, the kernel multiplies."""
    clock(monkeypatch, {OWN: [9.0] * 9, KERNEL: [1.0] * 6 + [6.0] * 3, COPY: [3.0] * 9})
    use_fastest(engine.slots.groups, FP32, 1 << 40, kernels())
    words = "kernel up to 32 tokens, copy beyond"
    assert chosen(engine.slots.groups) == {words: len(four_bit(engine))}


def test_copies_pay_for_their_memory(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy that gains less than a tenth is not made, nor one for which there are no bytes; bytes are counted."""
    clock(monkeypatch, {OWN: [10.0] * 9, KERNEL: [9.0] * 9, COPY: [8.5] * 9})
    assert use_fastest(engine.slots.groups, FP32, 1 << 40, kernels()) == 0
    assert set(chosen(engine.slots.groups)) == {"kernel always"}
    for group in engine.slots.groups:
        group.dense = None
    clock(monkeypatch, {OWN: [10.0] * 9, KERNEL: [9.0] * 9, COPY: [1.0] * 9})
    whole = sum(dense_bytes(group, FP32) for group in four_bit(engine))
    taken = use_fastest(engine.slots.groups, FP32, whole // 2, kernels())
    assert 0 < taken <= whole // 2
    assert set(chosen(engine.slots.groups)) == {"kernel always", "copy always"}


def test_without_kernels(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the kernel, or if it fails while it is raced, the other two ways are left."""
    clock(monkeypatch, {OWN: [1.0] * 4 + [3.0] * 5, COPY: [2.0] * 9})
    use_fastest(engine.slots.groups, FP32, 1 << 40, None)
    assert set(chosen(engine.slots.groups)) == {"own up to 8 tokens, copy beyond"}


def test_a_kernel_that_fails_in_the_race_is_not_chosen(engine: Engine) -> None:
    """What was timed then was plain torch: no group gets it."""

    def broken(*_: object) -> torch.Tensor:
        raise RuntimeError("no image for this device")

    own = Kernels({"multiply": broken})
    groups = four_bit(engine)[:1]
    use_fastest(groups, FP32, 0, own)
    assert not own.has("multiply")
    assert groups[0].dense is None


@torch.inference_mode()
def test_joined_weights_are_held_once(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers of one input are one call of the kernel over one tensor, of which their own weights are views."""
    calls: list[int] = []

    def counted(*args):
        calls.append(args[-1])
        return reference.multiply(*args)

    clock(monkeypatch, {OWN: [2.0] * 9, KERNEL: [1.0] * 9, COPY: [3.0] * 9})
    groups = [group for group in four_bit(engine) if len(group.bases) > 1]
    wanted = [group.base_products(torch.ones(1, 3, group.in_features)) for group in groups]
    use_fastest(groups, FP32, 0, Kernels({"multiply": counted}))
    for group, one in zip(groups, wanted, strict=True):
        calls.clear()
        got = group.base_products(torch.ones(1, 3, group.in_features))
        assert calls == [sum(group.sizes)]
        for ours, theirs, base in zip(got, one, group.bases, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(base(torch.ones(1, 3, group.in_features)), theirs)  # from the view
        storages = {base.weight.untyped_storage().data_ptr() for base in group.bases}
        assert len(storages) == 1
