"""A reward in Python: run only where it was allowed, kept with the version, its mistakes named."""

from pathlib import Path

import pytest

from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.cli.main import run
from adapterhub_local.errors import BadRecipe, InputError, QhubError
from adapterhub_local.evaluate.reward_code import load_function
from adapterhub_local.evaluate.rewards import declared, own_rewards, worth
from adapterhub_local.recipe import load_recipe
from adapterhub_local.recipe.reward import Reward
from adapterhub_local.registry import Registry
from adapterhub_local.settings import Home
from tests.chats import RECIPE, write_chats

CODE = "def reward(prompt, answer, wanted):\n    return len(answer) + 10 * (wanted in prompt)\n"
GRPO = '\n[reward]\nmax_tokens = 4\nsamples = 4\npython = "rewards.py"\npython_weight = 0.5\n'


@pytest.fixture(autouse=True)
def not_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is allowed, whatever the machine's user allows; what a test allows ends with it."""
    monkeypatch.setenv("QHUB_ALLOW_CODE", "")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe that names a Python file beside it."""
    (tmp_path / "rewards.py").write_text(CODE)
    text = RECIPE.replace("[train]", '[train]\nobjective = "grpo"')
    (tmp_path / "recipe.toml").write_text(text + GRPO)
    write_chats(tmp_path / "train.jsonl", 8)
    write_chats(tmp_path / "test.jsonl", 4, offset=1)
    return tmp_path / "recipe.toml"


def called(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        run([*arguments])
    return int(caught.value.code or 0)


def test_its_value_counts_with_its_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is given prompt, answer and the data's answer, and adds up with the others."""
    monkeypatch.setenv("QHUB_ALLOW_CODE", "1")
    rules = worth(Reward(python=CODE, python_weight=0.5, exact_match=1.0))
    assert rules("yes", "yes", 1, True, "say yes") == 0.5 * 13 + 1.0
    assert rules("no", "yes", 1, True, "say") == 1.0


def test_numbers_of_other_libraries_count() -> None:
    """NumPy's scalars are numbers, as are true and false."""
    assert load_function("import numpy\ndef reward(*texts):\n    return numpy.float32(0.5)\n")("", "", "") == 0.5
    assert load_function("def reward(*texts):\n    return True\n")("", "", "") == 1.0


def test_what_is_not_python_is_refused_first(
    recipe: Path, tiny_base: BaseInfo, home: Home, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file that Python cannot read is reported with its line before it may run."""
    (recipe.parent / "rewards.py").write_text("import math\ndef reward(:\n")
    for command in (["recipe", "check"], ["plan"], ["train", "--allow-code"]):
        assert called(*command, str(recipe)) == 2
        assert "reward.python = 'rewards.py': is not Python: invalid syntax (line 2)" in capsys.readouterr().err
    (recipe.parent / "rewards.py").write_bytes(b"x = 1\0")
    assert called("recipe", "check", str(recipe)) == 2
    assert "is not Python" in capsys.readouterr().err
    assert not home.runs.exists()


def test_it_runs_only_where_it_was_allowed(
    recipe: Path, tiny_base: BaseInfo, home: Home, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without the flag nothing of it runs, in training and scoring; with it the version keeps the code."""
    marked = recipe.parent / "ran"
    (recipe.parent / "rewards.py").write_text(f"open({str(marked)!r}, 'w').close()\n{CODE}")
    assert called("recipe", "check", str(recipe)) == 0
    assert called("train", str(recipe)) == 2
    assert "reward.python is Python code, which runs as you: read it, then add --allow-code" in capsys.readouterr().err
    assert not marked.exists()
    assert not home.runs.exists()

    assert called("train", str(recipe), "--allow-code") == 0
    assert marked.exists()
    (version,) = Registry().versions()
    kept = own_rewards([version])
    assert kept is not None
    assert kept.python == (recipe.parent / "rewards.py").read_text()
    assert declared(kept)["python"].startswith("sha256:")


def test_the_code_of_a_version_does_not_run_by_itself(
    recipe: Path, tiny_base: BaseInfo, home: Home, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`qhub eval` of a version that was trained by code says that it is not run, and runs it where that is allowed."""
    monkeypatch.setenv("QHUB_ALLOW_CODE", "1")
    assert called("train", str(recipe)) == 0
    name = str(Registry().versions()[0])
    monkeypatch.setenv("QHUB_ALLOW_CODE", "")
    data = str(recipe.parent / "test.jsonl")
    capsys.readouterr()
    assert called("eval", name, "--data", data) == 0
    shown = capsys.readouterr()
    assert "not scored: the reward, which is Python code kept with the version" in " ".join(
        (shown.out + shown.err).split()
    )
    assert called("eval", name, "--data", data, "--rewards", str(recipe)) == 2
    capsys.readouterr()
    assert called("eval", name, "--data", data, "--allow-code", "--json") == 0
    assert '"reward"' in capsys.readouterr().out


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def reward(:\n", r"cannot be run: SyntaxError: .*\(line 1\)"),
        ("import nothing_of_this_name\n", r"cannot be run: ModuleNotFoundError: .*\(line 1\)"),
        ("exit(3)\n", r"cannot be run: SystemExit: 3"),
        ("x = 1\n", r"has no function 'reward\(prompt, answer, wanted\)'"),
        ("reward = 3\n", r"has no function"),
    ],
)
def test_code_that_gives_no_function(code: str, message: str) -> None:
    """It is refused with the reason and its line."""
    with pytest.raises(InputError, match=message):
        load_function(code)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return None", r"returned None for the answer 'yes', which is not a number"),
        ("return 'good'", r"returned 'good'"),
        ("return float('nan')", r"returned nan"),
        ("return wanted.missing", r"failed for the answer 'yes': AttributeError: .*\(line 2\)"),
        ("raise SystemExit(1)", r"failed for the answer 'yes': SystemExit: 1 \(line 2\)"),
    ],
)
def test_a_function_that_gives_no_number(body: str, message: str) -> None:
    """The answer that it failed for is named."""
    function = load_function(f"def reward(prompt, answer, wanted):\n    {body}\n")
    with pytest.raises(QhubError, match=message):
        function("", "yes", "no")


def test_a_file_that_is_not_there(recipe: Path) -> None:
    """A recipe that names no file is refused when it is read."""
    (recipe.parent / "rewards.py").unlink()
    with pytest.raises(BadRecipe, match=r"reward\.python: .*rewards\.py cannot be read: No such file"):
        load_recipe(recipe)
