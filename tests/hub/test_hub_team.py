"""Teams on the Hub: aliases as branches, whole registries, cards with later scores, bases told apart, what is newer."""

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from huggingface_hub import ModelCard

from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.durable import digest_file
from adapterhub_local.errors import BadReference, Incompatible, InputError, InUse, NotFound
from adapterhub_local.hub import outdated, pull, push_all, search_hub
from adapterhub_local.hub.package import CARD, CURVE
from adapterhub_local.hub.scores import interval
from adapterhub_local.lora.config import CONFIG, WEIGHTS
from adapterhub_local.recipe import load_recipe
from adapterhub_local.registry import Registry
from adapterhub_local.settings import Home
from adapterhub_local.train.log_curves import MAX_POINTS, short_curve
from adapterhub_local.train.train import train
from tests.chats import write_recipe
from tests.hub_adapters import BASE, LINEAGE, REPO, is_untouched, peft_files, publish, pulled, pushed
from tests.hub_server import HubServer, Repo


def test_alias_is_a_branch_that_moves(hub: HubServer, registry: Registry) -> None:
    """--alias makes a branch at the version's own commit, moves it with the next version, and pulls by its name."""
    publish(registry)
    first = pushed(hub, registry, aliases=["prod", "beta"])
    publish(registry, seed=1)
    second = pushed(hub, registry, aliases=["prod"])

    repo = hub.repos[REPO]
    assert repo.branches == {"main": second.commit, "prod": second.commit, "beta": first.commit}
    assert len(repo.commits) == 3
    assert pulled(hub, registry, revision="beta", name="copy").commit == first.commit
    assert pushed(hub, registry, "sentiment@1", aliases=["prod"]).unchanged
    assert repo.branches["prod"] == first.commit


def test_branch_with_commits_of_its_own_is_not_moved(hub: HubServer, registry: Registry) -> None:
    """A branch that holds what is not a version stays, as do main and names that tags have."""
    publish(registry)
    pushed(hub, registry, aliases=["prod"])
    own = hub.repos[REPO].commit({"notes.txt": b"mine"}, "mine", "prod")
    publish(registry, seed=1)

    with pytest.raises(InUse, match=r"the branch prod of .* holds commits that are not pushed versions"):
        pushed(hub, registry, aliases=["prod"])
    assert hub.repos[REPO].branches["prod"] == own
    for wrong in ("main", "v3", "latest", "../x"):
        with pytest.raises(BadReference):
            pushed(hub, registry, aliases=[wrong])


def test_private_base_needs_a_hub_id(hub: HubServer, registry: Registry) -> None:
    """A base that was private when it was added is not named in public unless it is given."""
    publish(registry, base={**LINEAGE["base"], "private": True})

    with pytest.raises(InputError, match=f"made on {BASE}, which is private on the Hub.*give --base-id"):
        pushed(hub, registry)
    assert hub.requests == []
    assert pushed(hub, registry, base_id="org/public-copy").tag == "v1"


def test_whole_registry_goes_to_a_team(hub: HubServer, registry: Registry) -> None:
    """push --all sends every version and alias; a second time it sends nothing, and one failure stops no other."""
    publish(registry)
    publish(registry, seed=1)
    publish(registry, "group/tone", seed=2)
    publish(registry, "local", seed=3, hub_id=None)
    registry.set_alias("sentiment", "prod", 1)
    options = {"token": hub.token, "endpoint": hub.endpoint}

    done = push_all(registry, "team", **options)
    hub.requests.clear()
    again = push_all(registry, "team", **options)

    assert {one.reference: one.error is None for one in done} == {
        "group/tone@1": True, "local@1": False, "sentiment@1": True, "sentiment@2": True,
    }  # fmt: skip
    assert sorted(hub.repos) == ["team/group-tone", "team/sentiment"]
    repo = hub.repos["team/sentiment"]
    assert (sorted(repo.tags), repo.branches["prod"]) == (["v1", "v2"], repo.tags["v1"])
    assert "--base-id" in next(one.error for one in done if one.error)
    assert [one.result.unchanged for one in again if one.result] == [True] * 3
    assert (hub.lfs_bytes, hub.calls("POST", "/commit/")) == (0, [])
    publish(registry, "group-tone", seed=4)
    with pytest.raises(InputError, match="several names would go to team/group-tone"):
        push_all(registry, "team", **options)


def test_card_has_later_scores_beside_the_bases(hub: HubServer, registry: Registry) -> None:
    """A merge scored later is shown with its interval, beside the base's score on the same data from a parent."""
    publish(registry, metrics={"sentiment": {**LINEAGE["metrics"]["sentiment"], "data": "sha256:d"}})
    base = {**LINEAGE["metrics"]["sentiment"]["base"], "rows": 20}
    registry.add_evaluation(registry.resolve("sentiment"), "sentiment", {"base": base, "adapter": base, "data": "d1"})
    parents = [{"reference": "sentiment@1", "content_digest": "sha256:aa", "weight": 1.0}]
    merged = publish(registry, "both", seed=5, kind="merge", parents=parents, metrics={})
    score = {"rows": 20, "loss": 0.2, "exact_match": 0.9, "intervals": {"loss": [0.1, 0.31], "exact_match": "odd"}}
    registry.add_evaluation(merged, "sentiment", {"adapter": score, "data": "d1"})
    pushed(hub, registry, "both")

    text = hub.repos[REPO].files()[CARD].decode()

    assert "| sentiment | exact_match | 0.25 [0.112\N{EN DASH}0.469] | 0.9 [0.699\N{EN DASH}0.972] | 20 |" in text
    assert "| sentiment | loss | 2.5 | 0.2 [0.100\N{EN DASH}0.310] | 20 |" in text
    results = {result.metric_type: result.metric_value for result in ModelCard(text).data.eval_results}
    assert results == {"loss": 0.2, "exact_match": 0.9}


def test_interval_is_wilsons() -> None:
    """The 95 % interval of 8 in 10 is the textbook's, stays within 0 and 1, and is for shares only."""
    assert interval("exact_match", 0.8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert interval("exact_match", 0.0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert interval("loss", 0.8, 10) is None


def test_card_has_curve_licence_and_snippets(hub: HubServer, registry: Registry) -> None:
    """The training curve is a picture that parses, the licence is data, and each snippet names repository and tag."""
    curve = [[step, 2.0 / step] for step in range(1, 30)]
    base = {**LINEAGE["base"], "license": "apache-2.0"}
    publish(registry, base=base, training={"steps": 29, "loss": 0.1, "curve": curve}, description="Yes | no")
    pushed(hub, registry)
    files = hub.repos[REPO].files()
    text = files[CARD].decode()

    assert f"![Training loss]({CURVE})" in text
    lines = ElementTree.fromstring(files[CURVE]).findall("{http://www.w3.org/2000/svg}polyline")
    assert [len(line.attrib["points"].split()) for line in lines] == [29, 29]
    assert ModelCard(text).data.license == "apache-2.0"
    assert "Yes \\| no" in text
    python = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    compile(python, "card", "exec")
    assert f'"{REPO}", revision="v1"' in python
    assert "--max-lora-rank 8 \\\n  --lora-modules sentiment=./sentiment" in text
    assert f"hf download {REPO} --revision v1" in text
    publish(registry, base=base, seed=1)
    assert pushed(hub, registry, licence="mit").tag == "v2"
    assert ModelCard(hub.repos[REPO].files()[CARD].decode()).data.license == "mit"


def test_curve_that_is_kept_is_short() -> None:
    """A long log is averaged to few points; lines without a training loss are passed over."""
    long = short_curve([{"step": step, "loss": float(step)} for step in range(1, 1001)])

    assert (len(long), long[0], long[-1]) == (MAX_POINTS, [5, 3.0], [1000, 998.0])
    assert short_curve([{"step": 1, "loss": 3.0}, {"step": 1, "eval_loss": 9.0}]) == [[1, 3.0]]
    assert short_curve([]) == []


def test_trained_version_has_its_curve_on_its_card(
    hub: HubServer, registry: Registry, tiny_base: BaseInfo, tmp_path: Path
) -> None:
    """What `qhub train` publishes carries its curve, and its pushed card shows it."""
    version = train(load_recipe(write_recipe(tmp_path)), registry.home)
    pushed(hub, registry, str(version))

    assert [point[0] for point in version.lineage["training"]["curve"]] == [1, 2, 3, 4]
    assert b"<polyline" in hub.repos[REPO].files()[CURVE]


def test_base_by_id_and_revision_or_confirmed_by_shapes(
    hub: HubServer, registry: Registry, tiny_base: BaseInfo, tmp_path: Path
) -> None:
    """An adapter that names another base is not matched by its shapes alone, only when that is confirmed."""
    hub.repos[REPO] = repo = Repo()
    repo.commit(peft_files(tmp_path / "other", base_model_name_or_path="org/finetuned"))

    unknown = pulled(hub, registry)
    confirmed = pulled(hub, registry, base="tiny")
    again = pulled(hub, registry, base="tiny")
    repo.commit(peft_files(tmp_path / "named", base_model_name_or_path=tiny_base.hub_id))
    by_id = pulled(hub, registry)

    assert (unknown.base, unknown.fitting, unknown.version.base_fingerprint) == (None, ("tiny",), None)
    assert (confirmed.base, confirmed.matched_by, confirmed.is_new) == ("tiny", "shapes, confirmed", True)
    assert confirmed.version.lineage["base"] == {**tiny_base.lineage(), "matched_by": "shapes, confirmed"}
    assert (again.version, again.is_new) == (confirmed.version, False)
    assert (by_id.base, by_id.matched_by) == ("tiny", "hub_id")


def test_base_that_cannot_be_the_one_is_refused(
    hub: HubServer, registry: Registry, tiny_base: BaseInfo, tmp_path: Path
) -> None:
    """A base whose layers have other names or shapes is refused, be it named by the adapter or by the user."""
    hub.repos[REPO] = repo = Repo()
    files = peft_files(tmp_path / "wrong", base_model_name_or_path=tiny_base.hub_id)
    raw = files[WEIGHTS].replace(b"layers.0.self_attn.v_proj", b"layers.9.self_attn.v_proj")
    repo.commit({**files, WEIGHTS: raw})

    for options in ({}, {"base": "tiny"}):
        with pytest.raises(Incompatible, match=rf"{REPO}@.* adapts model\.layers\.9\.self_attn\.v_proj"):
            pulled(hub, registry, **options)
    with pytest.raises(NotFound, match="there is no base 'absent'"):
        pulled(hub, registry, base="absent")
    assert is_untouched(registry)


def test_our_version_can_be_put_on_another_base(
    hub: HubServer, registry: Registry, tiny_base: BaseInfo, home: Home
) -> None:
    """A version whose base is not here is pulled as it is; --base and --force put it on another, and record both.

    Without --force its fingerprint decides, as in `qhub add`.
    """
    publish(registry)
    pushed(hub, registry)

    with pytest.raises(
        Incompatible, match=rf"{REPO}@.* was made for another base .*base 'tiny' .*--force registers it"
    ):
        pulled(hub, registry, name="moved", base="tiny")
    moved = pulled(hub, registry, name="moved", base="tiny", force=True).version

    assert moved.lineage["forced"] is True
    assert moved.lineage["base"]["matched_by"] == "shapes, forced"
    assert moved.base_fingerprint == tiny_base.fingerprint
    assert moved.lineage["base_before"] == LINEAGE["base"]
    assert moved.lineage["metrics"] == LINEAGE["metrics"]
    assert b"abababab" not in (moved.path / WEIGHTS).read_bytes()


def test_search_finds_by_words_and_base(hub: HubServer, registry: Registry, tmp_path: Path) -> None:
    """Adapters are found by part of their id and by base; what is private or no adapter is not shown."""
    publish(registry)
    pushed(hub, registry)
    hub.repos["me/model"] = Repo(commits={})
    hub.repos["me/model"].commit({CONFIG: b"{}"})

    found = search_hub("sentiment", base=BASE, endpoint=hub.endpoint)

    assert [(one.repo_id, one.base, one.from_qhub) for one in found] == [(REPO, BASE, True)]
    assert search_hub("", base="org/none", endpoint=hub.endpoint) == []
    assert [one.repo_id for one in search_hub("", endpoint=hub.endpoint)] == [REPO]
    with pytest.raises(InputError, match="is not the id of a model"):
        search_hub("", base="/models/x", endpoint=hub.endpoint)


def test_newer_weights_on_the_hub_are_reported(hub: HubServer, registry: Registry, tmp_path: Path) -> None:
    """A pulled version is outdated when its repository has other weights; an edited card does not count."""
    hub.repos["them/plain"] = plain = Repo()
    plain.commit(peft_files(tmp_path / "plain"))
    publish(registry)
    pushed(hub, registry)
    pulled(hub, registry, name="ours")
    pull(registry, "them/plain", name="plain", endpoint=hub.endpoint)

    def state() -> dict[str, bool | None]:
        return {one.reference: one.newer for one in outdated(registry, endpoint=hub.endpoint)}

    assert state() == {"ours@1": False, "plain@1": False}
    hub.repos[REPO].commit({CARD: b"---\nlicense: mit\n---\nedited"})
    plain.commit({WEIGHTS: b"other weights"})
    assert state() == {"ours@1": False, "plain@1": True}
    publish(registry, seed=1)
    pushed(hub, registry)
    assert state()["ours@1"] is True
    del hub.repos["them/plain"]
    (gone,) = outdated(registry, "plain", endpoint=hub.endpoint)
    assert gone.newer is None
    assert "there is no repository them/plain" in gone.problem


def test_digest_of_pulled_weights_is_kept(hub: HubServer, registry: Registry, tmp_path: Path) -> None:
    """The lineage says which bytes were on the Hub, also where they were rewritten."""
    hub.repos[REPO] = repo = Repo()
    repo.commit(peft_files(tmp_path / "peft"))

    version = pulled(hub, registry).version

    assert version.lineage["pulled_from"]["weights"] == digest_file(tmp_path / "peft" / WEIGHTS)
