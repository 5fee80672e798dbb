"""Tasks of lm-evaluation-harness, local and kept with the version."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.base.load import load_base
from adapterhub_local.cli.main import qhub
from adapterhub_local.errors import InputError
from adapterhub_local.evaluate.evaluate import adapted
from adapterhub_local.evaluate.harness import find_tasks
from adapterhub_local.recipe import load_recipe
from adapterhub_local.registry import Registry
from adapterhub_local.settings import Home
from adapterhub_local.train.train import train
from tests.chats import write_recipe

needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None,
    reason="lm-evaluation-harness is not installed: pip install 'lm-eval[hf]'",
)
VOWEL = """task: vowel
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "Is {{letter}} a vowel?"
doc_to_choice: ["no", "yes"]
doc_to_target: label
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
COPY = """task: copy
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_text: "Say {{letter}}:"
doc_to_target: "{{letter}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 2, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


def write_tasks(folder: Path) -> Path:
    """Two task files and their data, outside the folder that is searched for tasks."""
    rows = [{"letter": letter, "label": int(letter in "aeiou")} for letter in "abcdefgh"]
    (folder / "letters.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tasks").mkdir()
    for name, text in (("vowel", VOWEL), ("copy", COPY)):
        (folder / "tasks" / f"{name}.yaml").write_text(text.replace("DATA", str(folder / "letters.jsonl")))
    return folder / "tasks"


def log_likelihood(model: torch.nn.Module, tokenizer: object, prompt: str, answer: str) -> float:
    """Of an answer after a blank, as the harness asks for it."""
    start, ids = (tokenizer(text, return_tensors="pt")["input_ids"] for text in (prompt, f"{prompt} {answer}"))
    with torch.inference_mode():
        logs = model(ids).logits[0, :-1].float().log_softmax(-1)
    targets = ids[0, 1:]
    return float(logs[range(len(targets)), targets][start.shape[1] - 1 :].sum())


@needs_harness
@pytest.mark.filterwarnings("ignore")  # of the harness and what it brings
def test_tasks_are_scored_and_kept(
    tiny_base: BaseInfo, home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The harness's accuracy is that of PEFT's own log-likelihoods, beside the base's; results are the version's."""
    version = train(load_recipe(write_recipe(tmp_path)), home)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = write_tasks(tmp_path)
    done = CliRunner().invoke(
        qhub, ["eval", "yes-no", "--lm-eval", str(folder), "--against", "base", "--json"], catch_exceptions=False
    )
    said = json.loads(done.stdout)
    base = load_base(tiny_base)
    expected = {}
    for name, path in (("yes-no@1", version.path), ("tiny", None)):
        with adapted(base, path) as model:
            asked = [f"Is {letter} a vowel?" for letter in "abcdefgh"]
            scores = [[log_likelihood(model, base.tokenizer, each, word) for word in ("no", "yes")] for each in asked]
        right = [(yes > no) == (letter in "aeiou") for letter, (no, yes) in zip("abcdefgh", scores, strict=True)]
        expected[name] = sum(right) / len(right)
    kept = Registry(home).metrics(version)

    assert {name: score["acc"] for name, score in said["scores"]["vowel"].items()} == expected
    assert kept["vowel"]["adapter"]["acc"] == expected["yes-no@1"]
    assert kept["vowel"]["base"]["difference"]["acc"]["value"] == expected["yes-no@1"] - expected["tiny"]
    low, high = kept["vowel"]["adapter"]["intervals"]["acc"]
    assert 0 <= low < expected["yes-no@1"] < high <= 1
    assert kept["copy"]["adapter"]["rows"] == 8
    assert kept["copy"]["how"]["harness"].startswith("lm-eval ")
    table = CliRunner().invoke(qhub, ["eval", "tiny", "--lm-eval", str(folder / "vowel.yaml"), "--limit", "4"])
    assert table.exit_code == 0, table.output
    assert "copy" not in table.output
    assert " 4 " in table.output


@needs_harness
def test_tasks_that_cannot_be_used(tmp_path: Path) -> None:
    """Data of the Hub or of a URL, no task at all, and what the harness refuses are reported with the file."""
    folder = write_tasks(tmp_path)
    wrong = {
        VOWEL.replace("dataset_path: json", "dataset_path: super_glue"): "its data would come from elsewhere",
        VOWEL.replace("DATA", "https://example.org/x.jsonl"): "its data would come from elsewhere",
        VOWEL.replace("DATA", str(tmp_path / "none.jsonl")): "lm-evaluation-harness cannot use it: .*none.jsonl",
        "a: 1": "has no task",
    }
    for text, told in wrong.items():
        (folder / "vowel.yaml").write_text(text)
        with pytest.raises(InputError, match=f"vowel.yaml.*{told}"):
            find_tasks(folder / "vowel.yaml")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ([], "give --data with held-out examples, or --lm-eval"),
        (["--lm-eval", "x.yaml", "--data", "x.jsonl"], "give --data with held-out examples, or --lm-eval"),
        (["--lm-eval", "x.yaml", "--choices", "a,b", "--json-valid"], "--choices, --json-valid and --lm-eval exclude"),
        (["--lm-eval", "none.yaml"], "there is no task file or folder none.yaml"),
        (["--lm-eval", "."], "needs the package lm-eval"),
    ],
)
def test_options_of_the_harness(
    tiny_base: BaseInfo, monkeypatch: pytest.MonkeyPatch, options: list[str], told: str
) -> None:
    """What excludes what, a file that is not there, and the missing package are one sentence each."""
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    done = CliRunner().invoke(qhub, ["eval", "tiny", *options])

    assert isinstance(done.exception, InputError)
    assert told in str(done.exception)
