"""The table of hostile inputs is as long as it has to be, at every door, and says of each how it ends."""

from collections import Counter

from tests.corpus import corpus


def test_every_door_is_attacked() -> None:
    """Files, archives and requests by the dozen; no name twice at a door; each has an end that is a refusal."""
    members = list(corpus())
    counts = Counter(one.door for one in members)
    assert len(members) >= 400
    assert min(counts.values()) >= 14
    assert counts["request"] + counts["form"] >= 150
    assert counts["archive"] >= 70
    assert max(Counter((one.door, one.name) for one in members).values()) == 1
    assert {one.end for one in members} <= {"exit 1", "exit 2", "nothing", "200", "400", "403", "404", "413", "429"}
    assert sum(one.end in ("200", "nothing") for one in members) < 12
