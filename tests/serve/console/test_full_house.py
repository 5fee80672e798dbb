"""Runs, recipes, keys, splits, tasks and errors that nobody would make on purpose: each of their pages stays small."""

import json
from collections.abc import Iterator

import httpx
import pytest

from adapterhub_local.keys import Keys
from adapterhub_local.registry import Registry
from adapterhub_local.registry.split import set_split
from adapterhub_local.settings import home as home_at
from adapterhub_local.train.past_runs import LOG, RECORD
from serve.console.budget import BYTES, NODES, size_of
from serve.registry_api.starting import FOLDER
from tests.patience import PATIENCE
from tests.recipes import MINIMAL
from tests.serve.console.conftest import Console
from tests.serve.console.hostile import LONG, TEXT, UNSEEN, publish_hostile, scores
from tests.stores import LINEAGE, files

RUN = "20260101-000000-tone"
PAGES = {
    "tasks": ("/tasks", 200), "a task of 3,000 scores": ("/tasks/meter", 200),
    "a task of a long name": (f"/tasks/{'z' * 3000}", 404),
    "a score that is not there": ("/tasks/meter?metric=none", 404), "history": ("/history", 200),
    "keys and splits": ("/server", 200), "runs": ("/runs", 200), "a run": (f"/runs/{RUN}", 200),
    "a run that is not there": (f"/runs/{'%3C' * 3000}", 404), "a job that is not there": (f"/jobs/{'x' * 3000}", 404),
    "recipes": ("/runs/new", 200), "a long recipe": ("/runs/new?recipe=a.toml", 200),
    "a recipe that is not there": (f"/runs/new?recipe={'%3C' * 300}", 404),
    "changes of 5,000 letters": (f"/runs/new?recipe=a.toml&changes={'%3C' * 5000}", 400),
    "an adapter with 40 aliases and a split": ("/adapters/split-1", 200),
    "two that are not there": (f"/compare?left={'%3C' * 500}&right=x", 400), "a sign-in": ("/login", 200),
}  # fmt: skip


@pytest.fixture(scope="module")
def crowded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Console]:
    """A console over a home whose every folder is full of long texts, with a key that may see it all."""
    registry = Registry(home_at(tmp_path_factory.mktemp("crowded")))
    publish_hostile(registry, "long", LONG)
    metrics = {f"metric-{'x' * 200}-{index}": 0.5 for index in range(3000)}
    registry.publish("meter", files(3), LINEAGE | {"metrics": {"meter": {"adapter": metrics}}})
    tasks = {f"task-{'y' * 150}-{index}": scores() for index in range(350)}
    registry.publish("one", files(4), LINEAGE | {"metrics": tasks})
    for index in range(52):
        aliases = [(f"alias-number-{number}", 1) for number in range(40 if index == 1 else 1)]
        registry.publish(f"split-{index}", files(index), LINEAGE)
        for alias, _ in aliases:
            registry.set_alias(f"split-{index}", alias, 1)
        set_split(registry, f"split-{index}", aliases)
    long = LONG.encode("utf-8", "replace").decode()
    record = {"status": "failed", "name": "tone", "text": long, "reason": "<" * 100_000, "base": "b" * 100_000,
              "steps": long, "started_at": "q" * 1000, "version": "v" * 100_000, "path": "/none"}  # fmt: skip
    for index in range(60):
        run = registry.home.runs / (f"20250101-0000{index:02}-{'n' * 180}" if index else RUN)
        run.mkdir(parents=True)
        (run / RECORD).write_text(json.dumps(record | {"version": "&" * 5000} if index else record), encoding="utf-8")
        (run / LOG).write_text('{"step": 1, "loss": 2.0}\n', encoding="utf-8")
    folder = registry.home.root / FOLDER
    folder.mkdir()
    for index in range(120):
        broken = f"[base]\nname = 3\n'{'<' * 3000}' = 2\n"
        (folder / f"{'r' * 90}-{index}.toml").write_text(broken, encoding="utf-8")
    comment = "".join(letter for letter in TEXT if ord(letter) > 31 and letter not in "\ud800\u2028") + "<" * 200_000
    (folder / "a.toml").write_text(f"{MINIMAL}\n# {comment}\n", encoding="utf-8")
    (folder / "train.jsonl").write_text('{"prompt": "1", "completion": "2"}\n', encoding="utf-8")
    keys = Keys(registry.home)
    for _ in range(60):
        keys.create(note="<" * 200, adapters=tuple(f"pattern-{number}*" for number in range(30)))
    running = Console(registry)
    running.keys["all"] = keys.create(scopes=("infer", "admin"))[1]
    yield running
    running.stop()


def get(console: Console, path: str) -> httpx.Response:
    headers = {"Authorization": f"Bearer {console.keys['all']}", "Accept": "text/html"}
    return httpx.get(f"{console.url}{path}", headers=headers, timeout=PATIENCE, trust_env=False)


@pytest.mark.parametrize("page", PAGES)
def test_every_page_is_small(crowded: Console, page: str) -> None:
    """Bytes and elements stay within the budget, and no letter hides or turns others."""
    path, status = PAGES[page]
    answer = get(crowded, f"/console{path}")
    assert answer.status_code == status
    size, nodes = size_of(answer.content)
    assert size <= BYTES
    assert nodes <= NODES
    assert not [letter for letter in UNSEEN if letter in answer.text]


@pytest.mark.parametrize(
    ("path", "left_out"),
    [("/server", ("/v1/keys", "/v1/registry/splits")), ("/runs/new", ("/v1/recipes",)), ("/runs", ("/console/runs?",))],
)
def test_what_is_left_out_is_a_click_away(crowded: Console, path: str, left_out: tuple[str, ...]) -> None:
    """A page that does not show all leads to the rest."""
    text = get(crowded, f"/console{path}").text
    for place in left_out:
        assert f'href="{place}' in text
        assert get(crowded, place.rstrip("?")).status_code == 200
