"""Traffic of a name split between aliases: shares, users who stay, aliases that move, and what the verb refuses."""

import json
from collections import Counter

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from adapterhub_local.cli.main import qhub
from adapterhub_local.errors import InputError, InUse, NotFound
from adapterhub_local.registry import Registry
from adapterhub_local.registry.marks import remove_alias
from adapterhub_local.registry.rebuild import rebuild
from adapterhub_local.registry.split import parse_split, set_split, side_of, split_of
from adapterhub_local.settings import Home
from tests.serve.adapter_makers import publish
from tests.serve.conftest import Server
from tests.stores import LINEAGE, files

SHARES = st.lists(st.integers(1, 100), min_size=1, max_size=5)


def test_shares_are_kept() -> None:
    """Of many users each side has its share, and of requests by nobody, too."""
    split = parse_split("canary=10,prod=90")
    users = Counter(side_of(split, "a", f"user{number}") for number in range(5000))
    nobody = Counter(side_of(split, "a", None) for _ in range(5000))
    for found in (users, nobody):
        assert abs(found["canary"] - 500) < 120  # 5 deviations are 106
        assert found["prod"] == 5000 - found["canary"]


@given(SHARES, st.text(), st.integers(1, 1000))
def test_users_stay_when_the_first_share_grows(shares: list[int], user: str, more: int) -> None:
    """A user has one side; one of the first side is still there when that side grows."""
    split = [(f"s{place}", share) for place, share in enumerate(shares)]
    side = side_of(split, "a", user)
    assert side_of(split, "a", user) == side
    if side == "s0":
        assert side_of([("s0", shares[0] + more), *split[1:]], "a", user) == "s0"


@pytest.mark.parametrize(
    "text", ["", "a", "a=", "a=0", "a=-1", "a=1,", "a=1,a=2", "a=1.5", "3=1", "latest=1", "a=9999999"]
)
def test_bad_splits(text: str) -> None:
    """What is not a split is refused."""
    with pytest.raises(InputError):
        parse_split(text)


def test_the_verb(home: Home) -> None:
    """`qhub alias split` sets, shows and ends a split; an alias in it cannot be removed, and all survives a rebuild."""
    registry = Registry(home)
    for seed, alias in ((1, "prod"), (2, "canary")):
        registry.publish("a", files(seed), LINEAGE, alias=alias)
    run = CliRunner().invoke
    assert run(qhub, ["alias", "split", "a", "canary=10,prod=90"]).exit_code == 0
    assert json.loads(run(qhub, ["alias", "split", "a", "--json"]).stdout) == {"canary": 10, "prod": 90}
    assert "90.0%" in run(qhub, ["alias", "split", "a"]).stdout
    assert isinstance(run(qhub, ["alias", "split", "a", "nobody=1"]).exception, NotFound)
    assert isinstance(run(qhub, ["alias", "split", "nothing"]).exception, NotFound)
    with pytest.raises(InUse, match="traffic"):
        remove_alias(registry, "a", "canary")
    rebuild(registry)
    assert split_of(registry, "a") == [("canary", 10), ("prod", 90)]
    assert run(qhub, ["alias", "split", "a", "--off"]).exit_code == 0
    assert split_of(registry, "a") == []
    remove_alias(registry, "a", "canary")


def test_split_over_http(server: Server) -> None:
    """Each user is answered by one version, a moved alias counts for the next request, and answers keep the name."""
    base = server.service.base.info
    publish(server.registry, "divided", base, seed=40, rank=2, alias="prod")
    publish(server.registry, "divided", base, seed=41, rank=2, alias="canary")
    set_split(server.registry, "divided", parse_split("canary=1,prod=1"))

    def version(user: str | None, model: str = "divided") -> int:
        more = {"user": user} if user is not None else {}
        answer = server.complete(model=model, prompt="Hi", max_tokens=1, **more).json()
        assert answer["model"] == model
        return answer["adapter"]["version"]

    sides = {user: version(user) for user in "abcdefghijklmnop"}
    assert {user: version(user, "tiny:divided") for user in sides} == sides
    assert {1, 2} == set(sides.values())
    assert {version(None) for _ in range(20)} == {1, 2}  # one side alone by chance: 2e-6
    assert (version("a", "divided@prod"), version("a", "divided@canary"), version("a", "divided@2")) == (1, 2, 2)
    publish(server.registry, "divided", base, seed=42, rank=2)
    server.registry.set_alias("divided", "prod", 3)
    assert {user: version(user) for user in sides} == {user: 3 if side == 1 else 2 for user, side in sides.items()}
    set_split(server.registry, "divided", [])
    assert {version(user) for user in "abcd"} == {3}
