"""Remotes have names: added, listed, forgotten, and refused where nothing could be kept."""

import json
import os
from pathlib import Path

import pytest
from fsspec.registry import known_implementations

from adapterhub_local.cli.main import run
from adapterhub_local.errors import InputError, InUse, NotFound, RemoteError
from adapterhub_local.registry import Registry, Version
from adapterhub_local.registry.pull import pull
from adapterhub_local.registry.push import push
from adapterhub_local.registry.remotes import add_remote, find_remote, list_remotes, remove_remote
from adapterhub_local.registry.store import Store, open_store
from adapterhub_local.settings import Home
from tests.synced import named


def test_remotes_have_names(home: Home, tmp_path: Path) -> None:
    """Adding, listing, finding with the nearest name, and forgetting; what cannot be a remote is refused."""
    assert list_remotes(home) == []
    add_remote(home, "team", "s3://bucket/path/", {"endpoint_url": "http://x"})
    add_remote(home, "disk", str(tmp_path / "there" / ".."))
    assert [(one.name, one.url) for one in list_remotes(home)][1] == ("team", "s3://bucket/path")
    with pytest.raises(InUse, match="already"):
        add_remote(home, "team", "s3://other")
    with pytest.raises(NotFound, match="did you mean team"):
        find_remote(home, "taem")
    (tmp_path / "file").write_text("x")
    for name, url, options in [
        ("../x", "s3://b", {}), ("a/b", "s3://b", {}), ("x", "", {}), ("x", "s3://", {}), ("x", "zip::s3://b", {}),
        ("x", "s3://id:secret@bucket", {}), ("x", str(tmp_path / "file"), {}), ("x", "s3://b", {"secret": "1"}),
        ("x", "s3://b\n", {}), ("x", str(tmp_path), {"a": 1}),
    ]:  # fmt: skip
        with pytest.raises(InputError):
            add_remote(home, name, url, options)
    with pytest.raises(InputError, match="overwrite one another"):
        push(Registry(), open_store(add_remote(home, "odd", "memory://b")), [])
    remove_remote(home, "odd")
    remove_remote(home, "team")
    assert [one.name for one in list_remotes(home)] == ["disk"]
    remote = add_remote(home, "gone", str(tmp_path / "gone"))
    (tmp_path / "gone").rmdir()
    with pytest.raises(NotFound, match="is its disk mounted"):
        open_store(remote)


@pytest.mark.parametrize(("url", "said"), [
    ("bogus://x", "write a folder or s3://bucket/team"), ("s3n://x", "did you mean s3://"),
    ("S3://x", "did you mean s3://"),
    ("zip://x", "not a kind of place"),
    ("s3", "s3://bucket/team, or ./s3 for that folder"),
    ("s3:/bucket/team", "write s3://bucket/team"), ("ftp", "write ftp://"),
    ("missing://x", "pip install missing-store"),
])  # fmt: skip
def test_a_kind_of_place_that_cannot_be_opened_is_refused(
    url: str, said: str, home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An unknown or mistyped protocol, or one whose client is not installed, is refused at once, not on first use."""
    monkeypatch.setitem(
        known_implementations, "missing", {"class": "no_such_store.X", "err": "pip install missing-store"}
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        run(["remote", "add", "team", url])
    assert caught.value.code == 2
    assert said in capsys.readouterr().err
    assert list_remotes(home) == []
    assert not (tmp_path / url).exists()


def test_a_relative_folder_is_kept_as_absolute(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder is made below where the command ran, which is said; one that is called as a protocol is, is taken."""
    monkeypatch.chdir(tmp_path)
    for name, url, folder in (("one", "shared", "shared"), ("two", "./ftp", "ftp"), ("three", "ftp", "ftp")):
        with pytest.raises(SystemExit) as caught:
            run(["remote", "add", name, url])
        assert caught.value.code == 0
        assert find_remote(home, name).folder == tmp_path / folder
        note = "" if name == "three" else " (a new folder)"
        assert capsys.readouterr().out == f"{name}: {tmp_path / folder}{note}\n"


def test_remotes_on_the_command_line(
    store: Store, merge: Version, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """add, list, push, show and pull from one home to another, with JSON; what is wrong is one line and a code."""
    options = [part for key, value in store.remote.options.items() for part in ("--option", f"{key}={value}")]
    other = str(tmp_path / "other")
    here = os.environ["QHUB_HOME"]
    for where, line, code, said in [
        (here, ["remote", "list"], 0, store.url[:10]),
        (here, ["remote", "list", "--json"], 0, '"name": "team"'),
        (here, ["remote", "show", "team"], 0, "Nothing there yet"),
        (here, ["sync", "push", "team", "top", "--dry-run"], 0, "top@1 would be sent"),
        (here, ["sync", "push", "team", "top"], 0, "top@1 sent (3 objects"),
        (here, ["sync", "push", "team", "top", "--json"], 0, '"is_new": false'),
        (here, ["sync", "push", "tema", "top"], 2, "did you mean team"),
        (here, ["sync", "push", "team", "tpo"], 2, "did you mean top"),
        (here, ["sync", "push", "team", "top@1", "--all"], 2, "--all takes a name"),
        (here, ["remote", "show", "team"], 0, "team/b"),
        (here, ["remote", "show", "team", "none"], 2, "has no 'none'"),
        (other, ["sync", "pull", "team", "top"], 2, "there is no remote 'team'"),
        (other, ["remote", "add", "team", store.url, *options], 0, "team: "),
        (other, ["sync", "pull", "team", "top", "--dry-run", "--json"], 0, '"dry_run": true'),
        (other, ["sync", "pull", "team", "top"], 0, "top@1 fetched (1 object,"),
        (other, ["sync", "pull", "team", "top"], 0, "top@1 was there already"),
        (other, ["sync", "pull", "team", "../x"], 2, "is not a name"),
        (other, ["remote", "rm", "team"], 0, "removed team"),
    ]:
        if store.remote.folder is None and said not in ("Nothing there yet", "top@1 sent (3 objects", "team: ",
                                                        "top@1 fetched (1 object,"):  # fmt: skip
            continue  # the same on S3, where making a client takes long
        monkeypatch.setenv("QHUB_HOME", where)
        with pytest.raises(SystemExit) as caught:
            run(line)
        captured = capsys.readouterr()
        assert caught.value.code == code, (line, captured.err)
        assert said in captured.out + captured.err, (line, captured)
        if "--json" in line:
            json.loads(captured.out)
    assert Registry(other).versions() == Registry(here).versions()


def test_a_server_that_is_not_there_is_reported(home: Home, merge: Version, monkeypatch: pytest.MonkeyPatch) -> None:
    """No bucket, no server, no credentials: one error that names the remote."""
    for key, value in (("ACCESS_KEY_ID", "id"), ("SECRET_ACCESS_KEY", "secret"), ("MAX_ATTEMPTS", "1")):
        monkeypatch.setenv(f"AWS_{key}", value)
    dead = add_remote(home, "dead", "s3://bucket", {"endpoint_url": "http://127.0.0.1:9", "client_kwargs": {}})
    monkeypatch.setattr("s3fs.core.S3FileSystem.retries", 1)
    with pytest.raises(RemoteError, match=r"s3://bucket did not answer .*check the network"):
        push(Registry(), open_store(dead), [merge])


def test_a_bucket_that_is_not_there_is_reported(
    s3_server: str, home: Home, merge: Version, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Buckets are never created: they cost, and a name may be a typing error."""
    for key, value in (("ACCESS_KEY_ID", "id"), ("SECRET_ACCESS_KEY", "secret")):
        monkeypatch.setenv(f"AWS_{key}", value)
    store = open_store(add_remote(home, "typo", "s3://no-such-bucket/x", {"endpoint_url": s3_server}))
    with pytest.raises(NotFound, match="there is no such bucket: create it first"):
        push(Registry(), store, [merge])
    with pytest.raises(NotFound):
        pull(Registry(), store, named("a"))
