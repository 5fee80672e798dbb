"""What an adapter's page changes: two tabs, protected aliases, keys for some adapters, and forms that are wrong."""

import html
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from adapterhub_local.keys import Keys
from adapterhub_local.registry import Registry
from adapterhub_local.registry.marks import alias_log, description_of, tags_of
from adapterhub_local.registry.protecting import approvals_of, protect
from adapterhub_local.registry.split import set_split
from tests.serve.conftest import Server
from tests.serve.console.conftest import HOSTILE, Console
from tests.serve.console.hostile import TEXT, publish_hostile
from tests.serve.console.test_pages import Look
from tests.serve.console.test_sessions import client, sign_in
from tests.stores import LINEAGE, files

NAME = "team/tone"  # a slash stands in addresses, too
PAGE = f"/console/adapters/{NAME}"


@pytest.fixture
def place(registry: Registry) -> Iterator[Console]:
    """Three versions with scores; prod went 1, 2, and canary points to 3; another adapter beside."""
    for seed, score in enumerate((0.9, 0.5, 0.7)):
        metrics = {"task": {"adapter": {"exact_match": score, "rows": 10}}}
        registry.publish(NAME, files(seed), LINEAGE | {"description": HOSTILE, "metrics": metrics})
    registry.publish("sql-a", files(9), LINEAGE)
    for alias, number in (("prod", 1), ("prod", 2), ("canary", 3)):
        registry.set_alias(NAME, alias, number)
    running = Console(registry)
    yield running
    running.stop()


@pytest.fixture
def two(place: Console) -> Console:
    """The same with keys: two administrators, one of another adapter, and one who only asks."""
    keys = Keys(place.registry.home)
    place.keys = {
        "ada": keys.create(scopes=("infer", "admin"))[1],
        "bob": keys.create(scopes=("admin",))[1],
        "sql": keys.create(scopes=("admin",), adapters=("sql*",))[1],
        "viewer": keys.create(scopes=("infer",))[1],
    }
    return place


def fields(page: str, action: str, button: str = "") -> dict[str, str]:
    """The hidden fields of the form of a page that has a button with this text."""
    forms = re.findall(rf'<form method="post" action="{action}"[^>]*>(.*?)</form>', page, re.S)
    form = next(one for one in forms if button in one)
    found = re.findall(r'<input type="hidden" name="([^"]+)" value="([^"]*)">', form)
    return {name: html.unescape(value) for name, value in found}


def test_a_rollback_is_confirmed_and_is_what_was_shown(place: Console, look: Look) -> None:
    """Without JavaScript: the page says where it goes; a second tab that shows an older state changes nothing."""
    first, second = (look(place.url + PAGE, java_script_enabled=False, expected=("409",)) for _ in range(2))
    for tab in (first, second):
        tab.get_by_role("link", name="Roll prod back to 1").click()
        assert "will point to version 1" in tab.inner_text("main")
    assert place.registry.aliases(NAME)["prod"] == 2  # a link changes nothing
    first.get_by_role("button", name="Roll back to 1").click()
    assert first.url.endswith(f"{PAGE}#aliases")
    assert place.registry.aliases(NAME)["prod"] == 1
    second.get_by_role("button", name="Roll back to 1").click()
    said = second.get_by_role("alert").inner_text()
    assert said == f"{NAME}@prod points to 1, not to 2: nothing was changed"
    assert place.registry.aliases(NAME)["prod"] == 1
    assert [one["action"] for one in alias_log(place.registry, NAME, "prod")] == ["set", "set", "rollback"]
    first.get_by_role("link", name="Remove canary").click()
    first.get_by_role("button", name="Remove canary").click()
    assert place.registry.aliases(NAME) == {"prod": 1}


def test_a_rollback_goes_nowhere_else(place: Console) -> None:
    """An alias that points where the page said, but came there another way, is not rolled back to somewhere else."""
    with client(place) as browser:
        page = browser.get("/console/alias", params={"name": NAME, "alias": "prod", "do": "rollback"}).text
        shown = fields(page, "/console/alias/rollback")
        assert shown == {"name": NAME, "alias": "prod", "expect": "2", "to": "1"}
        for number in (3, 2):
            place.registry.set_alias(NAME, "prod", number)
        said = browser.post("/console/alias/rollback", data=shown)
        assert said.status_code == 409
        assert f"before that {NAME}@prod pointed to 3, not to 1" in said.text
        assert "Roll back to 3" in said.text  # the page that asks again is of now
        body = {"alias": "prod", "expect": 2, "to": 1}
        assert browser.post(f"/v1/registry/aliases/{NAME}", json=body).status_code == 409
        assert place.registry.aliases(NAME)["prod"] == 2
        assert browser.post(f"/v1/registry/aliases/{NAME}", json={**body, "to": 3}).json()["aliases"]["prod"] == 3


def test_a_removal_is_refused_with_its_reason(place: Console) -> None:
    """An alias that is protected, has traffic, or has moved since stays, and the page says what to do first."""
    protect(place.registry, NAME, "prod", ["task.exact_match>=0.8"])
    set_split(place.registry, NAME, [("canary", 1), ("prod", 9)])
    with client(place) as browser:
        for alias, expect, reason in (
            ("prod", "2", "answers a part of"),
            ("canary", "3", "answers a part of"),
        ):
            form = {"name": NAME, "alias": alias, "expect": expect}
            said = browser.post("/console/alias/remove", data=form)
            assert (said.status_code, reason in said.text) == (409, True)
        set_split(place.registry, NAME, [])
        said = browser.post("/console/alias/remove", data={"name": NAME, "alias": "prod", "expect": "2"})
        assert "is protected and cannot be removed: `qhub alias unprotect" in said.text
        assert "asks of a version: task.exact_match&gt;=0.8" in said.text
        said = browser.post("/console/alias/remove", data={"name": NAME, "alias": "canary", "expect": "1"})
        assert "points to 3, not to 1: nothing was changed" in said.text
    assert place.registry.aliases(NAME) == {"prod": 2, "canary": 3}


def test_approvals_of_two_people_move_a_protected_alias(two: Console) -> None:
    """The page names all that a version lacks for whoever looks, refuses with the same, and takes approvals."""
    protect(two.registry, NAME, "prod", ["task.exact_match>=0.8", "task.loss<=1"], 1)
    with sign_in(two, "ada") as ada, sign_in(two, "bob") as bob:
        page = ada.get(f"{PAGE}?v=2").text
        reasons = re.findall(r"<li>(.*?)</li>", page)
        assert len(reasons) == 3
        assert "has 0.5" in reasons[0]
        assert "has no score task.loss" in reasons[1]
        assert "1 approval from others than key:" in reasons[2]
        move = fields(page, "/console/alias", "Move") | {"alias": "prod", "version": "3"}
        refused = ada.post("/console/alias", data=move)
        assert refused.status_code == 409
        for words in ("has 0.7", "has no score task.loss", "1 approval from others", "Nothing was changed"):
            assert words in refused.text
        protect(two.registry, NAME, "prod", ["task.exact_match>=0.8"], 1)
        vote = fields(ada.get(f"{PAGE}?v=1").text, "/console/approvals") | {"do": "approve"}
        assert vote["reference"] == f"{NAME}@1"
        assert ada.post("/console/approvals", data=vote).headers["location"].endswith("?v=1#aliases")
        assert "who moves it, does not count" in ada.get(f"{PAGE}?v=1").text
        assert "Nothing: you may move prod here." in bob.get(f"{PAGE}?v=1").text
        assert bob.post("/console/approvals", data=vote).status_code == 303
        assert len(approvals_of(two.registry, two.registry.resolve(f"{NAME}@1"))) == 2
        assert ada.post("/console/approvals", data=vote | {"do": "withdraw"}).status_code == 303
        again = ada.post("/console/approvals", data=vote | {"do": "withdraw"})
        assert (again.status_code, "nothing was taken back" in again.text) == (404, True)
        assert ada.post("/console/alias", data=move | {"version": "1"}).status_code == 303
    assert two.registry.aliases(NAME)["prod"] == 1
    assert alias_log(two.registry, NAME, "prod")[-1]["actor"] == f"key:{two.keys['ada'].split('-')[1]}"


def test_a_description_is_not_overwritten(place: Console) -> None:
    """The field has the text to the letter; a tab that shows an older one changes nothing; over the API likewise."""
    with client(place) as browser:
        place.registry.publish("plain", files(3), LINEAGE | {"description": 'says "ja" & <b>nein</b>'})
        page = browser.get("/console/adapters/plain").text
        assert 'name="text" value="says &#34;ja&#34; &amp; &lt;b&gt;nein&lt;/b&gt;"' in page
        form = fields(page, "/console/description") | {"text": "the first"}
        assert browser.post("/console/description", data=form).headers["location"].endswith("?v=1#about")
        late = browser.post("/console/description", data=form | {"text": "the second"})
        assert late.status_code == 409
        assert "plain@1 has another description now: nothing was changed" in late.text
        assert description_of(place.registry, place.registry.resolve("plain")) == "the first"
        path = "/v1/registry/descriptions/plain@1"
        assert browser.put(path, json={"text": "third", "expect": "an old one"}).status_code == 409
        assert browser.put(path, json={"text": "third", "expect": "the first"}).status_code == 200
        hidden = fields(browser.get(f"{PAGE}?v=1").text, "/console/description")
        assert browser.post("/console/description", data=hidden | {"text": "plainer"}).status_code == 303
        none = place.registry.publish("none", files(4), {k: v for k, v in LINEAGE.items() if k != "description"})
        body = {"text": "new", "expect": ""}
        assert [browser.put(f"/v1/registry/descriptions/{none}", json=body).status_code for _ in "12"] == [200, 409]


WRONG = {
    "no number": ("/console/alias", {"name": NAME, "alias": "prod", "version": "two"}, "must be a whole number"),
    "no version": ("/console/alias", {"name": NAME, "alias": "prod"}, "write the number of the version"),
    "unreadable": ("/console/alias", {"name": NAME, "alias": "prod", "version": "1", "state": "[" * 9999}, "load its"),
    "a truth": ("/console/alias", {"name": NAME, "alias": "prod", "version": "1", "state": '{"prod": true}'}, "load"),
    "a bad alias": ("/console/alias", {"name": NAME, "alias": "a b", "version": "1"}, "a b"),
    "nothing there": ("/console/alias", {"name": NAME, "alias": "prod", "version": "9"}, "9"),
    "huge": ("/console/alias", {"name": NAME, "alias": "prod", "version": "9" * 30}, "9"),
    "no expectation": ("/console/alias/remove", {"name": NAME, "alias": "prod"}, "load its page again"),
    "no target": ("/console/alias/rollback", {"name": NAME, "alias": "prod", "expect": "2"}, "load its page again"),
    "no alias": ("/console/alias/remove", {"name": NAME, "alias": "beta", "expect": "1"}, "there is no alias"),
    "no adapter": ("/console/alias/remove", {"name": "gone", "alias": "beta", "expect": "1"}, "there is no adapter"),
    "no name": ("/console/alias", {"name": "", "alias": "prod", "version": "1"}, "is not a name"),
    "a hostile name": ("/console/alias", {"name": HOSTILE, "alias": "prod", "version": "1"}, "is not a name"),
    "a hostile tag": ("/console/tags", {"reference": f"{NAME}@1", "tag": HOSTILE}, "is not a tag"),
    "no such tag": ("/console/tags", {"reference": f"{NAME}@1", "tag": "x", "do": "remove"}, "has no tag"),
    "two lines": ("/console/description", {"reference": f"{NAME}@1", "text": "a\nb"}, "is one line of text"),
    "no text": ("/console/description", {"reference": f"{NAME}@1", "text": " "}, "is one line of text"),
    "long": ("/console/description", {"reference": f"{NAME}@1", "text": "a" * 2001}, "at most 2,000"),
    "not approved": (
        "/console/approvals",
        {"reference": f"{NAME}@1", "alias": "prod", "do": "withdraw"},
        "nothing was taken",
    ),
    "no model": ("/console/hold", {"reference": f"{NAME}@1", "do": "load"}, "there is no model here"),
    "no job": ("/console/jobs/cancel", {"job": "../x"}, "there is no such job"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_form_changes_nothing_and_says_why(place: Console, kind: str) -> None:
    """Each is answered by a page with a reason, and the registry is as it was."""
    path, form, reason = WRONG[kind]
    registry = place.registry
    before = len(registry.database.rows("SELECT 1 FROM marks"))
    with client(place, headers={"Accept": "text/html"}) as browser:
        said = browser.post(path, data=form)
        assert said.status_code in (400, 404, 409)
        assert said.headers["content-type"].startswith("text/html")
        alert = re.search(r'role="alert" class="message">(.*?)</p>', said.text, re.S)
        assert alert is not None
        assert reason in html.unescape(alert[1])
        if form.get("name", form.get("reference", "")).startswith(NAME) and path != "/console/alias/remove":
            assert 'id="aliases"' in said.text or "<h1>Roll back" in said.text  # the page that the form is on
    assert len(registry.database.rows("SELECT 1 FROM marks")) == before
    assert tags_of(registry, registry.resolve(f"{NAME}@1")) == []


FORMS: dict[str, dict[str, str]] = {
    "/console/alias": {"name": NAME, "alias": "prod", "version": "3", "state": '{"prod": 2}'},
    "/console/alias/rollback": {"name": NAME, "alias": "prod", "expect": "2", "to": "1"},
    "/console/alias/remove": {"name": NAME, "alias": "prod", "expect": "2"},
    "/console/approvals": {"reference": f"{NAME}@1", "alias": "prod"},
    "/console/description": {"reference": f"{NAME}@1", "text": "mine", "state": ""},
    "/console/tags": {"reference": f"{NAME}@1", "tag": "mine"},
    "/console/hold": {"reference": f"{NAME}@1", "do": "pin"},
}


def test_who_may_not_change_sees_no_forms_and_changes_nothing(two: Console) -> None:
    """A key that only asks has no form on the page; nor can one for other adapters send any, or read what is asked."""
    protect(two.registry, NAME, "prod", [], 1)
    before = len(two.registry.database.rows("SELECT 1 FROM marks"))
    with sign_in(two, "viewer") as viewer, sign_in(two, "sql") as other:
        page = viewer.get(f"{PAGE}?v=1").text
        assert set(re.findall(r'<form method="post" action="([^"]+)"', page)) == {"/console/logout"}
        assert "1 approval" in page  # what is asked of a version is no secret
        assert "/console/alias" not in page
        for path, form in FORMS.items():
            assert viewer.post(path, data=form).status_code == 403
            refused = other.post(path, data=form)
            assert refused.status_code == 403
            assert HOSTILE[:8] not in refused.text
        asked = {"name": NAME, "alias": "prod", "do": "remove"}
        assert [one.get("/console/alias", params=asked).status_code for one in (viewer, other)] == [403, 403]
    assert len(two.registry.database.rows("SELECT 1 FROM marks")) == before


def test_forms_of_other_pages_do_nothing(place: Console) -> None:
    """What another site's page sends is refused at every form, whatever it would do."""
    before = len(place.registry.database.rows("SELECT 1 FROM marks"))
    headers = {"Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site"}
    with client(place, headers=headers) as foreign:
        for path, form in FORMS.items():
            assert foreign.post(path, data=form).status_code == 403
    assert len(place.registry.database.rows("SELECT 1 FROM marks")) == before


def test_an_adapter_is_kept_in_memory_from_its_page(full_server: Server) -> None:
    """Pinned, it is held under its reference and in a slot; released, it is not; a name that is not held is refused."""
    with httpx.Client(base_url=full_server.url, trust_env=False, timeout=60) as browser:

        def state() -> dict[str, Any]:
            listed = browser.get("/v1/adapters").json()["data"]
            return next((one for one in listed if one["name"] == "origin@1"), {})

        page = browser.get("/console/adapters/origin").text
        form = fields(page, "/console/hold")
        assert form == {"reference": "origin@1"}
        assert browser.post("/console/hold", data=form | {"do": "load"}).headers["location"].endswith("?v=1#held")
        assert (state()["is_held"], state()["is_pinned"]) == (True, False)
        assert browser.post("/console/hold", data=form | {"do": "pin"}).status_code == 303
        assert state()["is_pinned"]
        page = browser.get("/console/adapters/origin").text
        assert "pinned" in page
        assert "held as origin@1" in page
        release = fields(page, "/console/hold", "Release origin@1")
        assert browser.post("/console/hold", data=release | {"do": "release"}).status_code == 303
        assert not state().get("is_held")
        again = browser.post("/console/hold", data=release | {"do": "release"})
        assert again.status_code == 404
        assert "is not held as" in again.text


def test_many_aliases_fit_and_are_named(registry: Registry) -> None:
    """With many aliases, each protected by many bounds, the page stays small and says how many more there are."""
    registry.publish("busy", files(1), LINEAGE)
    bounds = [f"task-{index}.exact_match>=0.{index:02}" for index in range(40)]
    for index in range(60):
        registry.set_alias("busy", f"alias-{index:03}-{'x' * 90}", 1)
        protect(registry, "busy", f"alias-{index:03}-{'x' * 90}", bounds, 2)
    running = Console(registry)
    try:
        with client(running) as browser:
            page = browser.get("/console/adapters/busy").text
            assert len(page.encode()) <= 60_000
            assert page.count("<") <= 2 * 1500
            assert re.search(r"\d+ more aliases, as JSON", page)
            assert re.search(r"and \d+ more</li>", page)
    finally:
        running.stop()


def test_a_hostile_version_can_be_changed_like_any_other(registry: Registry) -> None:
    """Its description is not put into a field, and stays as it is until a new text takes its place."""
    publish_hostile(registry, "bad", TEXT)
    running = Console(registry)
    try:
        with client(running) as browser:
            page = browser.get("/console/adapters/bad?v=1").text
            assert 'name="text" value=""' in page
            form = fields(page, "/console/description")
            before = description_of(registry, registry.resolve("bad@1"))
            assert browser.post("/console/description", data=form | {"text": TEXT[:15]}).status_code == 400
            assert description_of(registry, registry.resolve("bad@1")) == before
            assert browser.post("/console/description", data=form | {"text": "harmless"}).status_code == 303
            assert browser.post("/console/description", data=form | {"text": "again"}).status_code == 409
            move = fields(browser.get("/console/adapters/bad?v=1").text, "/console/alias", "Move")
            assert browser.post("/console/alias", data=move | {"alias": "prod", "version": "1"}).status_code == 303
            page = browser.get("/console/alias", params={"name": "bad", "alias": "prod", "do": "rollback"}).text
            assert browser.post("/console/alias/rollback", data=fields(page, "/console/alias/rollback")).is_redirect
        assert description_of(registry, registry.resolve("bad@1")) == "harmless"
        assert registry.aliases("bad") == {"prod": 2}
    finally:
        running.stop()
