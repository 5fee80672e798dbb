"""The model `auto` behind a gateway: a replica chooses, and the one that has the adapter answers."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from adapterhub_local.base.bases import read_record
from adapterhub_local.base.load import load_base
from adapterhub_local.registry import Registry
from serve.options import HttpOptions
from tests.routers import TASKS, make_router, prompts
from tests.serve.cluster.conftest import Gateway
from tests.serve.cluster.test_gateway import STREAMS, settled
from tests.serve.conftest import Server

NOBODYS = "\u4f60\u597d\uff0c\u4e16\u754c"


@pytest.fixture(scope="module")
def routed(built_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Registry:
    """A registry with three adapters and a router of them."""
    folder = tmp_path_factory.mktemp("auto")
    registry = Registry(folder / "home")
    registry.home.bases.mkdir(parents=True)
    (registry.home.bases / "tiny").symlink_to(built_base)
    make_router(registry, read_record(built_base), folder, alias="prod")
    return registry


@pytest.fixture(scope="module")
def auto(built_base: Path, routed: Registry) -> Iterator[Gateway]:
    """A gateway before three replicas whose router is `router@prod`."""
    running = Gateway(built_base, routed, 3, router="router@prod")
    yield running
    running.stop()


@pytest.fixture(scope="module")
def plain(built_base: Path, routed: Registry) -> Iterator[Server]:
    """A server of its own with the same router."""
    running = Server(load_base(read_record(built_base), device="cpu"), routed, http=HttpOptions(router="router@prod"))
    yield running
    running.stop()


def asking(path: str, text: str) -> dict:
    """A body for this path that says `text`."""
    body = json.loads(json.dumps(STREAMS[path]).replace('"Hello"', json.dumps(text)).replace('"Hi"', json.dumps(text)))
    return {"model": "auto", **body}


@pytest.mark.parametrize("text", [prompts("alpha", 1, seed=7)[0], prompts("beta", 1, seed=7)[0], NOBODYS], ids=str)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("path", STREAMS)
def test_answers_are_those_of_a_plain_server(auto: Gateway, plain: Server, path: str, stream: bool, text: str) -> None:
    """Every endpoint answers `auto` as a plain server does, and says as much of who was chosen and how sure."""
    body = {**asking(path, text), "stream": stream}
    ours, theirs = auto.post(path, **body), plain.http.post(path, json=body)
    assert (ours.status_code, theirs.status_code) == (200, 200)
    assert settled(ours.text) == settled(theirs.text)
    for name in ("x-qhub-router", "x-qhub-routed", "x-qhub-confidence", "x-qhub-adapter", "x-qhub-digest"):
        assert ours.headers.get(name) == theirs.headers.get(name)


def test_who_has_the_adapter_answers(auto: Gateway) -> None:
    """A routed request lands where the adapter's own requests land, whoever chose it, and is counted once."""
    before = num_routed(auto)
    for task in TASKS:
        named = auto.post("/v1/completions", model=f"{task}@prod", prompt="Hi", max_tokens=1)
        answers = [
            auto.post("/v1/completions", model="auto", prompt=text, max_tokens=1) for text in prompts(task, 6, seed=9)
        ]
        routed = [answer for answer in answers if answer.headers["x-qhub-routed"] == f"{task}@prod"]
        assert routed
        assert {answer.headers["x-qhub-replica"] for answer in routed} == {named.headers["x-qhub-replica"]}
    assert num_routed(auto) - before == 6 * len(TASKS)


def num_routed(gateway: Gateway) -> float:
    """Requests that were routed, as all replicas count them."""
    families = {each.name: each for each in text_string_to_metric_families(gateway.http.get("/metrics").text)}
    return sum(each.value for each in families["qhub_routed"].samples if each.name.endswith("_total"))


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": ["a", "b"]}),
        ("/v1/embeddings", {"input": "a"}),
        ("/v1/completions", {"prompt": "a", "adapters": [{"ref": "alpha"}]}),
        ("/v1/messages/count_tokens", {"messages": [{"role": "user", "content": "a"}]}),
    ],
)
def test_the_rest_is_as_with_a_plain_server(auto: Gateway, plain: Server, path: str, body: dict) -> None:
    """What `auto` cannot answer is refused, and what it counts is counted, in a plain server's words."""
    body = {"model": "auto", **body}
    ours, theirs = auto.post(path, **body), plain.http.post(path, json=body)
    assert (ours.status_code, ours.json()) == (theirs.status_code, theirs.json())


def test_a_replica_that_is_lost_while_it_chooses(auto: Gateway) -> None:
    """A request whose replica ends while it chooses, or before its answer, is chosen for and answered by others."""
    (text,) = prompts("gamma", 1, seed=7)
    for breaks in ([0], [None, 0], [1, 1]):
        auto.engines.breaks[:] = breaks
        answer = auto.post("/v1/completions", model="auto", prompt=text, max_tokens=2, temperature=0)
        assert (answer.status_code, answer.headers["x-qhub-routed"]) == (200, "gamma@prod")
        auto.engines.breaks.clear()


def test_without_a_router_auto_is_refused(gateway: Gateway) -> None:
    """A cluster without a router says that it has none, and where one is named."""
    answer = gateway.post("/v1/completions", model="auto", prompt="Hi")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
    assert "[router] of a cluster.toml" in answer.json()["error"]["message"]
