"""Several processes that divide the base between them train what one does that has it whole."""

import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer

from adapterhub_local.base.add import add_base
from adapterhub_local.base.bases import BaseInfo, find_base
from adapterhub_local.base.fingerprint import fingerprint, tensor_record
from adapterhub_local.cli.main import run
from adapterhub_local.recipe import load_recipe
from adapterhub_local.registry import Registry
from adapterhub_local.settings import Home, Process, environment_of
from adapterhub_local.settings import home as home_at
from adapterhub_local.train import check
from adapterhub_local.train.check import divides
from adapterhub_local.train.train import train
from tests.architectures import save_architecture
from tests.chats import RECIPE, write_recipe, write_rows
from tests.patience import PATIENCE
from tests.train.divided import CASES, JUDGED, PAIRS, bytes_held, gradients, loaded, of_case
from tests.train.test_objectives import PREFERENCES, judged_rows

CLOSE = 1e-4  # of a gradient's norm
needs_newer_torch = pytest.mark.skipif(not divides(), reason="this torch does not divide 4-bit codes")


@dataclass(frozen=True)
class Divided:
    """What two processes found that divided the base."""

    folder: Path
    home: Home
    held: int


@pytest.fixture(scope="module")
def divided(built_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Divided]:
    """Every case by two processes, which start once."""
    if not divides():
        pytest.skip("this torch does not divide 4-bit codes")
    folder = tmp_path_factory.mktemp("divided")
    place = home_at(folder / "home")
    shutil.copytree(built_base, place.bases / "tiny")
    add_base("experts", save_architecture("qwen3-moe", folder / "experts"), place)
    add_base("tied", save_architecture("gemma2", folder / "tied"), place)
    write_recipe(folder, RECIPE.replace('test = "test.jsonl"\n', ""))
    write_rows(folder / PAIRS, PREFERENCES)
    write_rows(folder / JUDGED, judged_rows(PREFERENCES))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tests.train.divided", str(folder)]
    started = [
        subprocess.Popen(
            command,
            env={**environment_of(Process(rank, rank, 2), 2, "127.0.0.1", port), "QHUB_HOME": str(place.root)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=PATIENCE)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], "\n".join(errors)
    return Divided(folder, place, json.loads((folder / "told.json").read_text())["held"])


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_one_process(
    divided: Divided, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, case: str
) -> None:
    """Two steps of five rows, of which one process has three and the other two, give the gradients of one process."""
    monkeypatch.setenv("QHUB_HOME", str(divided.home.root))
    wanted = gradients(loaded(of_case(case, divided.folder / "recipe.toml")), tmp_path / "run")
    found = load_file(divided.folder / f"{case}.safetensors")

    assert found.keys() == wanted.keys()
    far = {name: float((found[name] - wanted[name]).norm() / (wanted[name].norm() + 1e-12)) for name in wanted}
    assert max(far.values()) < CLOSE
    assert any(gradient.norm() > 0 for gradient in wanted.values())


def test_each_process_holds_its_part(divided: Divided, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two steps a process holds half of the codes of NF4, and what makes numbers of them."""
    monkeypatch.setenv("QHUB_HOME", str(divided.home.root))
    before = bytes_held()
    session = loaded(of_case("kept", divided.folder / "recipe.toml"))
    whole = bytes_held() - before
    codes = sum(tensor.nbytes for tensor in load_file(divided.folder / "whole.safetensors").values())

    assert codes == find_base("tiny", divided.home).num_quantised // 2
    assert whole >= codes
    assert divided.held == whole - codes // 2
    del session


def test_the_base_stays_the_base(divided: Divided) -> None:
    """What two processes bring together after two steps are the very bytes of the base: its fingerprint is the same."""
    info = find_base("tiny", divided.home)
    (file,) = info.folder.glob("*.safetensors")
    tensors = load_file(file)
    together = load_file(divided.folder / "whole.safetensors")
    assert together.keys() == {name.removesuffix(".absmax") for name in tensors if name.endswith(".absmax")}
    records = [tensor_record(name, tensor) for name, tensor in {**tensors, **together}.items()]
    config, tokenizer = AutoConfig.from_pretrained(info.folder), AutoTokenizer.from_pretrained(info.folder)

    assert fingerprint(records, config, tokenizer) == info.fingerprint
    changed = next(iter(together))
    together[changed][0] ^= 1
    records = [tensor_record(name, tensor) for name, tensor in {**tensors, **together}.items()]
    assert fingerprint(records, config, tokenizer) != info.fingerprint


@needs_newer_torch
def test_a_run_gives_the_adapter_of_one_process(
    tiny_base: BaseInfo, home: Home, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With evaluation in between, scores of base and adapter, and answers that one process writes in the end; a run of
    a sweep as any other."""
    changes = ["train.epochs=2", "train.eval_every=3", "eval.samples=1"]
    path = write_recipe(tmp_path, count=14)
    one = train(load_recipe(path, [*changes, "train.micro_batch_size=4"]), home)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    path = write_recipe(tmp_path, RECIPE + "[sweep.grid]\ntrain.epochs = [2]\n", count=14)
    options = [part for change in changes[1:] for part in ("--set", change)]
    with pytest.raises(SystemExit) as exit_info:
        run(["train", str(path), "--nproc", "2", "--shard-base", *options])
    two = Registry(home).resolve("yes-no")

    assert exit_info.value.code == 0, capfd.readouterr().err
    assert (two.number, two.lineage["training"]["processes"]) == (2, 2)
    assert two.content_digest == one.content_digest
    assert two.lineage["metrics"] == one.lineage["metrics"]
    assert two.lineage["samples"] == one.lineage["samples"]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ([], "--shard-base divides the base between processes, and there is one: add --nproc 2"),
        (["adapter.init=eva"], "EVA looks at what goes through the whole base"),
        (["adapter.dora=true"], "DoRA measures the whole weights"),
    ],
)
def test_what_cannot_be_divided(
    tiny_base: BaseInfo, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    changes: list[str], told: str,
) -> None:  # fmt: skip
    """One process, and what needs the whole base, are refused in one line before anything is loaded."""
    monkeypatch.setattr(check, "DIVIDES", (2, 0))
    if changes:
        monkeypatch.setenv("WORLD_SIZE", "2")
    options = [part for change in changes for part in ("--set", change)]
    with pytest.raises(SystemExit) as exit_info:
        run(["train", str(write_recipe(tmp_path)), "--shard-base", *options])

    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1


def test_a_torch_that_does_not_divide(
    tiny_base: BaseInfo, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is named with the version that does, before anything is loaded."""
    monkeypatch.setattr(check, "version", lambda name: "2.11.0+cu130")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as exit_info:
        run(["train", str(write_recipe(tmp_path)), "--shard-base"])

    assert exit_info.value.code == 2
    assert "--shard-base needs torch 2.13 or newer, and here is 2.11.0+cu130" in capsys.readouterr().err
