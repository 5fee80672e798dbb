"""Evaluation: what is reported is what greedy decoding would do."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from adapterhub_local.base.bases import BaseInfo, base_of, find_base, remove_base
from adapterhub_local.base.load import load_base
from adapterhub_local.cli.main import run
from adapterhub_local.errors import Incompatible
from adapterhub_local.evaluate.evaluate import score
from adapterhub_local.evaluate.metrics import evaluate
from adapterhub_local.evaluate.written import is_json, matches, read_pattern
from adapterhub_local.intervals import bootstrap, wilson
from adapterhub_local.recipe import load_recipe
from adapterhub_local.registry import Registry, Version
from adapterhub_local.rows.examples import read_chats, tokenise
from adapterhub_local.settings import Home
from adapterhub_local.train.train import train
from tests.chats import write_chats, write_recipe


def test_exact_match_is_greedy_decoding(tiny_base: BaseInfo, home: Home, tmp_path: Path) -> None:
    """Exact match, told from one forward pass, is the share of answers that `generate` writes token for token."""
    version = train(load_recipe(write_recipe(tmp_path), ["train.epochs=12"]), home)
    base = load_base(tiny_base)
    path = write_chats(tmp_path / "more.jsonl", 12, offset=2)
    tests = tokenise(read_chats(path), base.tokenizer, 512)
    reported = score(base, version, tests, 5)

    from peft import PeftModel

    model = PeftModel.from_pretrained(base.model, str(version.path)).eval()
    right, losses, labels = 0, 0.0, 0
    for example in tests:
        ((start, end),) = example.spans
        prompt = torch.tensor([example.ids[:start]])
        written = model.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=end - start, do_sample=False
        )
        right += written[0, start:].tolist() == list(example.ids[start:end])
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([example.ids])).logits[0, start - 1 : end - 1]
        losses += cross_entropy(logits, torch.tensor(example.ids[start:end]), reduction="sum").item()
        labels += end - start

    assert reported.exact_match == pytest.approx(right / len(tests))
    assert reported.loss == pytest.approx(losses / labels, rel=1e-4)
    assert right > 0, "a test that learned nothing would prove nothing"


def test_batch_size_changes_nothing(tiny_base: BaseInfo, tmp_path: Path) -> None:
    """Scores do not depend on how many examples share a forward pass."""
    base = load_base(tiny_base)
    path = write_chats(tmp_path / "data.jsonl", 7)
    tests = tokenise(read_chats(path), base.tokenizer, 512)
    scores = [evaluate(base.model, tests, size) for size in (1, 3, 7)]

    assert [score.loss for score in scores] == pytest.approx([scores[0].loss] * 3, rel=1e-5)
    assert len({score.exact_match for score in scores}) == 1


def test_scoring_leaves_the_base_as_it_was(tiny_base: BaseInfo, home: Home, tmp_path: Path) -> None:
    """After an adapter was scored, the loaded base answers as before."""
    version = train(load_recipe(write_recipe(tmp_path)), home)
    base = load_base(tiny_base)
    path = tmp_path / "test.jsonl"
    tests = tokenise(read_chats(path), base.tokenizer, 512)
    before = score(base, None, tests, 4)
    with_adapter = score(base, version, tests, 4)

    assert score(base, None, tests, 4) == before
    assert with_adapter.loss != before.loss


def test_eval_command(tiny_base: BaseInfo, home: Home, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """`qhub eval` scores adapters and bases, prints JSON, and keeps the score with the version."""
    version = train(load_recipe(write_recipe(tmp_path), ["output.task=other"]), home)
    with pytest.raises(SystemExit) as exit_info:
        run(["eval", "yes-no", "tiny", "--data", str(tmp_path / "test.jsonl"), "--task", "held-out", "--json"])
    printed = json.loads(capsys.readouterr().out)
    kept = Registry(home).metrics(version)

    assert exit_info.value.code == 0
    assert set(printed["scores"]) == {"yes-no@1", "tiny"}
    assert kept["held-out"]["adapter"] == printed["scores"]["yes-no@1"]
    assert kept["other"]["adapter"]["loss"] == pytest.approx(kept["held-out"]["adapter"]["loss"], rel=1e-4)


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_a_run_and_eval_measure_in_one_dtype(
    compute: str,
    tiny_base: BaseInfo,
    home: Home,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What `auto` is for a run it is for `qhub eval`, which keeps what it was: the same rows score the same."""
    monkeypatch.setenv("QHUB_COMPUTE", compute)
    version = train(load_recipe(write_recipe(tmp_path)), home)
    data = tmp_path / "test.jsonl"
    (told,) = version.lineage["metrics"].values()
    (scored,) = eval_json(capsys, version, "--data", data)["scores"].values()
    how = Registry(home).metrics(version)["test"].get("how", {})

    assert version.lineage["training"]["compute"] == compute
    assert scored["loss"] == pytest.approx(told["adapter"]["loss"], rel=1e-5 if compute == "float32" else 1e-3)
    assert how.get("compute", "float32") == compute


def test_a_version_of_another_base(tiny_base: BaseInfo, home: Home, tmp_path: Path) -> None:
    """A version whose base is not in the home says which base to add."""
    version = train(load_recipe(write_recipe(tmp_path)), home)
    remove_base("tiny", home, force=True)
    with pytest.raises(Incompatible, match=r"someone/tiny.*qhub base add"):
        base_of(version, home)


def eval_json(capsys: pytest.CaptureFixture, *arguments: object) -> dict:
    """What `qhub eval ... --json` prints."""
    with pytest.raises(SystemExit) as exit_info:
        run(["eval", *map(str, arguments), "--json"])
    assert exit_info.value.code == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def trained(tiny_base: BaseInfo, home: Home, tmp_path: Path) -> Version:
    """An adapter that has learned to say yes and no."""
    return train(load_recipe(write_recipe(tmp_path), ["train.epochs=12", "eval.limit=1"]), home)


def test_comparisons_choices_patterns_and_json(
    trained: Version, home: Home, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Every metric is what its definition gives when computed the long way; all are kept with the version."""
    path = write_chats(tmp_path / "held.jsonl", 10, offset=2)
    options = ("--choices", "yes,no", "--regex", "^(yes|no)$", "--json-valid", "--max-new-tokens", 6)
    printed = eval_json(capsys, "yes-no", "--data", path, "--against", "base", *options)
    ours, theirs = printed["scores"]["yes-no@1"], printed["scores"]["tiny"]

    base = load_base(find_base("tiny", home))
    chats = read_chats(path)
    right = {"accuracy": 0, "regex_match": 0, "json_valid": 0}
    for chat in chats:
        prompt = base.tokenizer.apply_chat_template(chat.prompt, add_generation_prompt=True, return_dict=False)
        likely = {}
        for choice in ("yes", "no"):
            whole = torch.tensor([prompt + base.tokenizer(choice + "<|im_end|>")["input_ids"]])
            with torch.no_grad():
                logs = base.model(input_ids=whole).logits[0, :-1].log_softmax(-1)
            likely[choice] = logs.gather(1, whole[0, 1:, None])[len(prompt) - 1 :].sum().item()
        right["accuracy"] += max(likely, key=lambda choice: likely[choice]) == chat.messages[-1]["content"]
        ids = torch.tensor([prompt])
        out = base.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
        text = base.tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True)
        right["regex_match"] += text == chat.messages[-1]["content"]
        right["json_valid"] += is_json(text)
    for name, count in right.items():
        assert theirs[name] == pytest.approx(count / 10), name
    assert ours["accuracy"] > 0.5
    assert ours["regex_match"] >= ours["exact_match"]
    assert ours["perplexity"] == pytest.approx(math.exp(ours["loss"]), rel=1e-4)
    difference = printed["differences"]["yes-no@1"]["base"]
    assert difference["loss"]["value"] == pytest.approx(ours["loss"] - theirs["loss"], abs=1e-5)
    assert difference["loss"]["is_clear"]
    assert difference["loss"]["interval"][1] < 0
    kept = Registry(home).metrics(trained)["held"]
    assert kept["adapter"] == ours
    assert kept["base"]["difference"] == difference
    assert kept["how"] == {"template": "chat", "choices": "yes,no", "regex": "^(yes|no)$", "max_new_tokens": 6}
    with pytest.raises(SystemExit):
        run(["show", "yes-no"])
    assert "accuracy" in capsys.readouterr().out


def test_an_adapter_against_itself(trained: Version, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A version compared with itself differs by nothing, and that is not called clear; every part of it is there."""
    write_chats(tmp_path / "held.jsonl", 5)
    with pytest.raises(SystemExit):
        run(["eval", "yes-no", "--data", str(tmp_path / "held.jsonl"), "--against", "yes-no@1"])
    output = capsys.readouterr().out

    assert "yes-no@1 minus yes-no@1, loss: +0.0000 [+0.0000, +0.0000], may be chance" in output
    assert "perplexity" in output


def test_held_out_columns_are_read_as_in_training(
    tiny_base: BaseInfo, tmp_path: Path, home: Home, capsys: pytest.CaptureFixture
) -> None:
    """An adapter trained on columns is scored on columns without saying it again; another format can be said."""
    for name in ("train", "test"):
        rows = [f"{'ab'[i % 2]},{'yes' if i % 2 else 'no'}" for i in range(8)]
        (tmp_path / f"{name}.csv").write_text("\n".join(["letter,label", *rows]))
    changes = ["data.train=train.csv", "data.test=test.csv", "data.prompt=Say {letter}", "data.answer={label}"]
    version = train(load_recipe(write_recipe(tmp_path), changes), home)
    printed = eval_json(capsys, "yes-no", "--data", tmp_path / "test.csv", "--task", "again")
    told = version.lineage["metrics"]["yes-no"]["adapter"]
    other = eval_json(capsys, "yes-no", "--data", tmp_path / "test.jsonl", "--format", "messages")

    assert printed["scores"]["yes-no@1"]["loss"] == pytest.approx(told["loss"], rel=1e-4)
    assert other["scores"]["yes-no@1"]["rows"] == 6


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--choices", "yes,maybe"], "data.jsonl:2: the answer 'no' is none of the choices yes, maybe"),
        (["--choices", "yes"], "--choices needs two or more different answers"),
        (["--regex", "("], "is not a regular expression"),
        (["--against", "nobody"], "there is no adapter 'nobody'"),
        (["--template", "chatty"], "--template chatty: must be one of auto, chat, plain"),
        (["--format", "x"], "--format x: must be one of"),
        (["--prompt", "{text}"], "--prompt and --answer need each other"),
        (["--max-length", "9"], "at most 9 are read"),
        (["--data", "none.jsonl"], "there is no data file none.jsonl"),
    ],
)
def test_wrong_use_of_eval(
    tiny_base: BaseInfo, tmp_path: Path, capsys: pytest.CaptureFixture, options: list[str], told: str
) -> None:
    """What cannot be scored is one line with exit code 2."""
    path = write_chats(tmp_path / "data.jsonl", 4)
    with pytest.raises(SystemExit) as exit_info:
        run(["eval", "tiny", "--data", str(path), *options])
    captured = capsys.readouterr()

    assert exit_info.value.code == 2
    assert captured.out == ""
    assert told in captured.err
    assert captured.err.count("\n") == 1


def test_wilson_covers() -> None:
    """Wilson's interval agrees with published values, and holds the true share 95 % of the time."""
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # Newcombe 1998, table I
    assert wilson(0, 20)[0] == 0.0
    assert wilson(0, 20)[1] == pytest.approx(0.1611, abs=1e-4)
    draws = np.random.default_rng(0).binomial(40, 0.9, 2000)
    covered = sum(low <= 0.9 <= high for low, high in (wilson(int(k), 40) for k in draws))
    assert 0.92 < covered / 2000 < 0.98


def test_the_bootstrap_covers_and_pairs() -> None:
    """The interval of a mean is near the normal one; a difference on the same examples is far better known."""
    generator = np.random.default_rng(1)
    hard = generator.normal(0, 1, 400)
    better, worse = hard + 0.9, hard + 1 + generator.normal(0, 0.1, 400)
    low, high = bootstrap(better, [1.0] * 400)
    error = better.std() / 20
    assert (low, high) == pytest.approx((better.mean() - 1.96 * error, better.mean() + 1.96 * error), abs=0.2 * error)
    paired = bootstrap(better, [1.0] * 400, worse)
    assert paired[0] < -0.1 < paired[1] < 0
    assert paired[1] - paired[0] < 0.25 * (high - low)
    assert bootstrap(better, [1.0] * 400) == (low, high)


@pytest.mark.parametrize(
    ("pattern", "written", "reference", "wanted"),
    [
        (r"#### (\d+)", "so #### 42", "x #### 42", True),
        (r"#### (\d+)", "so #### 41", "x #### 42", False),
        (r"#### (\d+)", "so 42", "x #### 42", False),
        (r"#### (\d+)", "so #### 42", "x", False),
        (r"\d", "4", "x", True),
    ],
)
def test_patterns(pattern: str, written: str, reference: str, wanted: bool) -> None:
    """A pattern must be found in what is written, with the groups that it finds in the reference."""
    assert matches(read_pattern(pattern), written, reference) is wanted
