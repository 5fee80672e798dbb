"""`qhub recipe` and `qhub data`: everything is told before anything is trained, and nothing is left behind."""

import json
from pathlib import Path

import pytest

from adapterhub_local.base.modules import check_targets, linear_modules
from adapterhub_local.base.store import BaseInfo
from adapterhub_local.cli.main import run
from adapterhub_local.errors import InputError
from adapterhub_local.settings import Home
from tests.chats import write_recipe


def qhub(capsys: pytest.CaptureFixture, *arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of one command."""
    with pytest.raises(SystemExit) as exit_info:
        run([str(argument) for argument in arguments])
    code = exit_info.value.code
    assert isinstance(code, int)
    return code, *capsys.readouterr()


def test_init_check_show(
    tiny_base: BaseInfo, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recipe that `init` wrote passes `check` once its data are there, and is not overwritten."""
    monkeypatch.chdir(tmp_path)
    write_recipe(tmp_path).unlink()
    assert qhub(capsys, "recipe", "init")[0] == 0
    code, output, _ = qhub(capsys, "recipe", "check", "recipe.toml", "--json")
    checked = json.loads(output)

    assert code == 0
    assert checked["data"]["train"]["examples"] == 16
    assert checked["data"]["train"]["labels"] > 16
    assert checked["recipe"]["base"] == {"name": "tiny"}
    assert "recipe.toml is right" in qhub(capsys, "recipe", "check", "recipe.toml")[1]
    assert qhub(capsys, "recipe", "init")[0] == 2
    shown = json.loads(qhub(capsys, "recipe", "show", "recipe.toml", "--set", "train.seed=4", "--json")[1])
    assert shown["train"]["seed"] == {"value": 4, "from": "--set"}
    assert shown["base"]["name"]["from"].startswith("recipe.toml:")
    assert "seed = 4" in qhub(capsys, "recipe", "show", "recipe.toml", "--set", "train.seed=4")[1]
    assert json.loads(qhub(capsys, "recipe", "schema")[1])["title"] == "qhub recipe"


def test_preview_marks_what_is_learned(tiny_base: BaseInfo, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The preview shows examples in the chat template, the answer marked; in JSON every token says it."""
    path = write_recipe(tmp_path)
    _, text, _ = qhub(capsys, "data", "preview", path, "-n", "1")
    sample = json.loads(qhub(capsys, "data", "preview", path, "-n", "2", "--json")[1])["samples"][1]

    assert "<|im_start|>assistant\n>>yes<|im_end|><<" in text
    assert "train: train.jsonl, 16 examples, messages" in text
    assert [token["token"] for token in sample["tokens"] if token["learned"]] == ["n", "o", "<|im_end|>"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--set", "base.name=tine"], "there is no base 'tine': did you mean tiny?"),
        (["--set", 'adapter.target_modules=["q_proj", "v_porj"]'], "no linear module 'v_porj': did you mean 'v_proj'?"),
        (["--set", "data.max_length=9"], "data.max_length is 9"),
        (["--set", "data.max_length=9", "--set", "data.too_long=skip"], "none of 16 examples has something to learn"),
        (["--set", "data.format=alpaca"], "train.jsonl:1: the column 'instruction' must be text"),
        (["--set", "adapter.rank=0"], "must be from 1 to 4096"),
        (["--set", "train.optimizer=sgd"], "must be one of auto, paged_adamw_8bit"),
    ],
)
def test_check_tells_what_training_would(
    tiny_base: BaseInfo, home: Home, tmp_path: Path, capsys: pytest.CaptureFixture, changes: list[str], message: str
) -> None:
    """What is wrong is one line with exit code 2, the same as from `qhub train`, and nothing is written."""
    path = write_recipe(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    for verb in (["recipe", "check"], ["train"]):
        code, output, errors = qhub(capsys, *verb, path, *changes)

        assert code == 2
        assert output == ""
        assert errors.count("\n") == 1
        assert message in errors
        assert sorted(tmp_path.rglob("*")) == before


def test_modules_of_a_base(tiny_base: BaseInfo) -> None:
    """The linear layers are read from the header of the base's file; every target must be the end of one."""
    assert len(linear_modules(tiny_base)) == 14
    check_targets(tiny_base, ("q_proj", "layers.1.mlp.up_proj", "attention"))
    check_targets(tiny_base, "all-linear")
    for wrong in ("proj", "lm_head", "self_attn"):
        with pytest.raises(InputError, match=f"no linear module '{wrong}'"):
            check_targets(tiny_base, (wrong,))
