"""The simulated fleet keeps its laws: what is asked ends, what is seen is the same each time, spill costs warmth."""

from dataclasses import replace

import pytest

from benchmarks.fleet_model import Shape
from benchmarks.fleet_traffic import Fleet, Traffic

TINY = Traffic(replicas=4, adapters=24, load=0.6, prompt=40, answer=12, warm=0.1, seconds=0.4)
CASES = {
    "roomy": (TINY, Shape(requests=8)),
    "full, and nobody waits": (replace(TINY, load=3.0, waiting=0), Shape(requests=4)),
    "few slots, little memory": (TINY, Shape(requests=8, slots=2, memory=8)),
    "more adapters asked for than memory holds": (TINY, Shape(requests=8, slots=2, memory=2)),
    "little room for keys and values": (replace(TINY, load=1.5), Shape(requests=8, kv_tokens=512)),
    "keys that may ask little": (replace(TINY, keys=3, rate=5), Shape(requests=8)),
    "all others asked": (replace(TINY, load=2.0, others="all"), Shape(requests=2)),
}


@pytest.mark.parametrize("kind", CASES)
def test_everything_ends(kind: str) -> None:
    """Each request is answered whole, or refused for a reason; every token is somebody's; nothing is held after."""
    fleet = Fleet(*CASES[kind])
    seen = fleet.run()

    assert len(fleet.asked) == seen["answered"] + sum(seen["refused"].values()) > 20
    for asked in fleet.asked:
        assert asked.ended is not None
        assert asked.ended >= asked.came
        assert asked.tokens == (asked.num_answer if asked.why is None else 0), asked
        assert (asked.first is None) == (asked.why is not None)
    assert fleet.total().num_tokens == sum(asked.tokens for asked in fleet.asked)
    assert fleet.num_waiting == 0
    assert not fleet.leases
    for replica in fleet.replicas.values():
        assert replica.num_running == 0
        assert not replica.scheduler.has_work
        assert not any(replica.pool.users().values())
        assert replica.pages.num_used == 0
        assert len(replica.slots) <= replica.shape.slots
        assert len(replica.pool) <= replica.shape.memory


def test_what_is_refused_has_its_reason() -> None:
    """Each bound is met where it should be, and only there."""
    reasons = {kind: set(Fleet(*case).run()["refused"]) for kind, case in CASES.items()}

    assert reasons["roomy"] == reasons["few slots, little memory"] == set()
    assert reasons["full, and nobody waits"] == {"waiting"}
    assert reasons["more adapters asked for than memory holds"] == {"memory"}
    assert reasons["keys that may ask little"] == {"rate"}


def test_a_seed_says_all() -> None:
    """The same seed gives the same figures, another one others."""
    assert Fleet(TINY).run() == Fleet(TINY).run() != Fleet(replace(TINY, seed=1)).run()


def test_spill_costs_warmth() -> None:
    """Where a replica takes fewer requests at once, more of them land on one that does not have their adapter yet."""
    traffic = replace(TINY, load=0.2, seconds=2.0)
    roomy, tight = (Fleet(traffic, Shape(requests=requests)) for requests in (64, 1))
    # as much is asked of both: what a replica can do is measured by its rows
    tight.traffic = replace(traffic, load=traffic.load * roomy.rate / tight.rate)
    before, after = roomy.run(), tight.run()

    assert before["asked"] == after["asked"]
    assert before["places"]["first"] == before["warm"] == 1.0
    assert after["places"]["first"] < 0.9
    assert after["warm"] < before["warm"]
    assert after["brought_per_second"] > 0
