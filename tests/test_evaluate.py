"""Evaluation: what is reported is what greedy decoding would do."""

import json
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from adapterhub_local.base.load import load_base
from adapterhub_local.base.store import BaseInfo, remove_base
from adapterhub_local.cli.main import run
from adapterhub_local.errors import Incompatible
from adapterhub_local.evaluate.metrics import evaluate
from adapterhub_local.evaluate.run import base_of, score
from adapterhub_local.recipe import load_recipe
from adapterhub_local.registry import Registry
from adapterhub_local.settings import Home
from adapterhub_local.train.examples import read_chats, tokenise
from adapterhub_local.train.run import train
from tests.chats import write_chats, write_recipe


def test_exact_match_is_greedy_decoding(tiny_base: BaseInfo, home: Home, tmp_path: Path) -> None:
    """Exact match, told from one forward pass, is the share of answers that `generate` writes token for token."""
    version = train(load_recipe(write_recipe(tmp_path), ["train.epochs=12"]), home)
    base = load_base(tiny_base)
    path = write_chats(tmp_path / "more.jsonl", 12, offset=2)
    tests = tokenise(read_chats(path), base.tokenizer, 512, path)
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
    tests = tokenise(read_chats(path), base.tokenizer, 512, path)
    scores = [evaluate(base.model, tests, size) for size in (1, 3, 7)]

    assert [score.loss for score in scores] == pytest.approx([scores[0].loss] * 3, rel=1e-5)
    assert len({score.exact_match for score in scores}) == 1


def test_scoring_leaves_the_base_as_it_was(tiny_base: BaseInfo, home: Home, tmp_path: Path) -> None:
    """After an adapter was scored, the loaded base answers as before."""
    version = train(load_recipe(write_recipe(tmp_path)), home)
    base = load_base(tiny_base)
    path = tmp_path / "test.jsonl"
    tests = tokenise(read_chats(path), base.tokenizer, 512, path)
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


def test_a_version_of_another_base(tiny_base: BaseInfo, home: Home, tmp_path: Path) -> None:
    """A version whose base is not in the home says which base to add."""
    version = train(load_recipe(write_recipe(tmp_path)), home)
    remove_base("tiny", home, force=True)
    with pytest.raises(Incompatible, match=r"someone/tiny.*qhub base add"):
        base_of(version, home)
