"""Placement: stable, even, and moved no more than needed."""

from collections import Counter
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.cluster.placement import CLOSE, DRAWN, FIRST, SPARE, Placement, ranked, tiers

NAMES = st.sets(st.text("abcdef0123456789", min_size=1, max_size=8), min_size=1, max_size=8)


@given(st.text(max_size=20), NAMES, st.data())
def test_only_what_has_to_move_moves(affinity: str, names: set[str], data) -> None:
    """The order of replicas for a content is the same whoever asks, and losing one leaves that of the others."""
    order = ranked(affinity, sorted(names))
    assert sorted(order) == sorted(names)
    assert ranked(affinity, sorted(names, reverse=True)) == order
    gone = data.draw(st.sampled_from(sorted(names)))
    assert ranked(affinity, names - {gone}) == [name for name in order if name != gone]


@given(st.none() | st.text(max_size=9), NAMES, st.lists(st.sampled_from(["a", "b", "c0"]), max_size=3))
def test_tiers_have_each_replica_once(affinity: str | None, names: set[str], avoid: list[str]) -> None:
    """Every replica that is not to be avoided is in one tier; if all are, all are asked nevertheless."""
    found = [name for tier in tiers(affinity, names, avoid) for name in tier]
    assert sorted(found) == sorted(names - set(avoid) or names)
    assert tiers(affinity, []) == []


@pytest.mark.parametrize("affinity", ["sha256:1", None])
@pytest.mark.parametrize("num_avoided", [0, 1, SPARE])
def test_of_many_replicas_few_are_asked(affinity: str | None, num_avoided: int) -> None:
    """However many there are, a request asks its content's first, in their order, and a few others: any, in the end."""
    names = [f"r{number}" for number in range(300)]
    order = ranked(affinity, names) if affinity is not None else []
    avoid = (order or names)[:num_avoided]
    own = order[num_avoided:][: FIRST + CLOSE]
    placement = Placement(names, Random(0))
    seen: set[str] = set()
    for _ in range(1000):
        found = placement.tiers(affinity, avoid)
        assert [name for tier in found[:-1] for name in tier] == own
        assert [len(tier) for tier in found] == ([1] * FIRST + [CLOSE] if own else []) + [DRAWN]
        seen.update(found[-1])
        assert len(set(found[-1])) == DRAWN
    assert seen == set(names) - set(own) - set(avoid)


def test_what_is_remembered_is_what_is_found() -> None:
    """Each time the same order, also of contents that were forgotten, as whoever does not remember finds it."""
    names = [f"r{number}" for number in range(20)]
    placement = Placement(names)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("serve.cluster.placement.REMEMBERED", 3)
        for affinity in "abcdeabcdeedcba":
            assert list(placement.tiers(affinity)[:FIRST]) == [[name] for name in ranked(affinity, names, 3)]
            assert ranked(affinity, names, 5) == ranked(affinity, names)[:5]


def test_contents_are_dealt_out_evenly() -> None:
    """A thousand contents on four replicas: none has less than a fifth or more than a third."""
    counts = Counter(tiers(f"sha256:{number}", ["r1", "r2", "r3", "r4"])[0][0] for number in range(1000))
    assert all(200 < count < 333 for count in counts.values())
