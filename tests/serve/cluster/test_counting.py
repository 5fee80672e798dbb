"""Counting over all gateways, without Ray: one counter, several that ask it."""

import pytest

from serve.limits import Bounds, Lease, Refusal

pytest.importorskip("ray", reason="Ray is not installed: `make check-ray` runs these in an environment of its own")


def test_what_a_killed_gateway_had_running_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests count over all gateways; those of one that is silent for long count no more, its rate still does."""
    from serve.cluster import counting

    now = [100.0]
    monkeypatch.setattr(counting, "monotonic", lambda: now[0])
    counter, bounds = counting.Counter(), Bounds(4, 60, 2)
    first, second = counter.admit("g1", "key", bounds), counter.admit("g2", "key", bounds)
    assert isinstance(first, Lease)
    assert isinstance(second, Lease)
    assert counter.admit("g2", "key", bounds) == Refusal("concurrency", 1.0)
    now[0] += counting.GONE_SECONDS + 1
    assert isinstance(counter.admit("g2", "key", bounds), Lease)  # in the place of g1's
    assert isinstance(counter.admit("g2", "key", bounds), Refusal)
    counter.release("g2", second, ran=True)
    assert isinstance(counter.admit("g2", "key", bounds), Lease)
    counter.release("g1", first, ran=True)  # it lived, and is late: nothing changes
    refused = counter.admit("g1", "other", Bounds(1, 60, None))
    assert isinstance(refused, Lease)
    assert counter.admit("g3", "key", Bounds(4, 60, None)).why == "rate"
