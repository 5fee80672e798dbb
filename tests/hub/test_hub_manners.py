"""Manners on the Hub: what people wrote stays, main stays at the newest, waits are waited, refusals say why."""

import pytest
from huggingface_hub import ModelCard

from adapterhub_local.errors import HubError, InputError
from adapterhub_local.hub import patience, push_all
from adapterhub_local.hub.edited import BEGIN, END, block, merged
from adapterhub_local.hub.licences import LICENCES, check_licence
from adapterhub_local.hub.package import CARD
from adapterhub_local.lora.config import WEIGHTS
from adapterhub_local.registry import Registry
from tests.hub_adapters import REPO, publish, pulled, pushed
from tests.hub_server import HubServer


def card(hub: HubServer, revision: str = "main") -> str:
    """The model card in the repository."""
    return hub.repos[REPO].files(revision)[CARD].decode()


def test_an_edited_card_keeps_what_people_wrote(hub: HubServer, registry: Registry) -> None:
    """Language, licence and text around our block stay; our block and our keys are those of the version."""
    publish(registry)
    pushed(hub, registry)
    text = card(hub).replace(
        "---\n\n" + BEGIN, "language: de\nlicense: llama3.2\nextra: [1]\n---\n\nLegal.\n\n" + BEGIN
    )
    text = text.replace("tags:\n", "tags:\n- ours-too\n").replace("peft", "other", 1) + "\n## Contact\n\nMe.\n"
    assert "language: de" in text
    hub.repos[REPO].commit({CARD: text.encode(), "LICENSE": b"words"})
    publish(registry, seed=1, description="the second")

    pushed(hub, registry)

    data, body = ModelCard(card(hub)).data, ModelCard(card(hub)).text
    assert (data.language, data.license, data["extra"], data.library_name) == ("de", "llama3.2", [1], "peft")
    assert data.tags == ["ours-too", "lora", "qlora", "qhub"]
    assert body.strip().startswith("Legal.\n\n" + BEGIN)
    assert body.strip().endswith(END + "\n\n## Contact\n\nMe.")
    assert "the second" in body
    assert "`sentiment@2`" in body
    assert "`sentiment@1` is" not in body
    assert hub.repos[REPO].files()["LICENSE"] == b"words"
    publish(registry, seed=2)
    pushed(hub, registry, licence="mit")
    assert ModelCard(card(hub)).data.license == "mit"  # asked for


def test_a_card_that_is_theirs_alone_stays_below_ours(hub: HubServer, registry: Registry) -> None:
    """A repository with a card of its own keeps all of it; one whose front matter is not YAML is not touched."""
    publish(registry)
    pushed(hub, registry)
    hub.repos[REPO].commit({CARD: b"# Mine\n\nAll about it.\n"})
    publish(registry, seed=1)
    pushed(hub, registry)
    assert card(hub).endswith(END + "\n\n# Mine\n\nAll about it.\n")

    hub.repos[REPO].commit({CARD: b"---\n: [\n---\nx"})
    publish(registry, seed=2)
    with pytest.raises(InputError, match=r"front matter of the model card of .* is not YAML"):
        pushed(hub, registry)
    assert sorted(hub.repos[REPO].tags) == ["v1", "v2"]


@pytest.mark.parametrize(
    "theirs", ["", "# x", "---\nlicense: mit\n---\n", "---\nlicense: mit\n---", "---\r\na: 1\r\n---\r\nb"]
)
def test_merging_cards_twice_is_merging_once(theirs: str) -> None:
    """Whatever was there: the second push of the same card changes nothing, and a marker in our text ends nothing."""
    ours = f"---\nlicense: apache-2.0\ntags:\n- lora\n---\n\n{block(f'# T {END} x')}\n"
    once = merged(theirs, ours, is_licence_asked=False, where="r")
    assert merged(once, ours, is_licence_asked=False, where="r") == once
    assert once.count("# T") == 1
    assert ("license: mit" in once) == ("mit" in theirs)


def test_main_stays_at_the_newest(hub: HubServer, registry: Registry) -> None:
    """An older version pushed later has its tag and its branches, and main stays at the newer one."""
    first, second = publish(registry), publish(registry, seed=1)
    newest = pushed(hub, registry, "sentiment@2")

    older = pushed(hub, registry, "sentiment@1", aliases=["prod"])

    repo = hub.repos[REPO]
    assert repo.tags == {"v1": older.commit, "v2": newest.commit}
    assert repo.branches == {"main": newest.commit, "prod": older.commit}
    assert repo.files("v1")[WEIGHTS] == (first.path / WEIGHTS).read_bytes()
    assert repo.files()[WEIGHTS] == (second.path / WEIGHTS).read_bytes()
    assert pushed(hub, registry, "sentiment@1").unchanged
    publish(registry, seed=2)
    publish(registry, seed=3)
    pushed(hub, registry, "sentiment@4")
    moved = pushed(hub, registry, "sentiment@3", to_main=True)
    assert repo.branches["main"] == moved.commit


def test_an_older_push_that_was_cut_off_is_finished(hub: HubServer, registry: Registry) -> None:
    """If the tag could not be made, pushing again takes the commit that is there and leaves no branch behind."""
    publish(registry)
    publish(registry, seed=1)
    newest = pushed(hub, registry, "sentiment@2")
    hub.disturb("/tag/", 400)
    with pytest.raises(HubError):
        pushed(hub, registry, "sentiment@1")

    older = pushed(hub, registry, "sentiment@1")

    repo = hub.repos[REPO]
    assert repo.branches == {"main": newest.commit}
    assert repo.tags == {"v1": older.commit, "v2": newest.commit}
    assert len(repo.commits) == 3


@pytest.mark.parametrize(
    "part", ["/api/repos/create", "/refs", "/preupload/", "/commit/", "/tag/", "/branch/", "/resolve/"]
)
@pytest.mark.parametrize("status", [429, 503])
def test_every_call_is_asked_again(
    hub: HubServer, registry: Registry, part: str, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too many requests and a server in trouble, twice at any call: one commit, one tag, one branch in the end."""
    monkeypatch.setattr(patience.time, "sleep", lambda seconds: None)
    publish(registry)
    hub.disturb(part, status, 2)

    result = pushed(hub, registry, aliases=["prod"])
    pulled(hub, registry, name="other", revision="prod")

    repo = hub.repos[REPO]
    assert repo.tags == {"v1": result.commit}
    assert repo.branches == {"main": result.commit, "prod": result.commit}
    assert len(repo.commits) == 2


def test_a_whole_registry_is_pushed_under_a_limit(
    hub: HubServer, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many versions to a Hub that answers few requests at a time: all there, after the waits it asked for, told."""
    waits, notes = [], []
    monkeypatch.setattr(patience.time, "sleep", waits.append)
    hub.requests_left, hub.window, hub.reset = 20, 20, 55
    for seed in range(12):
        publish(registry, seed=seed)

    done = push_all(registry, "me", token=hub.token, endpoint=hub.endpoint, note=notes.append)

    assert [one.error for one in done] == [None] * 12
    assert sorted(hub.repos["me/sentiment"].tags) == sorted(f"v{number}" for number in range(1, 13))
    assert hub.repos["me/sentiment"].branches["main"] == hub.repos["me/sentiment"].tags["v12"]
    assert set(waits) <= {55, 56}  # the client waits a second more where it waits itself
    assert notes[0] == "the Hub asks to wait 55 s (too many requests)"


def test_a_limit_without_end_is_reported(hub: HubServer, registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wait longer than anybody waits is not begun."""
    waits = []
    monkeypatch.setattr(patience.time, "sleep", waits.append)
    publish(registry)
    hub.requests_left, hub.reset = 0, 100_000
    with pytest.raises(HubError, match=r"with 429 .*for longer than is waited"):
        pushed(hub, registry)
    assert waits == []


def test_a_refused_card_says_why_and_leaves_nothing(
    hub: HubServer, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Hub's reason is shown whole, and the repository made for the push is gone; one that was there stays."""
    publish(registry)
    text = "---\nlanguage: klingon\n---\n"
    with monkeypatch.context() as patch:
        patch.setattr("adapterhub_local.hub.package.card", lambda *arguments, **options: text)
        with pytest.raises(InputError, match='model card of sentiment@1: "language" must only contain lowercase'):
            pushed(hub, registry)
    assert hub.repos == {}
    pushed(hub, registry)
    hub.repos[REPO].commit({CARD: text.encode()})
    publish(registry, seed=1)
    with pytest.raises(InputError, match='"language" must only contain lowercase'):
        pushed(hub, registry)
    assert list(hub.repos[REPO].tags) == ["v1"]


def test_licences_are_those_of_the_hub(hub: HubServer, registry: Registry) -> None:
    """A slip is answered with the nearest names; `other` has a name and a link, on the card too."""
    for given, told in (("apache2", "apache-2.0"), ("MIT", "mit"), ("all rights reserved", "--license other")):
        with pytest.raises(InputError, match="is not a licence that the Hub knows") as caught:
            check_licence(given, None, None)
        assert told in str(caught.value)
    for given, name, link, told in (
        ("other", None, None, "needs a name and a link"), ("other", "x", None, "needs a name"),
        ("other", "x", "javascript:1", "is not a link"), ("mit", "x", None, "are for --license other"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=told):
            check_licence(given, name, link)
    assert {"apache-2.0", "llama3.2", "gemma", "other"} < LICENCES
    publish(registry)
    pushed(hub, registry, licence="other", licence_name="house-1", licence_link="https://example.com/licence")
    data = ModelCard(card(hub)).data
    assert (data.license, data.license_name, data.license_link) == ("other", "house-1", "https://example.com/licence")
    publish(registry, seed=1, base={"hub_id": "someone/tiny", "license": "other", "fingerprint": None})
    with pytest.raises(InputError, match="--license other --license-name NAME"):
        pushed(hub, registry)
