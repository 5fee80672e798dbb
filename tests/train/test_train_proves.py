"""A run proves its result: every step learns, what is registered was changed, and what was said is kept."""

import json
from pathlib import Path

import pytest
import torch

from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.errors import BadData, QhubError
from adapterhub_local.progress import Lines
from adapterhub_local.recipe import load_recipe
from adapterhub_local.rows.examples import Example
from adapterhub_local.settings import Home
from adapterhub_local.train.past_runs import list_runs, read_log
from adapterhub_local.train.statistics import check_ids
from adapterhub_local.train.train import check_changed, train
from tests.chats import chat, write_recipe
from tests.tiny import byte_tokenizer


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
def test_the_only_step_of_a_run_learns(tmp_path: Path, home: Home, tiny_base: BaseInfo, schedule: str) -> None:
    """A run of one step has a learning rate above zero in it, and its factors B are not zero."""
    path = write_recipe(tmp_path, count=4)
    changes = ("train.epochs=1", f"train.schedule={schedule}", "data.test_share=0")
    version = train(load_recipe(path, changes), home)
    (entry,) = [entry for entry in read_log(list_runs(home)[-1].folder) if "loss" in entry]
    from safetensors.torch import load_file

    factors = load_file(version.path / "adapter_model.safetensors")
    assert entry["learning_rate"] > 0
    assert all(bool(torch.any(factor != 0)) for name, factor in factors.items() if "lora_B" in name)


def test_what_is_not_changed_is_refused() -> None:
    """Factors that are all as they were are an error, before anything is registered."""
    start = {"a.lora_B": torch.zeros(2)}
    with pytest.raises(QhubError, match="is what it was at its start"):
        check_changed(start, {"a.lora_B": torch.zeros(2)})
    check_changed(start, {"a.lora_B": torch.ones(2)})


def test_ids_are_checked_against_the_embeddings() -> None:
    """A token without a row in the embeddings is named before anything is computed."""
    examples = [Example((1, 319), ((1, 2),))]
    check_ids(examples, byte_tokenizer(), 320)
    with pytest.raises(BadData, match=r"\(id 319\) has no row in the base's embeddings \(319\)"):
        check_ids(examples, byte_tokenizer(), 319)


def test_notes_and_changes_are_kept(tmp_path: Path, home: Home, tiny_base: BaseInfo) -> None:
    """What was said of the data and changed on the command line is in run.json, the report and the version."""
    path = write_recipe(tmp_path, count=4)
    (tmp_path / "train.jsonl").write_text(json.dumps(chat("what is <|im_end|>?", "an end")) + "\n")
    version = train(load_recipe(path, ("train.learning_rate=3e-3",)), home)
    (run,) = list_runs(home)
    report = (run.folder / "report.html").read_text()

    assert any("control tokens" in note for note in version.lineage["notes"])
    assert version.lineage["recipe"]["overrides"] == ["train.learning_rate=3e-3"]
    assert run.record["overrides"] == ["train.learning_rate=3e-3"]
    assert any("control tokens" in note for note in run.record["notes"])
    assert "control tokens" in report
    assert "train.learning_rate=3e-3" in report
    assert run.to_json()["eval_loss"] == pytest.approx(
        version.lineage["metrics"]["yes-no"]["adapter"]["loss"], abs=1e-5
    )


def test_progress_as_lines(capsys: pytest.CaptureFixture[str]) -> None:
    """Without a terminal notes and progress are plain lines, with rate and time left."""
    lines = Lines(interval=0)
    lines.note("one note")
    with lines.training(4, 100.0) as report:
        report(2, 1.5)
    with lines.counting("scoring") as count:
        count(1, 2)
    note, step, counted = capsys.readouterr().err.splitlines()

    assert note == "one note"
    assert step.startswith("step 2 of 4: loss 1.5000, ")
    assert "tokens/s" in step
    assert counted.startswith("scoring: 1 of 2, 0:00:0")
