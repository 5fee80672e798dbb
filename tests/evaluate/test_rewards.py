"""Rewards of written answers: of a version that was trained by them, and of any by a recipe, with intervals."""

import json
from pathlib import Path

import pytest

from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.base.load import load_base
from adapterhub_local.cli.main import run
from adapterhub_local.evaluate.evaluate import Checks, checked
from adapterhub_local.evaluate.metrics import evaluate
from adapterhub_local.evaluate.written import ends_of, write_ids
from adapterhub_local.recipe import load_recipe
from adapterhub_local.recipe.reward import Reward
from adapterhub_local.registry import Registry
from adapterhub_local.rows.examples import read_chats, tokenise
from adapterhub_local.settings import Home
from adapterhub_local.train.train import train
from tests.chats import RECIPE, write_chats, write_rows

GRPO = RECIPE.replace("[eval]", '[reward]\nregex = "[a-z]"\nmax_tokens = 6\nsamples = 8\n\n[eval]').replace(
    "epochs = 2", 'max_steps = 1\nobjective = "grpo"'
)


@pytest.fixture(name="folder")
def _folder(tmp_path: Path) -> Path:
    """Two recipes, one of them with rewards, and their data."""
    (tmp_path / "recipe.toml").write_text(RECIPE)
    (tmp_path / "grpo.toml").write_text(GRPO)
    write_chats(tmp_path / "train.jsonl", 16)
    write_chats(tmp_path / "test.jsonl", 6, offset=1)
    return tmp_path


def evaluated(*words: str) -> int:
    with pytest.raises(SystemExit) as exit_info:
        run(["eval", *words])
    return int(exit_info.value.code or 0)


def test_an_adapter_and_its_rewards(
    tiny_base: BaseInfo, home: Home, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A version trained by rewards is scored by them without being asked for, as its run did, the base beside it."""
    version = train(load_recipe(folder / "grpo.toml"), home)
    trained = version.lineage["metrics"]["yes-no"]
    data = str(folder / "test.jsonl")
    assert evaluated("yes-no", "--data", data, "--against", "base", "--task", "again", "--regex", "^y") == 0
    out, kept = capsys.readouterr().out, Registry(home).metrics(version)["again"]

    for who in ("adapter", "base"):
        low, high = trained[who]["intervals"]["reward"]
        assert low <= trained[who]["reward"] <= high
        assert kept[who]["reward"] == trained[who]["reward"]
        assert kept[who]["intervals"]["reward"] == trained[who]["intervals"]["reward"]
    gained = kept["base"]["difference"]["reward"]
    assert gained["value"] == pytest.approx(kept["adapter"]["reward"] - kept["base"]["reward"], abs=1e-5)
    assert kept["how"]["rewards"] == {"regex": "[a-z]", "max_tokens": 6}
    assert f"yes-no@1 minus base, reward: {gained['value']:+.4f}" in out


def test_rewards_of_a_recipe(tiny_base: BaseInfo, home: Home, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Any base or adapter is scored by the rewards of a recipe, and without one by none."""
    data = str(folder / "test.jsonl")
    assert evaluated("tiny", "--data", data, "--json") == 0
    (plain,) = json.loads(capsys.readouterr().out)["scores"].values()
    assert evaluated("tiny", "--data", data, "--rewards", str(folder / "grpo.toml"), "--json") == 0
    (scored,) = json.loads(capsys.readouterr().out)["scores"].values()

    assert "reward" not in plain
    assert 0 <= scored["reward"] <= 1
    assert scored["loss"] == plain["loss"]
    low, high = scored["intervals"]["reward"]
    assert low <= scored["reward"] <= high


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--data", "test.jsonl", "--rewards", "recipe.toml"], "its train.objective is 'sft', and rewards are those"),
        (["--data", "test.jsonl", "--rewards", "nothing.toml"], "nothing.toml"),
        (["--data", "pairs.jsonl", "--rewards", "grpo.toml"], "has pairs of answers, which are scored by themselves"),
        (["--lm-eval", "tasks", "--rewards", "grpo.toml"], "--rewards and --lm-eval exclude each other"),
    ],
)
def test_wrong_use(
    tiny_base: BaseInfo,
    home: Home,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    told: str,
) -> None:
    """What cannot be scored is one sentence, with exit code 2."""
    monkeypatch.chdir(folder)
    write_rows(folder / "pairs.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])

    assert evaluated("tiny", *words) == 2
    err = capsys.readouterr().err
    assert told in err
    assert "Traceback" not in err


@pytest.mark.parametrize(("most", "looked_at"), [(2, 9), (9, 2), (5, 5)])
def test_each_check_sees_its_own_length(tiny_base: BaseInfo, folder: Path, most: int, looked_at: int) -> None:
    """Answers are written once: rewards look at their `max_tokens`, other checks at `max_new_tokens`."""
    base = load_base(tiny_base)
    tests = tokenise(read_chats((folder / "test.jsonl",)), base.tokenizer, 512)
    reward = Reward(regex=f"^[^x]{{{most}}}$|.", regex_weight=2.0, length=most, max_tokens=most)
    found = checked(
        evaluate(base.model, tests, 4), base.model, base.tokenizer, tests,
        Checks(wants_json=True, max_new_tokens=looked_at, reward=reward), 4,
    )  # fmt: skip
    written = write_ids(base.model, base.tokenizer, tests, most, 4)
    ends = ends_of(base.model, base.tokenizer)
    texts = base.tokenizer.batch_decode(written, skip_special_tokens=True)

    wanted = [2.0 * bool(text) + (ids[-1] in ends) for text, ids in zip(texts, written, strict=True)]
    assert list(found.means["reward"]) == wanted
    assert len(found.hits["json_valid"]) == len(tests)
