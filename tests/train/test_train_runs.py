"""A run a person can trust: tried first, evaluated and saved on schedule, guarded, reported, resumed exactly."""

import json
import math
import os
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.base.load import load_base
from adapterhub_local.cli.main import qhub
from adapterhub_local.data.dataset import read_data
from adapterhub_local.errors import BadRecipe, InputError, InUse, NotFound, QhubError, Stopped
from adapterhub_local.lora.adapter import open_adapter
from adapterhub_local.recipe import load_recipe
from adapterhub_local.registry import Registry
from adapterhub_local.settings import Home
from adapterhub_local.train import optimise as fit_module
from adapterhub_local.train import preflight as preflight_module
from adapterhub_local.train.adapter import with_adapter
from adapterhub_local.train.log_curves import terminal_plot
from adapterhub_local.train.past_runs import checkpoints, find_run, list_runs, read_log, remove_run
from adapterhub_local.train.run_folder import Run
from adapterhub_local.train.train import train
from adapterhub_local.train.trainer import AdapterTrainer, NotFinite
from adapterhub_local.train.watch import WINDOW, Diverged, Watch
from tests.chats import RECIPE, write_chats, write_recipe

STATE = type("State", (), {"epoch": 1.0, "global_step": 0, "max_steps": 100})
CONTROL = type("Control", (), {"should_save": False, "should_training_stop": False})


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Ask for a stop at a step, as Ctrl-C does."""
    end = Watch.on_step_end

    def asked(self, args, state, control, **rest):
        self.stop_asked = state.global_step >= step
        end(self, args, state, control, **rest)

    monkeypatch.setattr(Watch, "on_step_end", asked)


def invoke(*arguments: str) -> str:
    done = CliRunner().invoke(qhub, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_evaluating_and_saving_change_nothing(tiny_base: BaseInfo, home: Home, tmp_path: Path) -> None:
    """A run that evaluates and saves on the way ends with the adapter of one that does not, dropout included."""
    path = write_recipe(tmp_path)
    plain = train(load_recipe(path, ["adapter.dropout=0.2"]), home)
    changes = ["adapter.dropout=0.2", "train.eval_every=1", "train.save_every=2"]
    watched = train(load_recipe(path, changes), home)
    run = find_run(home, watched.lineage["run"])
    evaluated = [entry for entry in read_log(run.folder) if "eval_loss" in entry]
    final = watched.lineage["metrics"]["yes-no"]["adapter"]["loss"]

    assert watched.lineage["training"]["best_step"] == 4  # so nothing earlier was taken
    assert plain.content_digest == watched.content_digest
    assert [entry["step"] for entry in evaluated] == [1, 2, 3, 4]
    assert evaluated[-1]["eval_loss"] == pytest.approx(final, abs=1e-6)


def test_the_best_is_kept_and_patience_ends(tiny_base: BaseInfo, home: Home, tmp_path: Path) -> None:
    """With a learning rate that overshoots, the result is the best evaluated adapter, and the run ends early."""
    changes = ["train.learning_rate=1", "train.epochs=40", "train.eval_every=1", "train.patience=3", "train.warmup=0.5"]
    version = train(load_recipe(write_recipe(tmp_path), changes), home)
    training = version.lineage["training"]
    log = read_log(find_run(home, version.lineage["run"]).folder)
    losses = {entry["step"]: entry["eval_loss"] for entry in log if "eval_loss" in entry}

    assert training["stopped_early"]
    assert training["steps"] == max(losses) == training["best_step"] + 3
    assert min(losses, key=losses.__getitem__) == training["best_step"]
    assert version.lineage["metrics"]["yes-no"]["adapter"]["loss"] == pytest.approx(min(losses.values()), abs=1e-6)


def test_resume_keeps_log_best_and_result(
    tiny_base: BaseInfo, home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped and resumed, a run with evaluation has the same adapter, and each step once in its log."""
    recipe = load_recipe(write_recipe(tmp_path), ["train.epochs=6", "train.eval_every=2", "train.save_every=3"])
    whole = train(recipe, home)
    expected = [{**entry, "seconds": 0} for entry in read_log(list_runs(home)[-1].folder)]
    with monkeypatch.context() as patch:
        stop_at(patch, 7)
        with pytest.raises(Stopped, match="step 7 of 12"):
            train(recipe, home)
    run = list_runs(home)[-1]
    assert (run.status, run.can_resume) == ("stopped", True)
    resumed = train(recipe, home, resume=True)

    assert resumed.content_digest == whole.content_digest
    assert [{**entry, "seconds": 0} for entry in read_log(run.folder)] == expected
    assert checkpoints(run.folder) == []
    assert find_run(home, "yes-no").status == "finished"


def test_a_killed_run_goes_on_from_its_checkpoint(
    tiny_base: BaseInfo, home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that dies leaves a whole checkpoint; a half-written one after it is passed over."""
    recipe = load_recipe(write_recipe(tmp_path), ["train.epochs=4", "train.save_every=3"])
    whole = train(recipe, home)

    def die(self, model, inputs, num_items_in_batch=None):
        if self.state.global_step == 5:
            raise MemoryError
        return step(self, model, inputs, num_items_in_batch)

    step = AdapterTrainer.training_step
    with monkeypatch.context() as patch:
        patch.setattr(AdapterTrainer, "training_step", die)
        with pytest.raises(MemoryError):
            train(recipe, home)
    run = list_runs(home)[-1]
    (run.folder / "checkpoint-5").mkdir()  # what a crash while saving leaves

    assert [path.name for path in checkpoints(run.folder)] == ["checkpoint-3"]
    assert train(recipe, home, resume=True).content_digest == whole.content_digest


def test_resume_says_what_changed(
    tiny_base: BaseInfo, home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Data, recipe or base that changed since the stop are named, and nothing is resumed."""
    path = write_recipe(tmp_path)
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        with pytest.raises(Stopped):
            train(load_recipe(path), home)
    with pytest.raises(NotFound, match=r"stopped at step 2; since then train.learning_rate changed from 0.01 to 0.5"):
        train(load_recipe(path, ["train.learning_rate=0.5"]), home, resume=True)
    write_chats(tmp_path / "train.jsonl", 15)
    with pytest.raises(NotFound, match=r"since then data.train \(train.jsonl\) changed"):
        train(load_recipe(path), home, resume=True)


def test_a_loss_that_is_no_number(
    tiny_base: BaseInfo, home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaN stops before the factors are touched; the adapter of the step before is kept and can be registered."""
    make_trainer = fit_module.make_trainer
    calls = []

    def poisoned(model, *arguments):
        trainer = make_trainer(model, *arguments)
        step = trainer.training_step

        def training_step(*given):
            calls.append(1)
            loss = step(*given)
            if len(calls) == 3:
                next(iter(fit_module.factors_of(model).values())).grad.fill_(math.nan)
            return loss

        monkeypatch.setattr(trainer, "training_step", training_step)
        return trainer

    monkeypatch.setattr(fit_module, "make_trainer", poisoned)
    with pytest.raises(QhubError, match=r"gradient norm is nan at step 3: lower train\.learning_rate.*last-good"):
        train(load_recipe(write_recipe(tmp_path)), home)
    run = list_runs(home)[-1]
    kept = open_adapter(run.folder / "last-good")

    assert run.status == "failed"
    assert "nan" in run.record["reason"]
    assert kept.base_fingerprint == tiny_base.fingerprint
    assert all(torch.isfinite(delta.B).all() and delta.B.abs().sum() > 0 for _, delta in kept.deltas())
    assert Registry(home).versions() == []


def test_what_is_no_number_is_found(tiny_base: BaseInfo, home: Home, tmp_path: Path) -> None:
    """Infinite factors make the loss NaN, which the very next step refuses."""
    from adapterhub_local.rows.examples import read_chats, tokenise
    from adapterhub_local.train.trainer import make_trainer

    recipe = load_recipe(write_recipe(tmp_path))
    base = load_base(tiny_base)
    examples = tokenise(read_chats(recipe.data.train), base.tokenizer, 512)
    model = with_adapter(base, recipe)
    trainer = make_trainer(model, examples, recipe, tmp_path / "run", Watch(lambda entry: None))
    next(p for name, p in model.named_parameters() if "lora_B" in name).data.fill_(math.inf)
    with pytest.raises(NotFinite, match="at step 1"):
        trainer.train()


def test_divergence_is_noticed() -> None:
    """Ten steps far worse than the first ten stop a run; the factors of its best ten steps are still there."""
    factor = torch.nn.Parameter(torch.zeros(2))
    watch = Watch(lambda entry: None, factors={"A": factor})
    falling = [3.0 - 0.1 * step for step in range(25)]
    rising = [float(step) for step in range(4, 24)]

    def run() -> None:
        for step, loss in enumerate(falling + rising, 1):
            STATE.global_step = step
            factor.data.fill_(step)
            watch.on_log(None, STATE, CONTROL, logs={"loss": loss})

    with pytest.raises(Diverged, match=r"risen from 2\.550 to"):
        run()

    assert watch.good is not None
    assert 2 * WINDOW <= watch.good["A"][0] <= len(falling)


def test_noise_is_no_divergence() -> None:
    """A loss that jumps about, or is small from the start, goes on; so does one below zero, as rewards make it."""
    for losses in ([0.02, 0.4], [-10.0, -8.5], [-0.1, 0.1]):
        watch = Watch(lambda entry: None)
        for step, loss in enumerate(losses * 10 + [losses[1]] * 10, 1):
            STATE.global_step = step
            watch.on_log(None, STATE, CONTROL, logs={"loss": loss})


def test_dry_run(tiny_base: BaseInfo, home: Home, tmp_path: Path) -> None:
    """A dry run counts, tries a step and leaves the home as it was, a stopped run included."""
    path = str(write_recipe(tmp_path))
    before = sorted(path for path in home.root.rglob("*") if path.is_file())
    told = json.loads(invoke("train", path, "--dry-run", "--json"))

    assert (told["examples"], told["steps"]) == (16, 4)
    assert 0 < told["labels"] < told["tokens"]
    assert told["loss"] > 0
    assert sorted(path for path in home.root.rglob("*") if path.is_file()) == before
    assert list_runs(home) == []


def test_no_room_for_checkpoints(
    tiny_base: BaseInfo, home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk too full for the checkpoints is reported before the first step, and no run is left behind."""
    full = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(preflight_module.shutil, "disk_usage", lambda path: full)
    with pytest.raises(InputError, match="MB left, the run needs up to"):
        train(load_recipe(write_recipe(tmp_path)), home)

    assert not list(home.runs.glob("*"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["train.eval_every=2", "data.test_share=0"], r"train\.eval_every needs data\.test"),
        (["train.patience=2"], r"train\.patience needs train\.eval_every"),
        (["train.eval_every=0"], "must be from 1 to 2147483648"),
    ],
)
def test_schedules_that_make_no_sense(tmp_path: Path, changes: list[str], message: str) -> None:
    """Evaluation without held-out data and patience without evaluation are errors of the recipe."""
    path = write_recipe(tmp_path, RECIPE.replace('test = "test.jsonl"', ""))
    with pytest.raises(BadRecipe, match=message):
        load_recipe(path, changes)


class Tags(HTMLParser):
    """Which elements a page has, and what it would load from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.loads += [value or "" for name, value in attrs if name in ("src", "href")]


def test_the_report(tiny_base: BaseInfo, home: Home, tmp_path: Path) -> None:
    """The report is one page with curves, scores of base and adapter, samples and the recipe; it loads nothing."""
    text = write_recipe(tmp_path).read_text().replace("[output]", '[output]\ndescription = "<b>yes</b> & no"')
    (tmp_path / "recipe.toml").write_text(text)
    version = train(load_recipe(tmp_path / "recipe.toml", ["train.eval_every=2", "eval.samples=3"]), home)
    run = find_run(home, "yes-no")
    page = (run.folder / "report.html").read_text()
    tags = Tags()
    tags.feed(page)
    loss = version.lineage["metrics"]["yes-no"]["adapter"]["loss"]
    training, samples = version.lineage["training"], version.lineage["samples"]
    assert training["held_out"][0][0] == 2
    assert [step for step, _ in training["learning_rate"]] == [step for step, _ in training["curve"]]
    assert all(0 < rate < 1 for _, rate in training["learning_rate"][1:-1])
    assert [set(sample) for sample in samples] == [{"prompt", "wanted", "base", "adapter"}] * 3

    assert {"svg", "polyline", "table", "pre"} <= set(tags.seen)
    assert tags.loads == []
    assert "&lt;b&gt;yes&lt;/b&gt; &amp; no" in page
    assert f"{loss:.4f}" in page
    assert page.count("Say yes for a and no for b") == 3
    drawn = ElementTree.parse(run.folder / "curve.svg").getroot()
    assert sum(element.tag.endswith("polyline") for element in drawn.iter()) == 4  # loss, its mean, held-out, rate


def test_runs_are_listed_shown_and_removed(
    tiny_base: BaseInfo, home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`qhub runs` lists every run with its state, shows its curve, and removes what is not running."""
    path = write_recipe(tmp_path)
    assert "No runs yet" in invoke("runs", "list")
    train(load_recipe(path), home)
    with monkeypatch.context() as patch:
        stop_at(patch, 1)
        with pytest.raises(Stopped):
            train(load_recipe(path, ["output.name=other"]), home)
    listed = json.loads(invoke("runs", "list", "--json"))

    assert [(run["name"], run["status"], run["step"]) for run in listed] == [
        ("yes-no", "finished", 4),
        ("other", "stopped", 1),
    ]
    assert "other" in invoke("runs", "list")
    shown = invoke("runs", "show", "yes-no", "--plot", str(tmp_path / "curve.svg"))
    assert "yes-no@1" in shown
    assert "training loss" in shown
    assert ElementTree.parse(tmp_path / "curve.svg").getroot().tag.endswith("svg")
    assert len(json.loads(invoke("runs", "show", listed[0]["id"], "--log"))["log"]) == 4
    assert "removed other-" in invoke("runs", "rm", "other")
    with pytest.raises(NotFound, match="no run 'other'"):
        find_run(home, "other")
    assert Registry(home).resolve("yes-no@1")


def test_a_run_runs_while_its_lock_is_held(tiny_base: BaseInfo, home: Home, tmp_path: Path) -> None:
    """What is held is not removed; a record that says it runs, under a number that another process has, crashed."""
    recipe = load_recipe(write_recipe(tmp_path))
    run = Run(recipe, tiny_base, home, read_data(recipe))
    with run.alone():
        run.begin(None, 4)
        (seen,) = list_runs(home)
        assert (seen.status, seen.can_resume, seen.record["pid"]) == ("running", False, os.getpid())
        with pytest.raises(InUse, match="is running"):
            remove_run(seen)

    assert list_runs(home)[0].status == "crashed"
    (home.runs / f"{run.folder.name}.lock").touch()  # as a process that was killed leaves it
    assert list_runs(home)[0].status == "crashed"
    remove_run(seen)
    assert list(home.runs.iterdir()) == []


def test_the_terminal_plot() -> None:
    """The first loss is at the top left, the last at the bottom right."""
    lines = terminal_plot(
        [{"step": step, "loss": 10.0 - step} for step in range(1, 10)], width=20, height=5
    ).splitlines()

    assert lines[0].startswith("  9.0000 |")
    assert lines[0].index("·") < 14
    assert lines[4].endswith("·")
    assert terminal_plot([]) == "no step has been made"
