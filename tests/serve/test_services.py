"""Several bases in one server: every request is answered by the base that its model belongs to, as if it were alone."""

import contextlib
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner
from prometheus_client.parser import text_string_to_metric_families
from transformers import AutoConfig

from adapterhub_local.base.add import add_base
from adapterhub_local.base.bases import BaseInfo, read_record
from adapterhub_local.base.load import load_base
from adapterhub_local.data.answer_log import read_log
from adapterhub_local.errors import InputError, NotFound
from adapterhub_local.keys import Keys
from adapterhub_local.registry import Registry
from adapterhub_local.registry.split import set_split
from adapterhub_local.settings import Home
from adapterhub_local.settings import home as home_at
from serve.__main__ import command
from serve.engine.options import EngineOptions
from serve.options import HttpOptions
from serve.services import Turns, check_bases, share
from tests.routers import make_router
from tests.serve.adapter_makers import llama_shapes, publish, write_random
from tests.serve.conftest import Server
from tests.tiny import llama_config, save_tiny_model

ASK = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 12, "temperature": 0}
SECOND = {"hidden_size": 48, "intermediate_size": 64}


@pytest.fixture(scope="module")
def second_base(tmp_path_factory: pytest.TempPathFactory) -> BaseInfo:
    """Another base, of other shapes."""
    folder = save_tiny_model(tmp_path_factory.mktemp("second") / "model", seed=7, **SECOND)
    return add_base("second", folder, home_at(tmp_path_factory.mktemp("bases")), hub_id="someone/second")


@pytest.fixture(scope="module")
def bases(built_base: Path, second_base: BaseInfo) -> list[BaseInfo]:
    """Both."""
    return [read_record(built_base), second_base]


@pytest.fixture(scope="module")
def registry(bases: list[BaseInfo], tmp_path_factory: pytest.TempPathFactory) -> Registry:
    """Adapters of both bases: `moved` is of the first base in its first version, and of the second in its second."""
    registry = Registry(tmp_path_factory.mktemp("both") / "home")
    first, second = bases
    for seed, name in enumerate(("alpha", "beta"), start=1):
        publish(registry, name, first, seed=seed, alias="prod")
    for seed, name in enumerate(("gamma", "delta"), start=3):
        publish(registry, name, second, seed=seed, alias="prod")
    publish(registry, "moved", first, seed=5)
    publish(registry, "moved", second, seed=6)
    return registry


@pytest.fixture(scope="module")
def both(bases: list[BaseInfo], registry: Registry, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server of both bases."""
    folder, log = (tmp_path_factory.mktemp(name) for name in ("folders", "log"))
    http = HttpOptions(pins=("beta", "delta@prod"), lora_root=folder, request_log=log)
    running = Server([load_base(info, device="cpu") for info in bases], registry, http=http)
    yield running
    running.stop()


@pytest.fixture(scope="module")
def alone(bases: list[BaseInfo], registry: Registry) -> Iterator[list[Server]]:
    """A server of each base."""
    found = [Server(load_base(info, device="cpu"), registry) for info in bases]
    yield found
    for each in found:
        each.stop()


def test_both_bases_have_one_request_log(both: Server) -> None:
    """An answer of either can be rated as soon as it is there, and its record names the base."""
    names = ["alpha", "gamma", "tiny", "second"]
    for model in names:
        answer = both.http.post("/v1/chat/completions", json=ASK | {"model": model, "store": True}).json()
        assert both.http.post("/v1/feedback", json={"id": answer["id"], "rating": 1}).status_code == 200
    assert both.service.http.request_log is not None
    records = [entry.record for entry in read_log(both.service.http.request_log) if entry.record is not None]
    bases = [record["base"]["name"] for record in records if record["kind"] == "answer"]
    assert (bases, len(records)) == (["tiny", "second"] * 2, 8)


def write_folder(folder: Path, shapes: dict[str, tuple[int, int]]) -> None:
    """A random adapter as a folder of files."""
    folder.mkdir()
    for name, content in write_random(folder, shapes, seed=9).items():
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)


MODELS = {
    "tiny": 0, "tiny:alpha": 0, "alpha": 0, "alpha@1": 0, "alpha@prod": 0, "alpha*0.5+beta*0.25": 0, "moved@1": 0,
    "second": 1, "second:gamma": 1, "gamma": 1, "gamma@prod": 1, "gamma*0.5+delta": 1, "moved@2": 1, "moved": 1,
}  # fmt: skip


def test_every_model_answers_as_its_base_would_alone(both: Server, alone: list[Server]) -> None:
    """Bases, versions, aliases and mixes, all at once: the same texts, and headers that say which weights."""

    def ask(server: Server, model: str) -> tuple:
        answer = server.http.post("/v1/chat/completions", json={"model": model, **ASK})
        assert answer.status_code == 200, answer.text
        headers = [answer.headers.get(name) for name in ("X-Qhub-Base", "X-Qhub-Adapter", "X-Qhub-Digest")]
        return answer.json()["choices"][0]["message"]["content"], headers, answer.json()["system_fingerprint"]

    with ThreadPoolExecutor(len(MODELS)) as room:
        found = dict(zip(MODELS, room.map(lambda model: ask(both, model), MODELS), strict=True))
    assert found == {model: ask(alone[place], model) for model, place in MODELS.items()}
    assert found["tiny"] != found["second"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "Hello", "max_tokens": 6, "temperature": 0}),
        ("/v1/responses", {"input": "Hello", "max_output_tokens": 6, "temperature": 0}),
        ("/v1/messages", {**ASK, "max_tokens": 6}),
        ("/v1/messages/count_tokens", {"messages": ASK["messages"]}),
        ("/v1/embeddings", {"input": "Hello"}),
        ("/v1/score", {"prompt": "Hello", "choices": ["a", "b"]}),
        ("/tokenize", {"prompt": "Hello"}),
        ("/api/chat", {"messages": ASK["messages"], "stream": False, "options": {"num_predict": 6, "temperature": 0}}),
        ("/api/generate", {"prompt": "Hello", "stream": False, "options": {"num_predict": 6, "temperature": 0}}),
        ("/api/generate", {}),
        ("/api/show", {}),
    ],
)
def test_every_endpoint_asks_the_base_of_the_model(both: Server, alone: list[Server], path: str, body: dict) -> None:
    """What each base alone answers."""

    def fixed(answer: dict) -> dict:
        changing = ("id", "created", "created_at", "output", "total_duration", "load_duration")
        kept = {name: value for name, value in answer.items() if name not in changing and "duration" not in name}
        return kept | {"text": [item["content"] for item in answer.get("output", ())]}

    for model, place in (("alpha", 0), ("gamma", 1), ("second", 1), ("moved@2", 1)):
        answers = [server.http.post(path, json={"model": model, **body}) for server in (both, alone[place])]
        assert [answer.status_code for answer in answers] == [200, 200], answers[0].text
        assert fixed(answers[0].json()) == fixed(answers[1].json())


def test_lists_are_of_all_bases(both: Server, alone: list[Server]) -> None:
    """Models, tags and what is in memory; health and metrics name each base."""
    for path, name, key in (("/v1/models", "data", "id"), ("/api/tags", "models", "name")):
        listed = [each[key] for each in both.http.get(path).json()[name]]
        assert listed == [each[key] for server in alone for each in server.http.get(path).json()[name]]
        assert len(listed) == len(set(listed))
    for model in ("gamma@prod", "second", "alpha"):
        of_one = both.http.get(f"/v1/models/{model}").json()
        place = MODELS[model]
        assert of_one == alone[place].http.get(f"/v1/models/{model}").json()

    loaded = {each["name"]: each["is_pinned"] for each in both.http.get("/v1/adapters").json()["data"]}
    assert loaded["beta"] is loaded["delta@prod"] is True
    health = both.http.get("/health").json()
    assert [each["base"]["name"] for each in health["bases"]] == ["tiny", "second"]
    assert health["base"] == health["bases"][0]["base"]
    assert both.http.get("/ready").json()["ready"] is True
    assert both.http.get("/v1/server").json()["bases"][1]["base"]["name"] == "second"

    for model in ("alpha", "gamma"):
        both.http.post("/v1/chat/completions", json={"model": model, **ASK})
    both.http.post("/v1/chat/completions", json={"model": "gamma@99", **ASK})
    families = list(text_string_to_metric_families(both.http.get("/metrics").text))
    assert len({family.name for family in families}) == len(families)
    steps = next(family for family in families if family.name == "qhub_engine_steps")
    assert {sample.labels["base"] for sample in steps.samples} == {"tiny", "second"}
    for name in ("qhub_http_requests", "qhub_errors", "qhub_ready"):  # of all, whichever base they were for
        (family,) = [family for family in families if family.name == name]
        assert family.samples
        assert all("base" not in sample.labels for sample in family.samples)
    used = next(family for family in families if family.name == "qhub_usage_requests").samples
    assert {("alpha", "tiny"), ("gamma", "second")} <= {(each.labels["adapter"], each.labels["base"]) for each in used}
    pages = both.http.get("/console/server").text
    assert "tiny" in pages
    assert "second" in pages


def test_what_belongs_to_no_base_or_to_two(both: Server, registry: Registry) -> None:
    """Errors name what is served."""
    for model, status, says in (
        ("nothing", 404, "no adapter 'nothing'"),
        ("alpha+gamma", 400, "made for base"),
        ("tiny:gamma", 400, "made for base 'second', not for 'tiny'"),
        ("second:alpha", 400, "made for base 'tiny'"),
        ("third:alpha", 404, "base"),
    ):
        answer = both.http.post("/v1/chat/completions", json={"model": model, **ASK})
        assert answer.status_code == status, (model, answer.text)
        assert says in answer.json()["error"]["message"], answer.text


def test_folders_are_loaded_for_the_base_that_they_fit(both: Server, bases: list[BaseInfo]) -> None:
    """Whichever it is; unloading finds them, too; one that fits none is refused."""
    root = both.service.http.lora_root
    assert root is not None
    for name, info in (("ours", bases[0]), ("theirs", bases[1])):
        write_folder(root / name, llama_shapes(AutoConfig.from_pretrained(info.folder)))
        asked = {"lora_name": f"loaded-{name}", "lora_path": name}
        answer = both.http.post("/v1/load_lora_adapter", json=asked)
        assert (answer.status_code, answer.headers.get("X-Qhub-Base")) == (200, info.name), answer.text
        said = both.http.post("/v1/chat/completions", json={"model": f"loaded-{name}", **ASK})
        assert (said.status_code, said.headers["X-Qhub-Base"]) == (200, info.name)
        gone = both.http.post("/v1/unload_lora_adapter", json={"lora_name": f"loaded-{name}"})
        assert gone.status_code == 200
        assert int(gone.headers["X-Qhub-Freed-Bytes"]) > 0
    write_folder(root / "neither", dict.fromkeys(llama_shapes(AutoConfig.from_pretrained(bases[0].folder)), (5, 7)))
    answer = both.http.post("/v1/load_lora_adapter", json={"lora_name": "neither", "lora_path": "neither"})
    assert answer.status_code == 400
    assert "does not fit the base" in answer.text


def test_a_name_is_one_over_all_bases(both: Server, bases: list[BaseInfo]) -> None:
    """A folder takes no served model's name, none that another base holds, and replaces what another base held."""
    root = both.service.http.lora_root
    assert root is not None
    for name, info in (("one", bases[0]), ("two", bases[1])):
        write_folder(root / name, llama_shapes(AutoConfig.from_pretrained(info.folder)))

    def load(name: str, path: str, **how: bool) -> httpx.Response:
        return both.http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path, **how})

    def base_of(name: str) -> str | None:
        return both.http.post("/v1/chat/completions", json={"model": name, **ASK}).headers.get("X-Qhub-Base")

    for name in ("tiny", "second", "auto"):
        for path in ("one", "two"):
            refused = load(name, path)
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, "lora_name"), refused.text
    assert [load("mine", "two").status_code, base_of("mine")] == [200, "second"]
    assert load("mine", "one").status_code == 400
    assert "already been loaded" in load("mine", "two").text
    assert [load("mine", "one", load_inplace=True).status_code, base_of("mine")] == [200, "tiny"]
    assert [model["id"] for model in both.http.get("/v1/models").json()["data"]].count("mine") == 1
    assert both.http.post("/v1/unload_lora_adapter", json={"lora_name": "mine"}).status_code == 200
    assert base_of("mine") is None


def test_traffic_is_not_split_between_bases(both: Server, registry: Registry) -> None:
    """Whose side a user is on is not known yet when a base is chosen: refused, with what to ask for."""
    registry.set_alias("moved", "old", 1)
    registry.set_alias("moved", "new", 2)
    set_split(registry, "moved", [("old", 50), ("new", 50)])
    answer = both.http.post("/v1/chat/completions", json={"model": "moved", **ASK})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "model")
    assert "split between versions for several bases: ask for one of them, such as 'moved@old'" in answer.text
    for name, base in (("old", "tiny"), ("new", "second")):
        asked = both.http.post("/v1/chat/completions", json={"model": f"moved@{name}", **ASK})
        assert asked.headers["X-Qhub-Base"] == base
    set_split(registry, "moved", [])


def test_a_key_learns_nothing_of_names_that_it_is_not_for(bases: list[BaseInfo], tmp_path: Path) -> None:
    """Whether they exist, are split between bases, or a remote may have them: the same 403, and nothing is fetched."""
    registry = Registry(tmp_path / "home")
    for number, info in enumerate(bases, start=1):
        publish(registry, "moved", info, seed=number)
        registry.set_alias("moved", f"side{number}", number)
    set_split(registry, "moved", [("side1", 50), ("side2", 50)])
    publish(registry, "sql", bases[1], seed=3)
    key = Keys(registry.home).create(adapters=("sql*",))[1]
    running = Server([load_base(info, device="cpu") for info in bases], registry)
    asked: list[str] = []
    look = running.services._bring
    running.services._bring = lambda model: asked.append(model) or look(model)  # type: ignore[func-returns-value]
    running.http.headers["Authorization"] = f"Bearer {key}"
    try:
        for path, body in (("/v1/chat/completions", ASK), ("/v1/embeddings", {"input": "Hi"}), ("/api/show", {})):
            said = [running.http.post(path, json={"model": name, **body}) for name in ("moved", "nothing", "moved@2")]
            assert {answer.status_code for answer in said} == {403}, [answer.text for answer in said]
            assert "side1" not in "".join(answer.text for answer in said)
        assert asked == []
        answer = running.http.post("/v1/chat/completions", json={"model": "sql", **ASK})
        assert (answer.status_code, answer.headers["X-Qhub-Base"]) == (200, "second")
    finally:
        running.stop()


def test_a_router_is_asked_for_its_base(bases: list[BaseInfo], tmp_path: Path) -> None:
    """`auto` goes where the router's adapters are, though that base is not the first."""
    registry = Registry(tmp_path / "home")
    registry.home.bases.mkdir(parents=True)
    (registry.home.bases / "second").symlink_to(bases[1].folder)
    make_router(registry, bases[1], tmp_path)
    http = HttpOptions(router="router")
    running = Server([load_base(info, device="cpu") for info in bases], registry, http=http)
    try:
        answer = running.http.post("/v1/chat/completions", json={"model": "auto", **ASK})
        assert (answer.status_code, answer.headers["X-Qhub-Base"]) == (200, "second"), answer.text
        assert "auto" in [model["id"] for model in running.http.get("/v1/models").json()["data"]]
    finally:
        running.stop()


def test_bases_are_named_once(bases: list[BaseInfo], home: Home) -> None:
    """A name given twice, or one base under two names, is an error before anything is loaded."""
    with pytest.raises(InputError, match="'tiny' is named twice"):
        check_bases([bases[0], bases[0]])
    copy = replace(bases[0], name="copy")
    with pytest.raises(InputError, match="'tiny' and 'copy' are the same"):
        check_bases([bases[0], copy])
    result = CliRunner().invoke(command, ["--base", "tiny", "--base", "none"])
    assert isinstance(result.exception, NotFound)


def test_memory_is_shared() -> None:
    """Sizes are for all bases together; what has no size is each one's own."""
    whole = EngineOptions(kv_bytes=100, adapter_bytes=51, prefix_bytes=0, base_bytes=None, max_rows=3)
    half = share(whole, 2)
    assert (half.kv_bytes, half.adapter_bytes, half.prefix_bytes, half.base_bytes) == (50, 25, 0, None)
    assert half.max_rows == 3


def test_turns_are_taken_in_order() -> None:
    """No two at once, and nobody twice while another waits."""
    turns, inside, order = Turns(), [0], []

    def work(name: str) -> None:
        for _ in range(30):
            with turns:
                inside[0] += 1
                assert inside[0] == 1
                order.append(name)
                time.sleep(0.001)
                inside[0] -= 1

    threads = [threading.Thread(target=work, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    together = order[order.index("b") : len(order) - order[::-1].index("a")]
    assert len(order) == 60
    assert sum(one == other for one, other in pairwise(together)) <= 2
    with contextlib.suppress(KeyError), turns:
        raise KeyError
    with turns:  # an error does not keep the turn
        pass


def test_the_second_base_has_other_shapes() -> None:
    """Else a request that went to the wrong base could pass unseen."""
    assert llama_config(**SECOND).hidden_size != llama_config().hidden_size
