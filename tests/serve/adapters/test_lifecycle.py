"""Adapters' life in a running server: pinned, loaded side by side with bad ones, drained, taken away by force."""

import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from adapterhub_local.base.bases import read_record
from adapterhub_local.base.load import load_base
from adapterhub_local.errors import NotFound
from adapterhub_local.registry import Version
from serve.adapters.reader import AdapterReader
from serve.http.app import create_app
from serve.options import HttpOptions
from tests.patience import PATIENCE
from tests.serve.adapter_makers import publish
from tests.serve.adapters.conftest import NUM_FOLDERS, OPTIONS
from tests.serve.conftest import Server
from tests.serve.http.test_operate import load

LONG = {"prompt": "Hello", "max_tokens": 60, "ignore_eos": True, "temperature": 0}


def unload(server: Server, name: str, **more) -> httpx.Response:
    """POST /v1/unload_lora_adapter."""
    return server.http.post("/v1/unload_lora_adapter", json={"lora_name": name, **more})


def entry(server: Server, name: str) -> dict:
    """What /v1/adapters says of an adapter of the registry."""
    digest = server.registry.resolve(name).content_digest
    return next(one for one in server.http.get("/v1/adapters").json()["data"] if one["digest"] == digest)


def give_reader(server: Server, monkeypatch: pytest.MonkeyPatch, read: Callable[[Version], object]) -> None:
    """Have the server read adapters by `read`."""
    pool = server.service.engine.pool

    class Reader(AdapterReader):
        def read(self, source: Version) -> object:
            return read(source)

    monkeypatch.setattr(
        pool, "reader", Reader(**{field: getattr(pool.reader, field) for field in pool.reader.__dict__})
    )


def events(server: Server, body: dict, started: threading.Barrier | None = None) -> list[str]:
    """The events of a stream; when the first has come, `started` is passed."""
    found = []
    with server.http.stream("POST", "/v1/completions", json={**LONG, **body, "stream": True}) as response:
        assert response.status_code == 200
        for line in response.iter_lines():
            if line:
                found.append(line.removeprefix("data: "))
                if started is not None:
                    started.wait(20)
                    started = None
    return found


def test_pinned_from_the_start(living: Server) -> None:
    """However many others come by, a pinned adapter stays in memory and in its slot, and is not loaded twice."""
    assert {key: entry(living, "v0")[key] for key in ("state", "in_slot", "is_held", "is_pinned")} == {
        "state": "ready", "in_slot": True, "is_held": True, "is_pinned": True,
    }  # fmt: skip
    with ThreadPoolExecutor(9) as threads:
        names = [f"v{number}" for number in range(1, NUM_FOLDERS)]
        answers = list(threads.map(lambda name: living.complete(model=name, prompt="Hello").status_code, names))
    assert set(answers) == {200}
    before = living.service.engine.slots.num_loads
    assert entry(living, "v0")["in_slot"]
    assert living.complete(model="v0", prompt="Hello").status_code == 200
    assert living.service.engine.slots.num_loads == before
    assert living.service.engine.slots.num_evictions >= 7


def test_one_slot_stays_free(living: Server) -> None:
    """Pins are given by SGLang's field, and refused with the reason where they would leave no slot for others."""
    assert load(living, "v1", pinned=True).status_code == 200
    refused = load(living, "v2", pinned=True)
    assert refused.status_code == 400
    assert "'v2' cannot be pinned: 2 are, of 3 slots, and one must stay free" in refused.json()["error"]["message"]
    assert living.complete(model="v2", prompt="Hello").status_code == 200
    assert not entry(living, "v2")["is_held"]
    assert entry(living, "v1")["in_slot"]
    assert load(living, "v1", pinned=False, load_inplace=True).status_code == 200
    assert {key: entry(living, "v1")[key] for key in ("is_held", "is_pinned")} == {"is_held": True, "is_pinned": False}
    assert unload(living, "v1").status_code == 200


def test_what_cannot_be_pinned_stops_the_start(built_base, living: Server) -> None:
    """A server that is told to pin what is not there does not come up without it."""
    base = load_base(read_record(built_base), device="cpu")
    with pytest.raises(NotFound, match="nobody"):
        create_app(base, registry=living.registry, options=OPTIONS, http=HttpOptions(pins=("nobody",)))


def test_by_force(living: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams of the adapter end with an error event, whole answers with a 503; other adapters' go on to their ends."""
    living.slow_down(monkeypatch)
    assert load(living, "mine", "good3").status_code == 200
    barrier = threading.Barrier(4)
    with ThreadPoolExecutor(4) as threads:
        mine = [threads.submit(events, living, {"model": "mine", "n": 2}, barrier) for _ in range(2)]
        other = threads.submit(events, living, {"model": "v4"}, barrier)
        whole = threads.submit(living.complete, **{"model": "mine", **LONG})
        barrier.wait(20)
        freed = unload(living, "mine", force=True)
        ended = [each.result(20) for each in mine]
    assert (freed.status_code, int(freed.headers["X-Qhub-Freed-Bytes"]) > 0) == (200, True)
    for stream in ended:
        error = json.loads(stream[-2])["error"]
        assert (error["code"], error["type"], stream[-1]) == ("adapter_unloaded", "server_error", "[DONE]")
        assert "unloaded before the answer was complete" in error["message"]
    refused = whole.result(20)
    assert refused.status_code in (503, 404), refused.text  # 404: it had not been admitted yet
    assert json.loads(other.result(20)[-2])["choices"][0]["finish_reason"] == "length"
    assert living.complete(model="mine", prompt="Hello").status_code == 404
    assert living.wait_until_idle()["running"] == 0
    assert living.http.get("/health").status_code == 200


def test_draining(living: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without force the answer waits for the requests that run, which end whole; the name is gone at once."""
    expected = "".join(
        json.loads(one)["choices"][0]["text"] for one in events(living, {"model": "v5"})[:-1] if "choices" in one
    )
    living.slow_down(monkeypatch)
    assert load(living, "mine", "good5").status_code == 200
    barrier = threading.Barrier(2)
    with ThreadPoolExecutor(2) as threads:
        stream = threads.submit(events, living, {"model": "mine"}, barrier)
        barrier.wait(20)
        gone = threads.submit(unload, living, "mine")
        while entry(living, "v5")["state"] != "draining":
            time.sleep(0.01)
        assert not gone.done()
        assert living.complete(model="mine", prompt="Hello").status_code == 404
        found = stream.result(30)
        response = gone.result(30)
    text = "".join(json.loads(one)["choices"][0]["text"] for one in found[:-1])
    assert text == expected
    assert (response.status_code, int(response.headers["X-Qhub-Freed-Bytes"]) > 0) == (200, True)
    assert entry(living, "v5")["state"] == "absent"


def test_loading(living: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """While an adapter's files are read it is listed as loading, by its name, and others answer."""
    read, may_read = living.service.engine.pool.reader.read, threading.Event()

    def slow(version: Version) -> object:
        assert may_read.wait(20)
        return read(version)

    give_reader(living, monkeypatch, slow)
    unload(living, "v9")
    with ThreadPoolExecutor(1) as threads:
        answer = threads.submit(living.complete, model="v9", prompt="Hello")
        deadline = time.monotonic() + PATIENCE
        while not any(
            (one["name"], one["state"]) == ("v9@1", "loading") for one in living.http.get("/v1/adapters").json()["data"]
        ):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert living.complete(model="v0", prompt="Hello").status_code == 200
        assert not answer.done()
        may_read.set()
        assert answer.result(20).status_code == 200
    assert entry(living, "v9")["state"] == "ready"


def test_a_version_comes_back(living: Server) -> None:
    """What the registry has can be unloaded without having been loaded by hand, and the next request loads it anew."""
    first = living.complete(model="v6", prompt="Hello").json()["choices"]
    assert int(unload(living, "v6").headers["X-Qhub-Freed-Bytes"]) > 0
    assert entry(living, "v6")["state"] == "absent"
    assert unload(living, "v6").status_code == 404
    assert living.complete(model="v6", prompt="Hello").json()["choices"] == first
    assert entry(living, "v6")["state"] == "ready"


def test_two_names_of_one_content(living: Server) -> None:
    """Unloading one name frees nothing while another still holds the same bytes, pinned at that."""
    assert load(living, "twin", "good0").status_code == 200
    assert int(unload(living, "twin").headers["X-Qhub-Freed-Bytes"]) == 0
    assert entry(living, "v0")["in_slot"]


@pytest.mark.parametrize("how", ["unloaded", "replaced"])
def test_a_name_that_was_a_folder_is_resolved_again(living: Server, how: str) -> None:
    """Once a name no longer holds a folder it means what the registry says now, newer versions included."""
    name, base = f"once-{how}", living.service.base.info
    assert load(living, name, "good1").status_code == 200
    if how == "unloaded":
        assert unload(living, name).status_code == 200
    publish(living.registry, name, base, seed=101)
    assert load(living, name, load_inplace=True).status_code == 200
    assert living.complete(model=name, prompt="Hello").json()["adapter"]["version"] == 1
    newest = publish(living.registry, name, base, seed=102)
    answer = living.complete(model=name, prompt="Hello")
    assert answer.headers["X-Qhub-Digest"] == newest.content_digest
    assert living.client.models.retrieve(name).root == newest.content_digest
    assert [model.root for model in living.client.models.list() if model.id == name] == [newest.content_digest]
    assert unload(living, name).status_code == 200


@pytest.mark.parametrize("adapters", [None, [{"ref": "counted", "weight": 0.5}, {"ref": "v0", "weight": 0.5}]])
def test_a_load_is_counted_once(living: Server, monkeypatch: pytest.MonkeyPatch, adapters: list[dict] | None) -> None:
    """However many requests wait for the reading of one adapter, or mix, the time of one load is noted."""
    name = "counted" if adapters is None else "counted-mix"
    publish(living.registry, "counted", living.service.base.info, seed=103 if adapters is None else 104)
    pool, asked, may_read = living.service.engine.pool, threading.Semaphore(0), threading.Event()
    acquire, read = pool.acquire, pool.reader.read

    def slow(version: Version) -> object:
        assert may_read.wait(20)
        return read(version)

    def noted(*asks, **more) -> object:
        asked.release()
        return acquire(*asks, **more)

    give_reader(living, monkeypatch, slow)
    monkeypatch.setattr(pool, "acquire", noted)
    key = ("qhub_adapter_load_seconds_count",)
    before = living.samples()[key]
    body = {"model": name} if adapters is None else {"model": "tiny", "adapters": adapters}
    with ThreadPoolExecutor(4) as threads:
        answers = [threads.submit(living.complete, prompt="Hello", **body) for _ in range(4)]
        try:
            assert all(asked.acquire(timeout=PATIENCE) for _ in answers)
        finally:
            may_read.set()
        assert [each.result(20).status_code for each in answers] == [200] * 4
    assert living.samples()[key] - before == 1


def test_ten_adapters_are_loaded_at_once(living: Server) -> None:
    """As in vLLM's test: ten folders side by side on three slots, all listed with their base as parent, all answer."""
    names = [f"load{number}" for number in range(NUM_FOLDERS)]
    with ThreadPoolExecutor(NUM_FOLDERS) as threads:
        done = list(threads.map(lambda each: load(living, each[1], f"good{each[0]}"), enumerate(names)))
        assert [response.status_code for response in done] == [200] * NUM_FOLDERS, [one.text for one in done]
        answers = list(threads.map(lambda name: living.complete(model=name, prompt="Hello").json(), names))
    models = {model.id: model for model in living.client.models.list()}
    for number, (name, answer) in enumerate(zip(names, answers, strict=True)):
        digest = living.registry.resolve(f"v{number}").content_digest
        assert (models[name].parent, models[name].root) == ("tiny", digest)
        assert answer["adapter"]["digest"] == digest
        assert unload(living, name).status_code == 200
    assert not {model.id for model in living.client.models.list()} & set(names)


def test_bad_loads_do_not_break_others(living: Server, lora_root: Path) -> None:
    """As in vLLM's test: 25 paths that are not there and 25 files that are no adapters, while good ones are asked."""
    (lora_root / "bad").mkdir(exist_ok=True)
    (lora_root / "bad" / "adapter_config.json").write_text("this is not json")
    (lora_root / "bad" / "adapter_model.safetensors").write_text("this is not safetensors")
    stop = threading.Event()

    def ask(name: str) -> list[int]:
        statuses = []
        while not stop.is_set() or not statuses:
            statuses.append(living.complete(model=name, prompt="Hello", max_tokens=4).status_code)
        return statuses

    with ThreadPoolExecutor(8) as threads:
        good = [threads.submit(ask, name) for name in ("v0", "v7", "tiny")]
        try:
            bad = [
                threads.submit(load, living, f"bad{number}", ("bad", "notfound")[number % 2]) for number in range(50)
            ]
            codes = [each.result(30).status_code for each in bad]
        finally:
            stop.set()
        assert codes == [400, 404] * 25
        assert {status for each in good for status in each.result(30)} == {200}
    assert load(living, "fine", "good8").status_code == 200
    assert living.complete(model="fine", prompt="Hello").status_code == 200
    assert unload(living, "fine").status_code == 200
    assert all(
        users == (digest == living.registry.resolve("v0").content_digest)
        for digest, users in living.service.engine.pool.users().items()
    )
