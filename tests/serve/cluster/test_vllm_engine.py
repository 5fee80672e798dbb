"""Replicas whose answers are vLLM's: names are looked up before it, refused with their reason, and given by digest.

A stand-in answers with what it was asked; `make check-vllm` runs the same gateway before a real vLLM.
"""

import asyncio
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from adapterhub_local.base.bases import read_record
from adapterhub_local.errors import InputError, QhubError
from adapterhub_local.keys import Keys
from adapterhub_local.registry import Registry
from adapterhub_local.settings import home
from serve.cluster.config import ClusterConfig
from serve.cluster.replica import Replica
from serve.cluster.tables import Vllm
from tests.serve.adapter_makers import publish
from tests.serve.cluster.vllm_gateway import VllmGateway

STAND_IN = (sys.executable, str(Path(__file__).parent / "stand_in_vllm.py"))


@pytest.fixture(scope="module")
def base(built_base, tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    """The tiny base in a home of its own, which is this process's for the module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QHUB_HOME", str(tmp_path_factory.mktemp("vllm")))
        shutil.copytree(built_base, home().bases / "tiny")
        yield read_record(home().bases / "tiny")


@pytest.fixture(scope="module")
def gateway(base) -> Iterator[VllmGateway]:
    """A gateway before one replica, over two adapters."""
    registry = Registry(home())
    for seed, name in enumerate(("alpha", "beta"), 1):
        publish(registry, name, base, seed=seed, rank=4, alias="prod")
    publish(registry, "dora", base, seed=3, dora=True)
    running = VllmGateway(base, registry, Vllm("org/tiny", command=STAND_IN, options=("--max-lora-rank", "8")))
    yield running
    facts = running.stop()
    assert facts["state"] == "ready"
    assert facts["adapters"] == ["alpha@1", "alpha@2"]


@pytest.fixture
def in_its_home(base, monkeypatch: pytest.MonkeyPatch) -> None:
    """This test in the home of the module's base."""
    monkeypatch.setenv("QHUB_HOME", str(base.folder.parent.parent))


def digest_of(gateway: VllmGateway, name: str) -> str:
    version = gateway.registry.resolve(name)
    return f"{version.name}@{version.manifest_digest}"


def test_it_is_started_as_the_plugin_wants(gateway: VllmGateway) -> None:
    """By its options, for this home and base, with our plugin, and nothing of the client but its request."""
    answer = gateway.ask("tiny", seed=5).json()
    assert answer["asked"] == {"model": "tiny", "prompt": "Hi", "seed": 5}
    assert answer["options"]["model"] == "org/tiny"
    assert answer["options"]["served_model_name"] == "tiny"
    assert answer["options"]["enable_lora"]
    assert answer["options"]["max_lora_rank"] == "8"
    assert answer["seen"]["QHUB_VLLM_BASE"] == "tiny"
    assert answer["seen"]["VLLM_PLUGINS"] == "qhub"
    assert answer["seen"]["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"
    assert "authorization" not in answer["headers"]


@pytest.mark.parametrize("model", ["alpha", "alpha@1", "alpha@prod", "alpha@latest", "tiny:alpha", "alpha*1"])
def test_a_name_is_the_digest_that_it_means(gateway: VllmGateway, model: str) -> None:
    """However an adapter is named, vLLM gets what can never mean another version."""
    wanted = digest_of(gateway, "alpha@1")
    answer = gateway.ask(model)
    assert answer.json()["asked"]["model"] == wanted
    assert answer.headers["x-qhub-replica"] == "r0"
    by_field = gateway.ask("tiny", adapters=[{"ref": "alpha@1"}]).json()["asked"]
    assert by_field == {"model": wanted, "prompt": "Hi"}


def test_a_stream_is_passed_on(gateway: VllmGateway) -> None:
    """Event by event, to its end."""
    lines = [line for line in gateway.ask("alpha", stream=True).text.splitlines() if line]
    assert lines[-1] == "data: [DONE]"
    assert [json.loads(line[6:])["number"] for line in lines[:-1]] == [0, 1, 2]


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        ({"model": "nobody"}, 404, "there is no adapter 'nobody'"),
        ({"model": "alpha@9"}, 404, "alpha"),
        ({"model": "dora@1"}, 400, "has DoRA, which vLLM does not compute"),
        ({"model": "alpha*0.5+beta*0.5"}, 400, "vLLM answers with one adapter, by its whole weight"),
        ({"model": "alpha*0.5"}, 400, "vLLM answers with one adapter, by its whole weight"),
        ({"model": "tiny", "adapters": [{"ref": "alpha"}, {"ref": "beta"}]}, 400, "vLLM answers with one adapter"),
        ({"model": "tiny", "adapters": 3}, 400, "adapters must be a list of"),
    ],
)
def test_refused_with_the_reason(gateway: VllmGateway, body: dict, status: int, reason: str) -> None:
    """vLLM's own 404 has none."""
    answer = gateway.http.post("/v1/completions", json={"prompt": "Hi", **body})
    assert answer.status_code == status
    assert reason in answer.json()["error"]["message"]


def test_what_vllm_lacks(gateway: VllmGateway) -> None:
    """An endpoint that vLLM has not is a 404 that says so."""
    for answer in (gateway.http.post("/v1/score", json={"model": "tiny"}), gateway.http.get("/api/tags")):
        assert answer.status_code == 404
        assert "vLLM answers here, which has no" in answer.text
    assert "the replicas of this cluster have no /api/ps" in gateway.http.get("/api/ps").text


def test_what_is_listed(gateway: VllmGateway) -> None:
    """Models are the registry's, with vLLM's context; metrics are vLLM's, by replica."""
    models = {model["id"]: model for model in gateway.http.get("/v1/models").json()["data"]}
    assert {"tiny", "alpha", "alpha@1", "alpha@prod", "beta@1"} <= models.keys()
    assert models["alpha"]["max_model_len"] == 77
    assert gateway.http.get("/v1/models/alpha@prod").json()["root"] == models["alpha@1"]["root"]
    assert 'vllm:running{replica="r0"} 1' in gateway.http.get("/metrics").text
    assert gateway.http.get("/ready").status_code == 200
    gateway.ask("alpha@1")
    (entry,) = [each for each in gateway.http.get("/v1/adapters").json()["data"] if each["name"] == "alpha@1"]
    assert entry["requests"] >= 1
    assert entry["requests_now"] == 0


def test_a_moved_alias_is_another_digest(gateway: VllmGateway, base) -> None:
    """The next request after a move is answered by the new version."""
    first = gateway.ask("alpha@prod").json()["asked"]["model"]
    publish(gateway.registry, "alpha", base, seed=9, rank=4, alias="prod")
    second = gateway.ask("alpha@prod").json()["asked"]["model"]
    assert (first, second) == (digest_of(gateway, "alpha@1"), digest_of(gateway, "alpha@2"))


def test_a_key_is_for_its_adapters(base, gateway: VllmGateway, in_its_home: None) -> None:
    """A key of other adapters is refused here, since vLLM knows nothing of keys."""
    keys = Keys(home())
    key, secret = keys.create(adapters=("beta",))
    closed = VllmGateway(base, gateway.registry, Vllm("org/tiny", command=STAND_IN))
    try:
        headers = {"Authorization": f"Bearer {secret}"}
        answers = [
            closed.http.post("/v1/completions", json={"model": model, "prompt": "Hi"}, headers=headers)
            for model in ("beta", "alpha", "tiny")
        ]
        assert [answer.status_code for answer in answers] == [200, 403, 403]
        listed = closed.http.get("/v1/models", headers=headers).json()["data"]
        assert {model["id"].partition("@")[0] for model in listed} == {"beta"}
    finally:
        closed.stop()
        keys.revoke(key.id)


def test_when_vllm_ends(in_its_home: None) -> None:
    """The replica is to be replaced, and the request that ended it is not answered by half."""

    async def check() -> None:
        replica = Replica("r1", ClusterConfig("tiny", vllm=Vllm("org/tiny", command=STAND_IN)))
        await replica.start()
        await replica.check()
        client = replica.engine._client  # type: ignore[attr-defined]
        with pytest.raises(httpx.HTTPError):
            await client.post("/v1/completions", json={"model": "tiny", "prompt": "end"})
        with pytest.raises(RuntimeError, match="the engine has stopped"):
            await replica.check()
        assert (await replica.facts())["state"] == "stopped"
        await replica.stop()

    asyncio.run(check())


@pytest.mark.parametrize(
    ("command", "error", "reason"),
    [
        (("/no/such/vllm",), InputError, "vllm.command: /no/such/vllm cannot be run: No such file"),
        ((sys.executable, "-c", "raise SystemExit(4)"), QhubError, "vLLM ended with exit code 4 before it had started"),
        ((sys.executable, "-c", "import time; time.sleep(99)"), QhubError, "vLLM had not started after 1 s"),
    ],
)
def test_what_does_not_start(in_its_home: None, command: tuple[str, ...], error: type[Exception], reason: str) -> None:
    """It is reported with its reason, and nothing is left running."""
    replica = Replica("r2", ClusterConfig("tiny", vllm=Vllm("org/tiny", command=command, start=1.0)))
    with pytest.raises(error, match=reason):
        asyncio.run(replica.start())
