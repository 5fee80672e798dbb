"""Who may use the pages: sessions of keys, forms of our own pages, and nobody else's, on every route there is."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from adapterhub_local.keys import Keys
from adapterhub_local.registry import Registry
from tests.patience import PATIENCE
from tests.serve.console.conftest import Console
from tests.stores import LINEAGE, files

LOGIN = "/console/login"
PAGE = {"Accept": "text/html"}
FOREIGN = {
    "another site": {"Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "cors"},
    "another port": {"Origin": "http://127.0.0.1:1", "Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "cors"},
    "a frame without an origin": {"Origin": "null", "Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"},
    "an old browser": {"Origin": "https://evil.example"},
}


@pytest.fixture
def guarded(registry: Registry) -> Iterator[Console]:
    """A console whose home has two adapters and keys: for all, for one adapter, and to be revoked."""
    for seed, name in enumerate(("sql-a", "tone")):
        registry.publish(name, files(seed), LINEAGE | {"description": f"the {name}"})
    running = Console(registry)
    keys = Keys(registry.home)
    running.keys = {
        "all": keys.create(scopes=("infer", "admin"))[1],
        "sql": keys.create(adapters=("sql*",))[1],
    }
    yield running
    running.stop()


def client(console: Console, **options: Any) -> httpx.Client:
    return httpx.Client(base_url=console.url, trust_env=False, timeout=PATIENCE, **options)


@contextmanager
def sign_in(console: Console, key: str) -> Iterator[httpx.Client]:
    """A browser that showed a key."""
    with client(console, headers=PAGE) as browser:
        answer = browser.post(LOGIN, data={"key": console.keys[key], "next": "/console"})
        assert answer.status_code == 303, answer.text
        yield browser


def routes(console: Console) -> list[tuple[str, str]]:
    """Method and address of every route, with something in its places."""
    found = []
    for route in console.app.routes:
        path = re.sub(r"\{(?:name|reference):path\}", "tone", re.sub(r"\{(?:run|job|name)\}", "x", route.path))
        found += [(method, path) for method in sorted(route.methods - {"HEAD"})]
    return found


def test_without_a_key_there_is_the_login_page(guarded: Console) -> None:
    """A page leads to the login and from there back to itself; an endpoint says 401; a wrong key gets no session."""
    with client(guarded, headers=PAGE) as browser:
        answer = browser.get("/console/adapters/tone?v=1")
        assert (answer.status_code, answer.headers["location"]) == (303, f"{LOGIN}?next=/console/adapters/tone%3Fv%3D1")
        assert 'value="/console/adapters/tone?v=1"' in browser.get(answer.headers["location"]).text
        wrong = browser.post(LOGIN, data={"key": "qhub-00000000-" + "a" * 43})
        assert wrong.status_code == 401
        assert "this API key is unknown" in wrong.text
        assert not wrong.cookies
        assert browser.get("/v1/registry/adapters", headers={"Accept": "application/json"}).status_code == 401


def test_a_key_opens_a_session_that_scripts_cannot_read(guarded: Console) -> None:
    """The cookie is HttpOnly and SameSite=Strict, is not the key, and ends with a sign-out or the key."""
    with client(guarded, headers=PAGE) as browser:
        answer = browser.post(LOGIN, data={"key": guarded.keys["all"], "next": "//evil.example/"})
        assert answer.headers["location"] == "/console"
        cookie = answer.headers["set-cookie"]
        assert "HttpOnly" in cookie
        assert "samesite=strict" in cookie.lower()
        assert guarded.keys["all"].split("-", 2)[2] not in cookie
        page = browser.get("/console")
        assert "tone@1" in page.text
        assert guarded.keys["all"] not in page.text
        assert browser.post("/console/logout", data={"out": "1"}).headers["location"] == LOGIN
        assert browser.get("/console").status_code == 303
    with sign_in(guarded, "all") as browser:
        assert browser.get("/console/server").status_code == 200
        Keys(guarded.registry.home).revoke(guarded.keys["all"].split("-")[1])
        assert browser.get("/console").status_code == 303
        assert browser.get("/v1/registry/adapters").status_code == 401


def test_a_key_for_one_adapter_sees_no_other(guarded: Console) -> None:
    """Lists, pages, lineage and comparisons hold what the key is for, and nothing can be changed with it."""
    with sign_in(guarded, "sql") as browser:
        page = browser.get("/console").text
        assert "sql-a@1" in page
        assert "tone" not in page
        assert browser.get("/console/adapters/tone").status_code == 403
        assert "the tone" not in browser.get("/console/adapters/tone").text
        assert browser.get("/console/compare?left=sql-a&right=tone").status_code == 403
        assert browser.get("/v1/registry/lineage/tone").status_code == 403
        assert browser.get("/console/server").status_code == 403
        form = {"name": "sql-a", "alias": "prod", "version": "1", "state": "{}"}
        assert browser.post("/console/alias", data=form).status_code == 403
        body = {"alias": "prod", "version": 1}
        assert browser.put("/v1/registry/aliases/sql-a", json=body).status_code == 403
    assert guarded.registry.aliases("sql-a") == {}


def test_guessing_is_slowed(guarded: Console) -> None:
    """After ten wrong keys no more are looked at for a while, right ones neither; sessions go on."""
    with sign_in(guarded, "all") as known, client(guarded, headers=PAGE) as browser:
        codes = [browser.post(LOGIN, data={"key": f"qhub-{n:08}-{'b' * 43}"}).status_code for n in range(11)]
        assert codes == [401] * 10 + [429]
        assert browser.post(LOGIN, data={"key": guarded.keys["all"]}).status_code == 429
        assert known.get("/console").status_code == 200


@pytest.mark.parametrize("where", FOREIGN)
def test_no_other_page_uses_a_session(guarded: Console, where: str) -> None:
    """A request from another page changes nothing on any route, although the browser sends the cookie along."""
    with sign_in(guarded, "all") as browser:
        for method, path in routes(guarded):
            if method == "GET" or path == LOGIN:
                continue
            for kind in ("application/json", "application/x-www-form-urlencoded", "text/plain"):
                headers = {**FOREIGN[where], "Content-Type": kind}
                answer = browser.request(method, path, content=b"{}", headers=headers)
                assert answer.status_code in (303, 400, 401, 403), (method, path, answer.text)
                assert answer.status_code != 303 or answer.headers["location"].startswith(LOGIN)
        assert browser.get("/console").status_code == 200
        form = {"name": "tone", "alias": "prod", "version": "1", "state": "{}"}
        browser.post("/console/alias", data=form, headers=FOREIGN[where])
        assert guarded.registry.aliases("tone") == {}
        own = {"Origin": guarded.url, "Sec-Fetch-Site": "same-origin"}
        assert browser.post("/console/alias", data=form, headers=own).status_code == 303
        assert guarded.registry.aliases("tone") == {"prod": 1}


def test_without_keys_names_and_pages_are_looked_at(registry: Registry) -> None:
    """Of a console without keys a rebound name and another site's page get nothing, on every route."""
    registry.publish("tone", files(1), LINEAGE)
    console = Console(registry)
    try:
        with client(console) as browser:
            for method, path in routes(console):
                rebound = browser.request(method, path, headers={"Host": "evil.example", **PAGE})
                assert rebound.status_code == 403, (method, path)
                assert "is not a name of this machine" in rebound.text
                foreign = browser.request(method, path, headers={**FOREIGN["another site"], **PAGE})
                assert foreign.status_code == 403, (method, path)
            form = {"name": "tone", "alias": "prod", "version": "1", "state": "{}"}
            near = browser.post("/console/alias", data=form, headers=FOREIGN["another port"])
            assert near.status_code == 403
            assert "another site's page" in near.text
            assert registry.aliases("tone") == {}
            framed = browser.get("/console")
            assert framed.headers["x-frame-options"] == "DENY"
            assert "frame-ancestors 'none'" in framed.headers["content-security-policy"]
    finally:
        console.stop()
