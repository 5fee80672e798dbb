"""A router learns from prompts, says how sure it is, and leaves to the base what it does not know."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from adapterhub_local.base.bases import BaseInfo, read_record
from adapterhub_local.cli.main import qhub
from adapterhub_local.errors import Incompatible, InputError, QhubError
from adapterhub_local.refs import Reference
from adapterhub_local.registry import Registry
from adapterhub_local.router.classifier import fit
from adapterhub_local.router.features import HEAD, TAIL, Embeddings, clipped, embeddings_of, projected
from adapterhub_local.router.files import read_router
from adapterhub_local.router.measure import calibration_error
from adapterhub_local.router.router import Router
from adapterhub_local.router.train import train_router
from tests.routers import TASKS, make_router, prompts, write_prompts
from tests.serve.adapter_makers import publish


@pytest.fixture(scope="module")
def made(built_base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Registry, Router]:
    """A registry with a router of three adapters, and the router."""
    folder = tmp_path_factory.mktemp("router")
    registry = Registry(folder / "home")
    registry.home.bases.mkdir(parents=True)
    (registry.home.bases / "tiny").symlink_to(built_base)
    info = read_record(built_base)
    version = make_router(registry, info, folder, alias="prod").version
    return registry, Router(read_router(version.path, version), embeddings_of(info))


def test_unseen_prompts_find_their_adapter(made: tuple[Registry, Router]) -> None:
    """Prompts that the router never saw are routed to their task by at least 97 %, each with a high confidence."""
    _, router = made
    chosen = [(task, router.choose([text])) for task in TASKS for text in prompts(task, 100, seed=1)]
    right = [choice for task, choice in chosen if choice.reference == Reference(task, alias="prod")]
    assert len(right) >= 0.97 * len(chosen)
    assert all(choice.confidence > 0.8 and choice.reason == "sure" for choice in right)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("\u4f60\u597d\uff0c\u4e16\u754c", "unlike"),
        ("~~~~~~~~{}{}{}{}<>|||", "unlike"),
        ("", "empty"),
        ("qqqq", "unlike"),
    ],
)
def test_what_is_unlike_all_tasks_is_the_bases(made: tuple[Registry, Router], text: str, reason: str) -> None:
    """A text that is none of the tasks goes to the base, with the reason."""
    choice = made[1].choose([text])
    assert (choice.reference, choice.reason) == (None, reason)


def test_the_measure_is_of_prompts_that_were_held_back(made: tuple[Registry, Router]) -> None:
    """The lineage has accuracy, calibration and confusion; every row of it has as many prompts as were measured on, and
    none of these was learnt from."""
    registry, _ = made
    lineage = registry.resolve("router").lineage
    scores, said = lineage["metrics"]["routing"]["adapter"], lineage["router"]
    assert scores["accuracy"] >= 0.97
    assert 0 <= scores["calibration_error"] < 0.1
    assert [sum(row) for row in said["confusion"]] == [task["rows"] for task in said["tasks"]]
    assert scores["rows"] + said["prompts"]["train"] + said["prompts"]["held"] == 150 * len(TASKS)
    assert said["columns"] == [*(f"{task}@prod" for task in TASKS), "base"]
    assert [parent["reference"] for parent in lineage["parents"]] == [f"{task}@1" for task in TASKS]


@settings(max_examples=60, deadline=None)
@given(said=st.lists(st.sampled_from([*prompts("alpha", 3), *prompts("beta", 3), "thanks!", "", "\u4f60"]), max_size=6),
       more=st.lists(st.text(max_size=30), max_size=3))  # fmt: skip
def test_a_conversation_stays_with_its_adapter(made: tuple[Registry, Router], said: list[str], more: list[str]) -> None:
    """What the user says later does not change an adapter that was chosen."""
    _, router = made
    before = router.choose(said)
    if before.reference is not None:
        assert router.choose([*said, *more]) == before


@settings(max_examples=60, deadline=None)
@given(task=st.sampled_from(TASKS), seed=st.integers(0, 50), closed=st.sets(st.sampled_from(TASKS)))
def test_only_what_is_allowed_is_chosen(made: tuple[Registry, Router], task: str, seed: int, closed: set[str]) -> None:
    """An adapter that is not allowed is never chosen, and its prompts do not go to another one instead."""
    _, router = made
    (text,) = prompts(task, 1, seed)
    free, bound = router.choose([text]), router.choose([text], lambda name: name not in closed)
    assert bound.reference is None or bound.reference.name not in closed
    assert bound.reference in (free.reference, None)


def test_a_router_is_the_same_if_it_is_made_again(made: tuple[Registry, Router], tmp_path: Path) -> None:
    """Equal prompts and adapters give equal bytes, whatever the order of the lines."""
    registry, _ = made
    data = {task: [write_prompts(tmp_path / f"{task}.jsonl", prompts(task, 150)[::-1])] for task in TASKS}
    again = train_router(registry, "again", [f"{task}@prod" for task in TASKS], data=data)
    assert again.version.content_digest == registry.resolve("router").content_digest


def test_the_base_can_be_taught_what_is_its_own(tiny_base: BaseInfo, registry: Registry, tmp_path: Path) -> None:
    """Prompts given for the base are routed to it for the reason that they are its own."""
    own = write_prompts(tmp_path / "own.jsonl", prompts("gamma", 150))
    version = make_router(registry, tiny_base, tmp_path, tasks=TASKS[:2], base_data=[own]).version
    router = Router(read_router(version.path, version), embeddings_of(tiny_base))
    chosen = [router.choose([text]) for text in prompts("gamma", 50, seed=2)]
    assert sum(choice.reference is None and choice.reason == "base" for choice in chosen) >= 49
    assert version.lineage["router"]["routes"] == ["alpha@prod", "beta@prod", "base"]
    assert version.lineage["metrics"]["routing"]["adapter"]["accuracy"] >= 0.97


def test_one_adapter_or_none(tiny_base: BaseInfo, registry: Registry, tmp_path: Path) -> None:
    """A router of one adapter chooses between it and the base."""
    version = make_router(registry, tiny_base, tmp_path, tasks=TASKS[:1]).version
    router = Router(read_router(version.path, version), embeddings_of(tiny_base))
    assert sum(router.choose([text]).reference is not None for text in prompts("alpha", 50, 3)) >= 48
    assert sum(router.choose([text]).reference is None for text in prompts("beta", 50, 3)) >= 48


def test_prompts_are_found_by_the_lineage(tiny_base: BaseInfo, registry: Registry, tmp_path: Path) -> None:
    """Without --data the files that a lineage names are read, if their bytes are the same; what was held out
    in training is measured on."""
    from adapterhub_local.durable import digest_file

    paths = {role: write_prompts(tmp_path / f"a.{role}.jsonl", prompts("alpha", 60, seed))
             for seed, role in enumerate(("train", "test"))}  # fmt: skip
    plain = publish(registry, "plain", tiny_base, seed=1, rank=2)
    data = [{"role": role, "file": path.name, "digest": digest_file(path), "rows": 60} for role, path in paths.items()]
    files = {file.path: registry.blobs.path(file.digest) for file in plain.files}
    registry.publish("alpha", files, {"base": tiny_base.lineage(), "data": data})
    found = train_router(registry, "router", ["alpha"], look_in=tmp_path)
    assert found.measured.rows == 60
    paths["train"].write_text(paths["train"].read_text() + "\n")
    paths["test"].write_text(paths["test"].read_text() + "\n")
    with pytest.raises(InputError, match=r"a\.test\.jsonl, a\.train\.jsonl are not in .*: give --data alpha=FILE"):
        train_router(registry, "router", ["alpha"], look_in=tmp_path)


def refusals(folder: Path) -> dict[str, tuple[list[str], str]]:
    few = write_prompts(folder / "few.jsonl", prompts("alpha", 8))
    enough = write_prompts(folder / "enough.jsonl", prompts("alpha", 60))
    given = ["--data", f"alpha={enough}"]
    return {
        "no data": (["alpha"], "its lineage names no file): give --data alpha=FILE"),
        "few prompts": (["alpha", "--data", f"alpha={few}"], "has 8 different prompts in few.jsonl: at least 20"),
        "no file": (["alpha", "--data", f"alpha={folder}/none.jsonl"], "there is no file"),
        "other adapter": (["alpha", *given, "--data", f"beta={few}"], "--data is of 'beta', which is not one of the"),
        "twice": (["alpha@1", "alpha@prod", *given], "an adapter is named twice"),
        "unknown": (["alpah", *given], "there is no adapter 'alpah': did you mean alpha?"),
        "form of data": (["alpha", "--data", "x.jsonl"], "write an adapter and its file"),
        "requirement": (["alpha", *given, "--require", "exact_match>1"], "is not a requirement: write a metric"),
        "of another": (["alpha", *given, "--require", "beta.accuracy>=0.5"], "the router does not choose 'beta'"),
        "own name": (["alpha", *given, "--name", "alpha"], "'alpha' is an adapter: give the router a name of its own"),
        "a router": (["old"], "old@1 is a router: it has no weights to add to a base"),
    }


KINDS = ("no data", "few prompts", "no file", "other adapter", "twice", "unknown", "form of data", "requirement",
         "of another", "own name", "a router")  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_learnt_is_refused(kind: str, tiny_base: BaseInfo, registry: Registry, tmp_path: Path) -> None:
    """Each mistake is one sentence with its way out, exit code 2, and nothing is registered."""
    make_router(registry, tiny_base, tmp_path, name="old", tasks=TASKS[:1])
    words, sentence = refusals(tmp_path)[kind]
    before = [str(version) for version in registry.versions()]
    result = CliRunner().invoke(qhub, ["router", "train", "--name", "router", *words])
    assert isinstance(result.exception, InputError)
    assert sentence in str(result.exception)
    assert [str(version) for version in registry.versions()] == before


def test_a_router_that_falls_short_is_not_registered(tiny_base: BaseInfo, registry: Registry, tmp_path: Path) -> None:
    """--require keeps a router from being registered, with the figure that it has; one that holds is registered."""
    with pytest.raises(
        QhubError, match=r"not registered, accuracy>=1.1 is required, and it is (1|0\.\d+) on \d+ held-out"
    ):
        make_router(registry, tiny_base, tmp_path, requirements=["accuracy>=1.1"])
    assert "router" not in registry.names()
    kept = make_router(
        registry, tiny_base, tmp_path, requirements=["accuracy>=0.9", "alpha.accuracy>=0.9"], alias="prod"
    )
    assert registry.resolve("router@prod").number == kept.version.number == 1


def test_adapters_of_two_bases_have_no_router(tiny_base: BaseInfo, registry: Registry, tmp_path: Path) -> None:
    """A router is of one base, whose embeddings it learnt on."""
    make_router(registry, tiny_base, tmp_path, tasks=TASKS[:1])
    other = registry.resolve("alpha")
    files = {file.path: registry.blobs.path(file.digest) for file in other.files}
    registry.publish("far", files, {"base": {**tiny_base.lineage(), "fingerprint": "sha256:" + "0" * 64}})
    with pytest.raises(Incompatible, match="far@1 was made for someone/tiny"):
        train_router(registry, "two", ["alpha", "far"], data={"alpha": [tmp_path / "alpha.jsonl"]})


def test_the_verbs_show_it(made: tuple[Registry, Router], monkeypatch: pytest.MonkeyPatch) -> None:
    """`router show` and `router ask` print what was measured and chosen; `list` and `show` say what kind it is."""
    registry, _ = made
    monkeypatch.setenv("QHUB_HOME", str(registry.home.root))

    def run(*words: str) -> str:
        result = CliRunner().invoke(qhub, list(words), catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    assert "-> alpha@prod" in run("router", "show", "router")
    told = json.loads(run("router", "show", "router", "--json"))
    assert told["router"]["routes"][0] == "alpha@prod"
    asked = json.loads(run("router", "ask", "router@prod", "123456 + 654321 = ?", "\u4f60\u597d", "--json"))
    assert [one["adapter"] for one in asked] == ["alpha@prod", None]
    assert "alpha@prod" in run("router", "ask", "router@prod", "123456 + 654321 = ?")
    assert json.loads(run("list", "--json", "--metric", "accuracy>0.9"))[0]["kind"] == "router"
    assert "routing" in run("list")
    assert "chooses" in run("show", "router")


def test_long_texts_take_no_longer() -> None:
    """Of a long text the beginning and the end are looked at."""
    text = "a" * HEAD + "b" * 10**6 + "c" * TAIL
    assert clipped(text) == "a" * HEAD + "c" * TAIL
    assert clipped("short") == "short"


def test_a_table_says_what_the_means_say() -> None:
    """Rows of the table, averaged, are the mean embedding times the directions: the router computes what was learnt."""
    generator = torch.Generator().manual_seed(0)
    weight, directions = torch.randn(50, 8, generator=generator), torch.randn(8, 3, generator=generator)
    embeddings = Embeddings(lambda text: [ord(letter) % 50 for letter in text], weight)
    ids = [ord(letter) % 50 for letter in "some text"]
    expected = embeddings.mean(["some text"]) @ directions
    torch.testing.assert_close(projected(weight, directions)[ids].mean(0, keepdim=True), expected)


def test_confidence_is_calibrated_where_tasks_overlap() -> None:
    """Of two tasks that cannot always be told apart, what is chosen with a confidence of p is right with about p."""
    generator = torch.Generator().manual_seed(1)

    def draw(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        labels = torch.arange(count) % 2
        return torch.randn(count, 4, generator=generator) + labels[:, None] * 1.0, labels

    train, held, test = draw(400), draw(400), draw(4000)
    classifier = fit(*train, *held, 2, coverage=0.99)
    shares, near = classifier.judge(test[0] @ classifier.columns)
    sure = list(zip(shares.max(1).values.tolist(), (shares.argmax(1) == test[1]).tolist(), strict=True))
    assert calibration_error(sure) < 0.05
    assert 0.97 < near.gather(1, test[1][:, None]).float().mean() <= 1


def test_the_error_of_calibration() -> None:
    """Certain and wrong in a quarter of the cases is an error of a quarter; half sure and right in half is none."""
    assert calibration_error([(1.0, True)] * 3 + [(1.0, False)]) == pytest.approx(0.25)
    assert calibration_error([(0.5, True), (0.5, False)]) == pytest.approx(0.0)
