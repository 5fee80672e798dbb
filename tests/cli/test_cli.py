"""The command line: what is wrong is one line, exit code 2 and nothing left behind; what is right can be piped on."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.cli.main import run
from adapterhub_local.lora.config import CONFIG, WEIGHTS, AdapterConfig
from adapterhub_local.lora.write import tensor_name, write_adapter
from adapterhub_local.registry import Registry
from adapterhub_local.settings import Home

Q = "model.layers.0.self_attn.q_proj"  # 64 x 64 in the tiny base
OTHER = "sha256:" + "2" * 64


@dataclass(frozen=True)
class Done:
    """What a call of qhub left: exit code and both streams."""

    code: int
    out: str
    err: str


Qhub = Callable[..., Done]


@pytest.fixture
def qhub(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Qhub:
    """Calls `qhub` with these arguments, in an empty current folder."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def call(*arguments: object) -> Done:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        code = caught.value.code
        assert isinstance(code, int)
        return Done(code, captured.out, captured.err)

    return call


def save_adapter(path: Path, fingerprint: str | None, *, size: int = 64, module: str = Q, seed: int = 0) -> Path:
    """A self-describing file with one module."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        tensor_name(module, "A"): torch.randn(2, size, generator=generator),
        tensor_name(module, "B"): torch.randn(size, 2, generator=generator),
    }
    shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_adapter(path.parent, AdapterConfig(2, 4, (module.rpartition(".")[2],)), shapes, tensors.items(), fingerprint)
    (path.parent / CONFIG).unlink()
    return (path.parent / WEIGHTS).rename(path)


@pytest.fixture
def files(tmp_path: Path, tiny_base: BaseInfo) -> Path:
    """A folder with adapters, sound and not, for the base `tiny`."""
    folder = tmp_path / "files"
    good = save_adapter(folder / "good.safetensors", tiny_base.fingerprint)
    save_adapter(folder / "other.safetensors", OTHER)
    save_adapter(folder / "large.safetensors", tiny_base.fingerprint, size=128)
    save_adapter(folder / "unknown.safetensors", tiny_base.fingerprint, module="model.layers.9.mlp.up_proj")
    data = good.read_bytes()
    (folder / "cut.safetensors").write_bytes(data[:-10])
    (folder / "nan.safetensors").write_bytes(data[:-4] + b"\x00\x00\xc0\x7f")
    (folder / "text.safetensors").write_bytes(b"no adapter, only text in a file")
    (folder / "empty.safetensors").write_bytes(b"")
    (folder / "pickle").mkdir()
    (folder / "pickle" / "adapter_model.bin").write_bytes(b"\x80\x04")
    (folder / "recipe.toml").write_text('[base]\nname = "tiny"\n[data]\ntrain = "no.jsonl"\n[output]\nname = "x"\n')
    (folder / "none.toml").write_text('[base]\nname = "none"\n[data]\ntrain = "d.jsonl"\n[output]\nname = "x"\n')
    (folder / "unknown.toml").write_text(
        '[base]\nname = "tiny"\n[data]\ntrain = "d.jsonl"\n[output]\nname = "x"\n[train]\nlearning_rat = 1e-3\n'
    )
    (folder / "d.jsonl").write_text('{"messages": []}\n')
    return folder


def test_nothing_is_created_at_a_home_that_is_only_read(qhub: Qhub, home: Home) -> None:
    """Listing and failing to find leave a home that does not exist so."""
    for line in (
        "list",
        "list --json",
        "base list",
        "base list --json",
        "show a",
        "path a",
        "export a -o a.safetensors",
    ):
        qhub(*line.split())
    assert not home.root.exists()
    assert list(Path.cwd().iterdir()) == []


def test_no_arguments_show_the_help(qhub: Qhub) -> None:
    """`qhub` alone, and a group alone, print their help as lines."""
    for arguments in ((), ("alias",), ("base",)):
        done = qhub(*arguments)
        assert done.code == 2
        assert done.err.startswith("Usage: qhub")
        assert done.err.count("\n") > 5


def test_a_home_that_is_a_file_is_reported(qhub: Qhub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """QHUB_HOME set to a file is bad input for every verb."""
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("QHUB_HOME", str(tmp_path / "file"))
    for line in ("list", "base list", "show a"):
        done = qhub(*line.split())
        assert (done.code, "QHUB_HOME" in done.err) == (2, True)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_from_bare_files_to_a_merged_version_and_back(qhub: Qhub, files: Path, tiny_base: BaseInfo) -> None:
    """add, export, merge on bare files and on references, add again: the same content digest at the end."""
    save_adapter(files / "second.safetensors", tiny_base.fingerprint, seed=1)
    added = qhub("add", files / "good.safetensors", "--name", "one", "--alias", "prod")
    assert added.out == "one@1: rank 2, for base tiny (exact base, by fingerprint)\n"
    added = qhub("add", files / "second.safetensors", "--name", "two", "--base", "tiny", "--json")
    assert json.loads(added.out)["compatibility"]["level"] == "exact"
    assert "exact base, by fingerprint" in qhub("show", "two").out
    for name in ("one", "two"):
        assert qhub("export", name, "-o", f"{name}.safetensors").code == 0
    bare = qhub("merge", "one.safetensors", "two.safetensors", "--weights", "0.7,0.3")
    assert bare.code == 0, bare.err
    assert "one+two.safetensors: weighted sum of 2 adapters, rank 4" in bare.out
    assert bare.err == ""
    named = json.loads(qhub("merge", "one@prod", "two@1", "--weights", "0.7,0.3", "--name", "both", "--json").out)
    assert named["reference"] == "both@1"
    assert named["relative_error"] < 1e-6
    assert qhub("export", "both", "-o", "both.safetensors").code == 0
    for source, name in (("both.safetensors", "again"), ("one.safetensors", "one")):
        wanted = Registry().resolve(Path(source).stem).content_digest
        added = qhub("add", source, "--name", name)
        assert added.code == 0, added.err
        assert Registry().resolve(name).content_digest == wanted
    assert qhub("base", "rm", "tiny").code == 2
    assert sorted(path.name for path in Path.cwd().iterdir()) == [
        *("both.safetensors", "one+two.safetensors", "one.safetensors", "two.safetensors")
    ]


def test_a_merge_tells_what_it_lost_before_it_writes(qhub: Qhub, files: Path) -> None:
    """--dry-run prints the report and writes nothing; --json has the same numbers; the merge itself confirms them."""
    save_adapter(files / "second.safetensors", None, seed=1)
    line = ("merge", files / "good.safetensors", files / "second.safetensors", "--weights", "0.7,0.3", "--rank", "2")
    told = qhub(*line, "--dry-run", "--modules")
    assert told.code == 0, told.err
    for part in ("dry run, nothing written", "predicted; exact rank 4", "interference", "--max-lora-rank 8", Q):
        assert part in told.out
    foreseen = json.loads(qhub(*line, "--dry-run", "--json").out)
    assert list(Path.cwd().iterdir()) == []
    made = json.loads(qhub(*line, "-o", "m.safetensors", "--plot", "m.svg", "--json").out)
    assert Path("m.svg").read_text().startswith("<svg")
    assert {**made, "output": None} == foreseen
    assert 0.01 < made["relative_error"] < 1
    named = json.loads(qhub(*line, "--name", "m", "--method", "ties", "--density", "0.5", "--json").out)
    lineage = Registry().resolve("m").lineage
    assert lineage["merge"]["parameters"] == {"density": 0.5, "scale": 1.0, "variant": "mergekit"}
    assert (lineage["merge"]["space"], lineage["merge"]["kept_by"]) == ("core", "rank 2")
    assert lineage["merge_report"]["modules"] == named["modules"]
    assert qhub("show", "m").code == 0


def test_a_merge_that_cancels_or_does_not_sum_to_one_says_so(qhub: Qhub, files: Path) -> None:
    """Adapters that cancel out are a warning, weights that do not sum to one a note; both on stderr, exit code 0."""
    good = files / "good.safetensors"
    cancelled = qhub("merge", good, good, "--weights", "1,-1", "-o", "zero.safetensors")
    assert cancelled.code == 0
    assert "cancel each other out" in cancelled.err
    assert "weights sum to 0" in cancelled.err
    assert qhub("merge", good, good, "--weights", "-0.5,1", "-o", "m.safetensors", "--json").code == 0


def test_json_of_every_list_and_show_parses(qhub: Qhub, tiny_base: BaseInfo, home: Home) -> None:
    """With --json every verb prints one JSON document that names what was asked for."""
    registry = Registry()
    lineage = {"kind": "train", "base": tiny_base.lineage(), "adapter": {"rank": 2, "alpha": 4.0, "num_parameters": 9}}
    version = registry.publish("a", {WEIGHTS: b"x"}, lineage, alias="prod")
    registry.add_evaluation(version, "t", {"adapter": {"exact_match": 0.5, "loss": 1.0, "rows": 2}})
    assert json.loads(qhub("list", "--json").out)[0]["aliases"] == {"prod": 1}
    assert json.loads(qhub("list", "a", "--json").out)[0]["reference"] == "a@1"
    shown = json.loads(qhub("show", "a@prod", "--json").out)
    assert (shown["content_digest"], shown["aliases"]) == (version.content_digest, ["prod"])
    assert shown["metrics"]["t"]["adapter"]["exact_match"] == 0.5
    assert json.loads(qhub("alias", "list", "a", "--json").out) == {"prod": 1}
    assert json.loads(qhub("base", "list", "--json").out)[0]["name"] == "tiny"
    assert json.loads(qhub("base", "show", "tiny", "--json").out)["fingerprint"] == tiny_base.fingerprint
    assert qhub("base", "path", "tiny").out.strip() == str(home.bases / "tiny")
    assert qhub("path", "a").out.strip() == str(version.path)


def test_tables_show_text_as_it_was_written(qhub: Qhub) -> None:
    """Brackets and colons in descriptions, tasks and file names are text, not markup; nothing is cut off."""
    odd = "[red]x[/] [/b] :smile: " + "long " * 60
    lineage = {
        "kind": "train",
        "description": odd,
        "data": [{"role": "train", "file": "[/a].jsonl", "rows": 1, "digest": OTHER}],
        "metrics": {"[/t]": {"adapter": {"exact_match": 0.5, "loss": 1.0, "rows": 1}}},
    }
    Registry().publish("a", {WEIGHTS: b"x"}, lineage)
    shown, listed = qhub("show", "a"), qhub("list")
    assert (shown.code, listed.code) == (0, 0)
    assert "[red]x[/] [/b] :smile: long" in shown.out
    assert shown.out.count("long") == 60
    assert "[/a].jsonl" in shown.out
    assert "[/t] 50.0%" in listed.out


@pytest.mark.parametrize(
    "lineage",
    [
        *({}, {"base": None}, {"metrics": {"t": {}}}, {"adapter": {"rank": 2}}, {"parents": [], "data": []}),
        {"metrics": {"t": {"base": {"exact_match": 0.1, "loss": 1, "rows": 1}}}},
    ],
)
def test_versions_with_little_lineage_are_listed_and_shown(qhub: Qhub, lineage: dict) -> None:
    """A version of another qhub, pulled from somewhere, may say less than ours do; it is shown all the same."""
    Registry().publish("a", {WEIGHTS: b"x"}, lineage)
    for line in ("list", "list --json", "show a", "show a --json"):
        done = qhub(*line.split())
        assert done.code == 0, done.err
