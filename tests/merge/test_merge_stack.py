"""Deltas side by side: norms, rounding and reduction measured on factors are those of dense float64 matrices."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adapterhub_local.lora.adapter import Delta
from adapterhub_local.merge.algebra import decompose, inner
from adapterhub_local.merge.stack import Stack
from tests.merges import WEIGHT, quick

SIZES = st.sampled_from([1e-28, 1e-12, 1e-3, 1.0, 1e6, 1e17])  # of entries: squares of the outer ones leave float32


def random_delta(
    seed: int, rank: int, size: float = 1.0, dtype: torch.dtype = torch.float32, shape: tuple[int, int] = (30, 20)
) -> Delta:
    """A delta of (in, out) features whose A has entries of about `size`."""
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(rank, shape[0], generator=generator, dtype=torch.float64) * size
    B = torch.randn(shape[1], rank, generator=generator, dtype=torch.float64)
    return Delta(A.to(dtype), B.to(dtype), 1.5)


def dense(delta: Delta) -> torch.Tensor:
    """In float64."""
    return delta.scaling * (delta.B.double() @ delta.A.double())


TERMS = st.lists(
    st.tuples(st.integers(0, 2**31), st.integers(1, 6), st.sampled_from([torch.float32, torch.float64]), WEIGHT),
    min_size=1,
    max_size=3,
)


@quick
@given(TERMS, SIZES, st.booleans())
def test_norms_and_products_are_those_of_matrices(terms: list, size: float, precise: bool) -> None:
    """Whatever the size of the entries, in float32 to 6 digits and in float64 to 12."""
    deltas = [random_delta(seed, rank, size, dtype) for seed, rank, dtype, _ in terms]
    weights = [weight for *_, weight in terms]
    stack = Stack.of(deltas)
    grams = stack.grams(precise=precise)
    products = stack.products(grams, len(deltas))
    digits = 1e-12 if grams.is_precise else 1e-6
    for i, left in enumerate(deltas):
        for j, right in enumerate(deltas):
            scale = math.sqrt(inner(left, left) * inner(right, right))
            assert float(products[i, j]) == pytest.approx(inner(left, right), rel=digits, abs=digits * scale)
    whole = sum(weight * dense(delta) for weight, delta in zip(weights, deltas, strict=True))
    summed = stack.weighted(weights)
    assert summed.square(grams) == pytest.approx(float(whole.square().sum()), rel=2e-6)
    torch.testing.assert_close(summed.delta().dense(), whole, rtol=1e-12, atol=1e-12 * float(whole.abs().max()))


@pytest.mark.parametrize("rest", [1.0, 1e-3, 1e-7, 1e-11])
def test_a_sum_that_cancels_keeps_its_digits(rest: float) -> None:
    """D - (1 - rest) D has the norm rest |D|, to 4 digits, although the terms are a hundred billion times larger."""
    delta = random_delta(1, 4)
    stack = Stack.of([delta, delta]).weighted([1.0, rest - 1.0])
    assert stack.square(stack.grams()) == pytest.approx((1 - (1 - rest)) ** 2 * inner(delta, delta), rel=1e-4)


@quick
@given(TERMS, SIZES, st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
def test_what_storing_costs_is_measured(terms: list, size: float, dtype: torch.dtype) -> None:
    """The error told is that of the dense matrices, to 3 digits, over dtypes and sizes; A is exact in float32."""
    if dtype == torch.float16 and not 1e-6 < size < 1e4:
        return  # beyond its range
    deltas = [random_delta(seed, rank, size, given) for seed, rank, given, _ in terms]
    summed = Stack.of(deltas).weighted([weight for *_, weight in terms])
    grams = summed.grams()
    stored, squared = summed.store(dtype, grams)
    exact = summed.delta().dense()
    wanted = float((dense(stored) - exact).norm())
    assert stored.A.dtype == stored.B.dtype == dtype
    assert math.sqrt(squared) == pytest.approx(wanted, rel=3e-3, abs=1e-11 * float(exact.norm()))


def test_a_power_of_two_costs_nothing() -> None:
    """A weight whose product with the scaling is a power of two leaves every digit as it was."""
    delta = Delta(random_delta(1, 4).A, random_delta(1, 4).B, 2.0)
    summed = Stack.of([delta]).weighted([0.25])
    stored, squared = summed.store(torch.float32, summed.grams())
    assert squared == 0
    assert torch.equal(dense(stored), 0.25 * dense(delta))


@quick
@given(TERMS, SIZES, st.integers(1, 6))
def test_reduction_is_that_of_the_whole_matrix(terms: list, size: float, rank: int) -> None:
    """Values as by QR, the kept part as near as can be, and its distance measured, whatever the size of the entries."""
    deltas = [random_delta(seed, own, size, dtype) for seed, own, dtype, _ in terms]
    summed = Stack.of(deltas).weighted([weight for *_, weight in terms])
    whole = summed.delta().dense()
    grams = summed.grams(precise=True)
    found = summed.decompose(grams, rank)
    torch.testing.assert_close(found.values, decompose(summed.delta()).values, rtol=1e-7, atol=0)
    kept = found.truncate(rank)
    error = float((dense(kept) - whole).norm())
    assert error == pytest.approx(math.sqrt(found.lost(rank)), rel=1e-5, abs=1e-6 * float(whole.norm()))
    gap = summed.gap(kept, grams, summed.square(grams))
    assert math.sqrt(gap) == pytest.approx(error, rel=1e-5, abs=2e-7 * float(whole.norm()))


def test_factors_that_share_directions_are_reduced_too() -> None:
    """Where a Gram matrix is singular the same values come from QR, and what is there twice is nothing."""
    delta = random_delta(3, 4)
    summed = Stack.of([delta, delta, random_delta(4, 2)]).weighted([1.0, 0.5, 1.0])
    found = summed.decompose(summed.grams(precise=True))
    values = torch.linalg.svdvals(summed.delta().dense())
    torch.testing.assert_close(found.values[:6], values[:6], rtol=1e-9, atol=0)
    assert float(found.values[6:].max()) < 1e-12 * float(values[0])
