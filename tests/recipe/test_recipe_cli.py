"""`qhub recipe` and `qhub data`: everything is reported before anything is trained, and nothing is left behind."""

import json
from pathlib import Path

import pytest

from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.base.modules import check_targets, linear_modules
from adapterhub_local.cli.main import run
from adapterhub_local.errors import InputError
from adapterhub_local.settings import Home
from tests.chats import RECIPE, write_recipe


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
    assert "recipe.toml is valid" in qhub(capsys, "recipe", "check", "recipe.toml")[1]
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


def test_no_example_is_longer_than_the_base_takes(
    tiny_base: BaseInfo, home: Home, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Where data.max_length is not given and the base's context is shorter than its default, the context holds."""
    assert "max_length" not in RECIPE
    path = write_recipe(tmp_path)
    for name in ("train", "test"):
        row = {"messages": [{"role": "user", "content": "b" * 600}, {"role": "assistant", "content": "yes"}]}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row))
    scored = ["eval", "tiny", "--data", tmp_path / "test.jsonl"]
    for command in (["recipe", "check", path], ["data", "preview", path], ["plan", path], ["train", path], scored):
        code, _, errors = qhub(capsys, *command)
        assert (code, "at most 512 are read" in errors) == (2, True), (command, errors)
    cut = ["data", "preview", path, "--set", "data.too_long=skip"]
    assert "within 512 tokens" in qhub(capsys, *cut)[2]
    assert not home.runs.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--set", "base.name=tine"], "there is no base 'tine': did you mean tiny?"),
        (["--set", 'adapter.target_modules=["q_proj", "v_porj"]'], "no linear module 'v_porj': did you mean 'v_proj'?"),
        (["--set", "data.max_length=9"], "at most 9 are read"),
        (["--set", "data.max_length=513"], "data.max_length = 513: base 'tiny' takes texts of up to 512 tokens"),
        (["--set", "data.max_length=9", "--set", "data.too_long=skip"], "no example has anything to learn within"),
        (["--set", "data.format=alpaca"], "train.jsonl:1: there is no column 'instruction'"),
        (["--set", "adapter.rank=0"], "must be from 1 to 4096"),
        (["--set", "train.optimizer=sgd"], "must be one of auto, paged_adamw_8bit"),
        (["--set", "adapter.rank_pattern={ qproj = 2 }"], "adapter.rank_pattern: 'qproj' is not the end of any module"),
        (
            ["--set", "adapter.alpha_pattern={ '(' = 2 }"],
            "adapter.alpha_pattern: the pattern '(' is not a regular expression",
        ),
        (["--set", "adapter.from=sql@3"], "recipe.toml: --set: adapter.from = 'sql@3': there is no adapter 'sql'"),
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
        assert len([line for line in errors.splitlines() if line.startswith("qhub: ")]) == 1
        assert message in errors
        assert sorted(tmp_path.rglob("*")) == before


def test_a_gpu_that_is_not_there(
    tiny_base: BaseInfo, home: Home, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU that is asked for and not there is reported by check, dry run and training, with what to set."""
    monkeypatch.setenv("QHUB_DEVICE", "cuda")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    path = write_recipe(tmp_path)
    for verb in (["recipe", "check", path], ["train", path], ["train", path, "--dry-run"]):
        code, _, errors = qhub(capsys, *verb)

        last = errors.splitlines()[-1]
        assert (code, last) == (
            2, "qhub: a GPU was asked for (cuda) and torch sees none: set QHUB_DEVICE to auto or cpu"
        )  # fmt: skip
    assert not home.runs.exists()


def test_all_runs_of_a_sweep_are_checked(
    tiny_base: BaseInfo, home: Home, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The check names what is wrong in every run: values, modules, data and lengths, each line as `qhub: ...`."""
    paired = "[sweep.paired]\n"
    paired += "base.name = ['tiny', 'tiny', 'b']\nadapter.target_modules = [['v_proj'], ['q_porj'], ['x']]\n"
    code, _, errors = qhub(capsys, "recipe", "check", write_recipe(tmp_path, RECIPE + paired))
    lines = errors.splitlines()

    assert code == 2
    assert [line.partition(" of [sweep]: ")[2] for line in lines] == [
        "adapter.target_modules: base 'tiny' has no linear module 'q_porj': did you mean 'q_proj'?",
        "base.name: there is no base 'b': did you mean tiny?",
    ]
    assert all(line.startswith(f"qhub: {tmp_path}/recipe.toml: run ") for line in lines)
    code, _, errors = qhub(
        capsys, "recipe", "check", write_recipe(tmp_path, RECIPE + "[sweep.grid]\ndata.max_length = [100, 20, 30]")
    )
    assert code == 2
    assert [int(line.partition("at most ")[2][:2]) for line in errors.splitlines()] == [20, 30]
    ok = qhub(capsys, "recipe", "check", write_recipe(tmp_path, RECIPE + "[sweep.grid]\ntrain.seed = [1, 2]"))
    assert ok[0] == 0
    assert "is valid, a sweep of 2 runs" in ok[1]


def test_modules_of_a_base(tiny_base: BaseInfo) -> None:
    """The linear layers are read from the header of the base's file; every target must be the end of one."""
    assert len(linear_modules(tiny_base)) == 14
    check_targets(tiny_base, ("q_proj", "layers.1.mlp.up_proj", "attention"))
    check_targets(tiny_base, "all-linear")
    for wrong in ("proj", "lm_head", "self_attn"):
        with pytest.raises(InputError, match=f"no linear module '{wrong}'"):
            check_targets(tiny_base, (wrong,))
