"""A router is a version and not an adapter: what carries versions carries it, what adds weights refuses it."""

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from adapterhub_local.base.bases import BaseInfo, read_record
from adapterhub_local.cli.main import qhub
from adapterhub_local.errors import BadFile, Incompatible, InputError, QhubError
from adapterhub_local.registry import Registry
from adapterhub_local.registry.archive import read_archive, write_archive
from adapterhub_local.registry.fsck import fsck
from adapterhub_local.registry.gc import remove
from adapterhub_local.registry.marks import remove_alias
from adapterhub_local.registry.rebuild import rebuild
from adapterhub_local.router.files import NUMBERS, SETTINGS, read_router
from tests.routers import make_router


@pytest.fixture(scope="module")
def source(built_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Registry:
    """A registry with two adapters and two versions of their router."""
    folder = tmp_path_factory.mktemp("versions")
    registry = Registry(folder / "home")
    registry.home.bases.mkdir(parents=True)
    (registry.home.bases / "tiny").symlink_to(built_base)
    for threshold in (0.5, 0.9):
        make_router(registry, read_record(built_base), folder, tasks=("alpha", "beta"), threshold=threshold)
    registry.set_alias("router", "prod", 1)
    return registry


REFUSED = {
    "merge": ["merge", "router", "alpha", "--weights", "1,1", "--name", "x"],
    "merge a side": ["merge", "alpha", "router@1", "--weights", "1,1", "-o", "x.safetensors"],
    "export": ["export", "router", "-o", "x.safetensors"],
    "export gguf": ["export", "router@prod", "-o", "x.gguf", "--to", "gguf"],
    "export peft": ["export", "router@prod", "-o", "x", "--to", "peft"],
    "eval": ["eval", "router", "--data", "data.jsonl"],
    "eval against": ["eval", "alpha", "--against", "router", "--data", "data.jsonl"],
    "diff with an adapter": ["diff", "alpha", "router"],
    "train from": ["train", "recipe.toml"],
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_adds_weights_refuses_a_router(
    kind: str, source: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every verb that needs weights says that a router has none and what it is for, and writes nothing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QHUB_HOME", str(source.home.root))
    Path("data.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    Path("recipe.toml").write_text(
        '[base]\nname = "tiny"\n[data]\ntrain = "data.jsonl"\n[adapter]\nfrom = "router"\n[output]\nname = "x"\n'
    )
    before = sorted(path.name for path in tmp_path.iterdir())
    result = CliRunner().invoke(qhub, REFUSED[kind])
    assert isinstance(result.exception, InputError)
    assert "is a router: it has no weights to add to a base, it chooses among adapters (alpha@1, beta@1)" in str(
        result.exception
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert "x" not in source.names()


def test_the_hub_is_not_for_routers(source: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pushing a router to the Hub is refused with the ways that carry it."""
    monkeypatch.setenv("QHUB_HOME", str(source.home.root))
    result = CliRunner().invoke(qhub, ["push", "router", "me/router"])
    assert isinstance(result.exception, InputError)
    assert "share it by `qhub sync push` or `qhub export --oci`" in str(result.exception)


def test_two_routers_are_compared(source: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """`qhub diff` of two routers shows what is said of them, and no modules."""
    monkeypatch.setenv("QHUB_HOME", str(source.home.root))
    result = CliRunner().invoke(qhub, ["diff", "router@1", "router@2", "--json"], catch_exceptions=False)
    told = json.loads(result.output)
    assert (told["modules"], told["same_content"]) == ([], False)
    assert CliRunner().invoke(qhub, ["diff", "router@1", "router@2"]).exit_code == 0


def test_an_archive_carries_it_with_its_adapters(source: Registry, tmp_path: Path) -> None:
    """Exported and imported elsewhere it is the same version, with the adapters that it was made of, parents first."""
    version = source.resolve("router@prod")
    written = write_archive(source, version, tmp_path / "router.tar")
    assert [str(one) for one in written] == ["alpha@1", "beta@1", "router@1"]
    other = Registry(tmp_path / "other")
    received = read_archive(other, tmp_path / "router.tar")
    assert [one.version.manifest_digest for one in received] == [one.manifest_digest for one in written]
    assert read_router(other.resolve("router").path, "router@1").routes == read_router(version.path, version).routes


def test_a_remote_carries_it(source: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pushed to a remote and pulled by another home, it is the same version and brings its adapters."""

    def run(home: Path, *words: str) -> None:
        monkeypatch.setenv("QHUB_HOME", str(home))
        result = CliRunner().invoke(qhub, list(words), catch_exceptions=False)
        assert result.exit_code == 0, result.output

    for home in (source.home.root, tmp_path / "other"):
        run(home, "remote", "add", "team", str(tmp_path / "remote"))
    run(source.home.root, "sync", "push", "team", "router@1")
    run(tmp_path / "other", "sync", "pull", "team", "router@1")
    other = Registry(tmp_path / "other")
    assert other.names() == ["alpha", "beta", "router"]
    assert other.resolve("router").manifest_digest == source.resolve("router@1").manifest_digest


def test_it_outlives_its_database(source: Registry, tmp_path: Path) -> None:
    """fsck finds it sound, a rebuild from the blobs finds it again, and its adapters cannot be removed under it."""
    shutil.copytree(source.home.root, tmp_path / "copy", symlinks=True)
    copy = Registry(tmp_path / "copy")
    assert not fsck(copy).problems
    rebuild(copy)
    assert [str(version) for version in copy.versions("router")] == ["router@1", "router@2"]
    assert copy.aliases("router") == {"prod": 1}
    remove_alias(copy, "alpha", "prod")
    with pytest.raises(InputError, match="router@1"):
        remove(copy, copy.resolve("alpha@1"))


def test_other_tools_are_told_what_it_is(source: Registry) -> None:
    """Its manifest has a type of its own, so that no registry takes it for an adapter."""
    types = {name: json.loads(source.resolve(name).manifest)["artifactType"] for name in ("alpha", "router")}
    assert types == {"alpha": "application/vnd.qhub.adapter.v1+json", "router": "application/vnd.qhub.router.v1+json"}


def broken(folder: Path, kind: str) -> None:
    """Damage one thing about the router's files in `folder`."""
    settings, numbers = json.loads((folder / SETTINGS).read_bytes()), load_file(folder / NUMBERS)
    match kind:
        case "no settings":
            settings = []
        case "newer":
            settings["format"] = 2
        case "other features":
            settings["features"] = "something"
        case "a path as route":
            settings["routes"][0] = "../../secret"
        case "a route twice":
            settings["routes"] = ["alpha@1", "alpha@2"]
        case "a route more":
            settings["routes"].append("gamma@1")
        case "no routes":
            settings["routes"] = []
        case "temperature":
            settings["temperature"] = 0
        case "threshold":
            settings["threshold"] = "high"
        case "infinite":
            settings["threshold"] = 1e999
        case "coverage":
            settings["coverage"] = 2
        case "base":
            settings["base_fingerprint"] = 7
        case "no tensor":
            del numbers["limits"]
        case "another tensor":
            numbers["more"] = numbers["bias"].clone()
        case "dtype":
            numbers["weight"] = numbers["weight"].double()
        case "shape":
            numbers["centres"] = numbers["centres"][:, :-1].contiguous()
        case "not finite":
            numbers["weight"][0, 0] = float("nan")
    (folder / SETTINGS).write_text(json.dumps(settings))
    save_file(numbers, folder / NUMBERS)
    if kind == "cut":
        (folder / NUMBERS).write_bytes((folder / NUMBERS).read_bytes()[:-4])
    if kind == "missing":
        (folder / NUMBERS).unlink()


DAMAGE = ("no settings", "newer", "other features", "a path as route", "a route twice", "a route more", "no routes",
          "temperature", "threshold", "infinite", "coverage", "base", "no tensor", "another tensor", "dtype", "shape",
          "not finite", "cut", "missing")  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_files_that_are_no_router_are_refused(kind: str, source: Registry, tmp_path: Path) -> None:
    """Whatever is wrong with a router's files is a BadFile that names the router and what it is."""
    for file in source.resolve("router@1").files:
        shutil.copyfile(source.blobs.path(file.digest), tmp_path / file.path)
    assert read_router(tmp_path, "theirs@1").routes
    broken(tmp_path, kind)
    with pytest.raises(BadFile, match="theirs@1 cannot be read as a router: "):
        read_router(tmp_path, "theirs@1")


def test_a_router_without_its_files_is_not_received(source: Registry, tiny_base: BaseInfo, tmp_path: Path) -> None:
    """What says that it is a router and has an adapter's files is refused where versions come in."""
    forged = Registry(tmp_path / "forged")
    adapter = source.resolve("alpha")
    files = {file.path: source.blobs.path(file.digest) for file in adapter.files}
    version = forged.publish("router", files, {"kind": "router", "base": tiny_base.lineage()})
    write_archive(forged, version, tmp_path / "forged.tar")
    other = Registry(tmp_path / "other")
    with pytest.raises(BadFile, match="holds a router without the files of one: router@1"):
        read_archive(other, tmp_path / "forged.tar")
    assert not other.names()


def test_a_router_of_another_base_does_not_choose(source: Registry) -> None:
    """A router over embeddings of another size is refused, not misread."""
    import torch

    from adapterhub_local.router.features import Embeddings
    from adapterhub_local.router.router import Router

    version = source.resolve("router@1")
    with pytest.raises(Incompatible, match="made for a base with 64 numbers a token, this one has 32"):
        Router(read_router(version.path, version), Embeddings(lambda text: [0], torch.zeros(4, 32)))
    assert issubclass(Incompatible, QhubError)
