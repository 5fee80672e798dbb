"""Pages of versions: every filter with every order, whole whatever others write, and quick with many versions."""

from itertools import product

import pytest

from adapterhub_local.errors import InputError, NotFound
from adapterhub_local.registry import Registry
from adapterhub_local.registry.catalog import Condition
from adapterhub_local.registry.graph import graph
from adapterhub_local.registry.listing import Page, Wanted, bases_in, page
from adapterhub_local.registry.marks import add_tags, describe
from tests.registry.test_registry_growth import chain
from tests.stores import files

BASES = ({"name": "tiny", "fingerprint": "sha256:" + "a" * 64}, {"name": "big", "fingerprint": "sha256:" + "b" * 64})


def fill(registry: Registry, names: int = 12, versions: int = 2) -> None:
    """Names with versions of two bases, half of them with scores."""
    for number, name in product(range(versions), range(names)):
        score = {"exact_match": name / names, "loss": 1 - name / names, "rows": 10}
        metrics = {"sql": {"adapter": score, "base": {"exact_match": 0.1}}} if name % 2 else {}
        lineage = {"kind": "train", "base": BASES[name % 3 == 0], "adapter": {"rank": 8}, "metrics": metrics}
        registry.publish(f"n{name:02}", files(name * 10 + number), lineage | {"description": f"about{name} things"})


def walk(registry: Registry, wanted: Wanted, limit: int = 5, meanwhile: int = 0) -> list[str]:
    """The references of all pages, while others publish `meanwhile` versions between any two."""
    shown: list[str] = []
    after, first = None, None
    while True:
        found = page(registry, wanted, after=after, limit=limit)
        first = first if first is not None else found.total
        assert found.total == first
        shown += [entry["reference"] for entry in found.entries]
        if (after := found.after) is None:
            assert len(shown) == first
            return shown
        for number in range(meanwhile):
            registry.publish(f"n{number:02}", files(1000 + number), {"kind": "merge", "metrics": {}})


@pytest.mark.parametrize("every", [False, True])
@pytest.mark.parametrize("sort", ["name", "created", "exact_match", "loss"])
def test_pages_hold_every_version_once_whatever_is_published_meanwhile(
    registry: Registry, sort: str, every: bool
) -> None:
    """All pages together are the list as it was at the first of them: nothing twice, nothing left out, in its order."""
    fill(registry)
    whole = page(registry, Wanted(sort=sort, every=every), limit=200)
    references = [entry["reference"] for entry in whole.entries]
    assert len(set(references)) == whole.total == (24 if every else 12)
    assert walk(registry, Wanted(sort=sort, every=every), meanwhile=20) == references


def test_filters_order_and_words_hold_together(registry: Registry) -> None:
    """What is found fits all that is asked at once, and of each name it is the newest that fits."""
    fill(registry)
    add_tags(registry, registry.resolve("n05@1"), ("keep",))
    describe(registry, registry.resolve("n07@2"), "a word apart")

    def found(**wanted: object) -> list[str]:
        return [entry["reference"] for entry in page(registry, Wanted(**wanted)).entries]

    assert found(tags=("keep",)) == ["n05@1"]
    assert found(words="apart") == ["n07@2"]
    assert found(words="about7") == ["n07@1"]  # it was said of the older one only
    assert found(words="about1 things", base="tiny") == ["n01@2", "n10@2", "n11@2"]
    assert found(words="!!") == found(words="nothing such") == found(base="none") == []
    assert found(base="sha256:" + "b" * 20) == ["n00@2", "n03@2", "n06@2", "n09@2"]
    assert found(base="tiny", sort="exact_match", task="sql", words="things")[:3] == ["n11@2", "n07@1", "n05@2"]
    assert found(conditions=(Condition.parse("exact_match>0.5"),), sort="loss") == ["n11@2", "n09@2", "n07@2"]
    assert found(allowed=["n01", "n02"], sort="created") == ["n02@2", "n01@2"]
    assert found(name="n03", every=True) == ["n03@2", "n03@1"]
    assert [base["num_versions"] for base in bases_in(registry)] == [16, 8]


def test_an_entry_says_what_a_row_shows(registry: Registry) -> None:
    """Aliases of the name, tags and size of the version, and of each task the newest scores."""
    fill(registry, 2)
    registry.set_alias("n01", "prod", 1)
    registry.add_evaluation(registry.resolve("n01@2"), "sql", {"adapter": {"exact_match": 0.75}})
    registry.add_evaluation(registry.resolve("n01@2"), "sql", {"adapter": {"exact_match": 0.5}})
    (entry,) = page(registry, Wanted(name="n01")).entries
    assert (entry["aliases"], entry["num_versions"], entry["rank"]) == ({"prod": 1}, 2, 8)
    assert entry["metrics"]["sql"] == {"adapter": {"exact_match": 0.5}}
    assert entry["size"] == sum(file.size for file in registry.resolve("n01@2").files)


@pytest.mark.parametrize("after", ["x", "W10", "WzEsMixbXSwwXQ", "é", "bnVsbA", "W251bGwsMSwiYSIsMV0"])
def test_what_is_not_a_place_is_refused(registry: Registry, after: str) -> None:
    """A cursor that we did not write is the asker's mistake, as are a page without entries and an unknown metric."""
    fill(registry, 2, 1)
    with pytest.raises(InputError, match=r"^'[^']*' is not a place in a list"):
        page(registry, Wanted(), after=after)
    with pytest.raises(InputError, match="limit is 0"):
        page(registry, Wanted(), limit=0)
    with pytest.raises(NotFound, match="did you mean exact_match"):
        page(registry, Wanted(sort="exact_mach"))


def test_nothing_there_is_an_empty_page(registry: Registry) -> None:
    """A home without a database has no versions, and none is made by looking."""
    assert page(registry, Wanted(sort="created")) == Page([], 0, None)
    assert not registry.home.database.exists()


def test_a_graph_has_each_version_once(registry: Registry) -> None:
    """Sixty levels of diamonds are as many nodes; a bound cuts what is furthest away, and says so."""
    top = chain(registry, 60)
    whole = graph(registry, top)
    references = [node["reference"] for node in whole.nodes if node["reference"]]
    assert len(references) == len(set(references)) == 123
    assert not whole.is_cut
    ids = {node["id"] for node in whole.nodes}
    assert {edge[end] for edge in whole.edges for end in ("from", "to")} == ids
    assert sum(edge["to"] == "n0" for edge in whole.edges) == 2
    cut = graph(registry, top, limit=10)
    assert cut.is_cut
    assert len(cut.nodes) == 10
    assert graph(registry, registry.resolve("a@1")).made_into == ["left@1", "r@1"]
