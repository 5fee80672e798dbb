"""The benchmarks that wait for a GPU run through on tiny shapes, so that only the figures are missing."""

import pytest

from benchmarks.train_gpu import CASES, SHAPES, UNSLOTH, measure, planned_gib


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
