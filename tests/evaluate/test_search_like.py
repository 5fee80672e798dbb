"""`qhub search --like` and `--similar-to`: adapters by what they answer, and by the direction of their deltas."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.base.chat_template import stop_tokens
from adapterhub_local.base.load import load_base
from adapterhub_local.cli.main import qhub
from adapterhub_local.errors import InputError, NotFound, QhubError
from adapterhub_local.evaluate.evaluate import score
from adapterhub_local.evaluate.ranking import rank_by_loss
from adapterhub_local.lora.adapter import open_adapter
from adapterhub_local.merge.similar import rank_by_similarity
from adapterhub_local.registry import Registry
from adapterhub_local.rows.examples import read_chats, tokenise
from tests.routers import prompts, write_prompts
from tests.serve.adapter_makers import publish

MADE = {
    "plain": {"seed": 1, "rank": 4},
    "narrow": {"seed": 2, "rank": 2, "modules": ("q_proj", "v_proj")},
    "rslora": {"seed": 3, "rank": 8, "use_rslora": True},
    "dora": {"seed": 4, "rank": 2, "dora": True, "modules": ("q_proj",)},
    "again": {"seed": 1, "rank": 4, "strength": 1.0},
}


@pytest.fixture
def filled(tiny_base: BaseInfo, registry: Registry) -> Registry:
    """A registry with adapters of several kinds, one with two versions."""
    publish(registry, "plain", tiny_base, seed=9, rank=1)
    for name, settings in MADE.items():
        publish(registry, name, tiny_base, **settings)
    return registry


def run(*words: str) -> str:
    result = CliRunner().invoke(qhub, list(words), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_losses_are_those_of_each_adapter_alone(filled: Registry, tiny_base: BaseInfo, tmp_path: Path) -> None:
    """Many adapters in one row have the losses that plain PEFT finds one by one, whatever their kind."""
    base = load_base(tiny_base, device="cpu")
    chats = read_chats(write_prompts(tmp_path / "like.jsonl", [*prompts("alpha", 7), *prompts("beta", 4)]))
    tests = tokenise(chats, base.tokenizer, 512, stops=stop_tokens(tiny_base.folder, base.tokenizer))
    versions = [filled.resolve(name) for name in MADE]
    ranked = rank_by_loss(base, versions, tests)
    assert [one.loss for one in ranked] == sorted(one.loss for one in ranked)
    assert {one.version for one in ranked} == {*versions, None}
    for one in ranked:
        assert one.loss == pytest.approx(score(base, one.version, tests, 4).loss, rel=1e-4)


def test_the_verb_ranks_by_loss(filled: Registry, tmp_path: Path) -> None:
    """The newest version of every name and the base are ranked; words and --limit narrow it."""
    like = str(write_prompts(tmp_path / "like.jsonl", prompts("gamma", 5)))
    told = json.loads(run("search", "--like", like, "--json"))
    assert {one["adapter"] for one in told} == {"plain@2", "narrow@1", "rslora@1", "dora@1", "again@1", None}
    assert len(json.loads(run("search", "--like", like, "--limit", "2", "--json"))) == 2
    assert {one["adapter"] for one in json.loads(run("search", "narrow", "--like", like, "--json"))} == {
        "narrow@1",
        None,
    }
    assert "tiny (base)" in run("search", "--like", like, "--examples", "2")


def test_similarity_is_the_cosine_of_the_deltas(filled: Registry) -> None:
    """From the factors alone, the cosine is that of the dense deltas laid end to end; what is scaled is the same."""
    version = filled.resolve("plain")
    skipped: list[str] = []
    others = [filled.resolve(name) for name in MADE if name != "plain"]
    ranked = rank_by_similarity(version, others, lambda one, why: skipped.append(str(one)))
    assert skipped == ["dora@1"]
    assert str(ranked[0].version) == "again@1"
    assert ranked[0].cosine == pytest.approx(1.0, abs=1e-6)

    def dense(name: str) -> dict[str, torch.Tensor]:
        return {module: delta.dense().double() for module, delta in open_adapter(filled.resolve(name).path).deltas()}

    def product(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> float:
        return float(sum((one[module] * two[module]).sum() for module in one.keys() & two.keys()))

    ours = dense("plain")
    for one in ranked:
        theirs = dense(one.version.name)
        expected = product(ours, theirs) / (product(ours, ours) * product(theirs, theirs)) ** 0.5
        assert one.cosine == pytest.approx(expected, abs=1e-6)


def test_the_verb_ranks_by_similarity(filled: Registry) -> None:
    """The most similar comes first, what cannot be compared is named, and the version itself is left out."""
    told = json.loads(run("search", "--similar-to", "plain@2", "--json"))
    assert told[0] == {"adapter": "again@1", "cosine": pytest.approx(1.0, abs=1e-5)}
    assert "plain@2" not in [one["adapter"] for one in told]
    assert "+1.0000" in run("search", "--similar-to", "plain@2")
    result = CliRunner().invoke(qhub, ["search", "--similar-to", "plain@2"])
    assert "dora@1 is left out" in result.output


@pytest.mark.parametrize(
    ("words", "error", "sentence"),
    [
        (("--like", "none.jsonl"), QhubError, "none.jsonl"),
        (("--like", "x.jsonl", "--similar-to", "plain"), InputError, "exclude each other"),
        (("--similar-to", "palin"), NotFound, "did you mean plain"),
        (("a", "--base", "tiny"), InputError, "--base is for --like"),
    ],
)
def test_what_cannot_be_searched_is_refused(
    words: tuple[str, ...], error: type[Exception], sentence: str, filled: Registry
) -> None:
    """A mistake is one sentence, before anything is loaded."""
    result = CliRunner().invoke(qhub, ["search", *words])
    assert isinstance(result.exception, error)
    assert sentence in str(result.exception)


def test_nothing_to_search_for_is_bad_usage(registry: Registry) -> None:
    """Without words and options the verb says what is missing."""
    result = CliRunner().invoke(qhub, ["search"])
    assert result.exit_code == 2
    assert "Missing argument" in result.output
