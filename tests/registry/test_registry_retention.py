"""Retention and quota: what is removed and what stays and why, and a home that may hold no more."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from adapterhub_local.errors import InputError, OverQuota
from adapterhub_local.registry import Registry
from adapterhub_local.registry.archive import read_archive, write_archive
from adapterhub_local.registry.gc import collect, lease
from adapterhub_local.registry.marks import rollback
from adapterhub_local.registry.quota import measure
from adapterhub_local.registry.retention import choose, retire
from adapterhub_local.registry.split import set_split
from adapterhub_local.settings import environment_in
from tests.stores import LINEAGE, files


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    """`a` with ten versions: prod is 3 and was 2, 4 is leased, 1 is a parent of b@1."""
    made = Registry(tmp_path / "home")
    for seed in range(10):
        made.publish("a", files(seed), LINEAGE)
    made.set_alias("a", "prod", 2)
    made.set_alias("a", "prod", 3)
    set_split(made, "a", [("prod", 1)])
    lease(made, made.resolve("a@4"), "server", 3600)
    first = made.resolve("a@1")
    parent = {"reference": "a@1", "manifest_digest": first.manifest_digest, "weight": 1.0}
    made.publish("b", files(50), {**LINEAGE, "parents": [parent]})
    return made


def test_what_something_needs_is_kept_and_says_why(registry: Registry) -> None:
    """Newest, aliased, rolled back to, leased and parents of kept versions stay; all others go."""
    chosen = choose(registry, 2, clock=time.time())
    assert [str(version) for version in chosen.drop] == ["a@5", "a@6", "a@7", "a@8"]
    assert chosen.keep == {
        "a@9": "one of the 2 newest", "a@10": "one of the 2 newest", "b@1": "one of the 2 newest",
        "a@3": "a@prod points to it", "a@2": "a rollback of a@prod goes to it", "a@4": "a running server uses it",
        "a@1": "b@1 was made of it",
    }  # fmt: skip
    done = retire(registry, chosen)
    assert (len(done.drop), done.refused) == (4, [])
    assert rollback(registry, "a", "prod") == 2
    collect(registry, apply=True, grace=-1)
    for reference in ("a@1", "a@2", "a@3", "a@4", "a@10", "b@1"):
        assert registry.resolve(reference).path.is_dir()


def test_aliased_versions_may_be_counted_apart(tmp_path: Path) -> None:
    """With it, the newest N are those without an alias; without it, an aliased version is one of the N."""
    registry = Registry(tmp_path)
    for seed in range(5):
        registry.publish("a", files(seed), LINEAGE)
    registry.set_alias("a", "prod", 5)
    kept = [choose(registry, 2, aliased_apart=apart, clock=0.0).keep.keys() for apart in (False, True)]
    assert [sorted(names) for names in kept] == [["a@4", "a@5"], ["a@3", "a@4", "a@5"]]


def test_parents_of_what_goes_go_with_it(tmp_path: Path) -> None:
    """A chain of merges that nobody keeps is removed whole, children before parents; a kept end keeps the chain."""
    registry = Registry(tmp_path)
    made = [registry.publish("m", files(0), LINEAGE)]
    for seed in range(1, 4):
        parent = {"reference": str(made[-1]), "manifest_digest": made[-1].manifest_digest, "weight": 1.0}
        made.append(registry.publish("m", files(seed), {**LINEAGE, "parents": [parent]}))
    assert choose(registry, 1, clock=0.0).drop == []
    registry.publish("m", files(9), LINEAGE)
    done = retire(registry, choose(registry, 1, clock=0.0))
    assert [str(version) for version in done.drop] == ["m@1", "m@2", "m@3", "m@4"]
    assert [str(version) for version in registry.versions()] == ["m@5"]


def test_what_is_needed_by_now_stays(registry: Registry) -> None:
    """An alias that was set after the choice keeps its version, which is reported."""
    chosen = choose(registry, 2, clock=time.time())
    registry.set_alias("a", "late", 6)
    done = retire(registry, chosen)
    assert [str(version) for version in done.drop] == ["a@5", "a@7", "a@8"]
    assert len(done.refused) == 1
    assert done.refused[0].startswith("a@6 is a@late")
    assert registry.resolve("a@late").number == 6


def test_nothing_is_removed_without_apply(registry: Registry) -> None:
    """`qhub gc --keep` says what it would remove and keep; with --apply it does."""
    qhub = [sys.executable, "-m", "adapterhub_local", "gc", "--keep", "2", "--keep-aliased", "--json"]
    env = environment_in(registry.home)
    for words, left in (([], 11), (["--apply"], 7)):
        done = subprocess.run([*qhub, *words], env=env, capture_output=True, text=True, check=True)
        retention = json.loads(done.stdout)["retention"]
        assert retention["removed"] == ["a@5", "a@6", "a@7", "a@8"]
        assert retention["bytes"] == 4 * registry.resolve("a@9").files[1].size
        assert len(registry.versions()) == left
    with pytest.raises(InputError, match="keep at least the newest"):
        choose(registry, 0, clock=0.0)


def test_a_home_that_may_hold_no_more_refuses_to_publish(registry: Registry, tmp_path: Path) -> None:
    """A version that would go over max_bytes is refused with what takes the room, and nothing is left of it."""
    used = sum(measure(registry.home).values())
    registry.home.config.write_text(f'max_bytes = "{used + 5000}B"\n')
    registry.publish("a", files(60), LINEAGE)
    before = sorted(path.name for path in registry.blobs.paths())
    big = {"adapter_model.safetensors": bytes(10_000), "adapter_config.json": b"{}"}
    with pytest.raises(OverQuota, match=r"the home may hold .* need 10,\d+ more: nothing was registered. `qhub gc"):
        registry.publish("a", big, LINEAGE)
    assert sorted(path.name for path in registry.blobs.paths()) == before
    registry.set_alias("a", "prod", 9)  # what takes no room goes on
    registry.home.config.write_text("max_bytes = 0\n")
    write_archive(registry, registry.resolve("b@1"), tmp_path / "b.tar")
    other = Registry(tmp_path / "other")
    other.home.root.mkdir()
    other.home.config.write_text('max_bytes = "1B"\n')
    with pytest.raises(OverQuota):
        read_archive(other, tmp_path / "b.tar")
    assert other.versions() == []


def test_a_file_with_several_names_is_measured_once(registry: Registry) -> None:
    """Folders of links take no room of their own."""
    before = sum(measure(registry.home).values())
    assert registry.resolve("a@9").path.is_dir()
    assert sum(measure(registry.home).values()) == before
