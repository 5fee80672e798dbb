"""The benchmarks that wait for a GPU run through on tiny shapes, so that only the figures are missing."""

import pytest

from benchmarks import serve_gpu
from benchmarks.train_gpu import CASES, SHAPES, UNSLOTH, measure, planned_gib
from serve.engine.lean import NEEDED


@pytest.mark.parametrize("name", ["llama-8b-2x2048-in-7.4", "llama-8b-longest-on-8", "llama-8b-speed-plain"])
def test_training_on_a_gpu(name: str) -> None:
    """A case of each kind trains a random NF4 model built layer by layer, and reports what it should."""
    case = next(case for case in CASES if case.name == name)
    result = measure(case, "cpu", tiny=True)

    assert result["case"] == name
    if case.mode == "longest":
        assert result["longest"] == 256
        assert result["unsloth"] == UNSLOTH[8][0]
    else:
        assert result["tokens_per_second"] > 0
    if case.mode != "plain":
        assert result["planned_gib"] > 0


def test_the_plan_of_the_cases() -> None:
    """The plan has every model fit the card named for it, and a tenth of it not."""
    named = [case for case in CASES if case.mode == "fits" and case.card]

    assert len(named) == 3
    for case in named:
        assert case.card is not None
        assert case.card / 10 < planned_gib(case, SHAPES[case.shape], case.length) < case.card, case.name


@pytest.mark.parametrize("kind", ["ours", "plain", "peft", "kernels"])
def test_serving_on_a_gpu(kind: str) -> None:
    """Engine, PEFT and kernels answer on a random base of tiny shape, with each number of adapters."""
    if kind in ("ours", "kernels"):
        pytest.importorskip("triton", reason="Triton is for Linux on x86-64")
    case = next(case for case in serve_gpu.CASES if case.kind == kind)
    result = serve_gpu.measure(case, "cpu", tiny=True)

    assert result["case"] == case.name
    if kind == "kernels":
        assert {entry["kernel"].split()[0] for entry in result["kernels"]} == {"lora", "nf4", "attention"}
        assert all(entry["times_floor"] > 0 for entry in result["kernels"])
        return
    speeds = result["tokens_per_second"]
    assert speeds.keys() == {"0", "2"}
    # PEFT's is of the difference of two runs, which on a busy machine may be anything
    assert all(speed > 0 or kind == "peft" for by_batch in speeds.values() for speed in by_batch.values())
    if kind != "peft":
        needed = {"add_lora", "paged_attention", *NEEDED} if kind == "ours" else set()
        assert needed <= set(result["kernels"])
        assert bool(needed) == bool(result["kernels"])
