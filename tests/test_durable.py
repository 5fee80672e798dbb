"""Writing: equal values give equal bytes, and a target appears whole, once, or not at all."""

import errno
import hashlib
import json
import os
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from adapterhub_local import durable
from adapterhub_local.durable import (
    canonical_json,
    check_absent,
    digest_bytes,
    digest_file,
    place_file,
    place_folder,
    replacing,
    staging,
)
from adapterhub_local.errors import InputError, InUse

JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text()),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(st.text(), JSON, max_size=6))
def test_canonical_json_does_not_depend_on_the_order_of_keys(value: dict) -> None:
    """The same table filled in another order gives the same bytes, and they are compact UTF-8."""
    shuffled = dict(reversed(value.items()))
    assert canonical_json(value) == canonical_json(shuffled)
    assert canonical_json({"b": [1, 2.5], "a": "ä"}) == '{"a":"ä","b":[1,2.5]}'.encode()


@given(st.binary(max_size=20))
@example(b"\xff.safetensors")
def test_canonical_json_takes_the_name_of_any_file(name: bytes) -> None:
    """A file name that is not UTF-8, as Python hands it over, is written as UTF-8 and read back as it was."""
    text = name.decode("utf-8", "surrogateescape")
    assert json.loads(canonical_json({"name": text})) == {"name": text}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), [-float("inf")], {"a": {"b": float("nan")}}])
def test_canonical_json_refuses_what_json_does_not_have(value: object) -> None:
    """NaN and infinity would make bytes that other readers refuse, so they are an error here."""
    with pytest.raises(ValueError, match="JSON"):
        canonical_json(value)


def test_digests_are_sha256_of_the_bytes(tmp_path: Path) -> None:
    """A file's digest is that of its bytes, also over several chunks."""
    data = os.urandom(durable.CHUNK * 2 + 17)
    (tmp_path / "file").write_bytes(data)
    wanted = "sha256:" + hashlib.sha256(data).hexdigest()
    assert digest_file(tmp_path / "file") == digest_bytes(data) == wanted


def test_staging_leaves_nothing_behind_an_error(tmp_path: Path) -> None:
    """The staging folder is removed with all it holds, however the block ends."""

    def stopped_in_the_middle() -> None:
        with staging(tmp_path / "tmp", prefix="x-") as folder:
            (folder / "deep").mkdir()
            (folder / "deep" / "file").write_bytes(b"half")
            assert folder.name.startswith("x-")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped_in_the_middle()
    assert list((tmp_path / "tmp").iterdir()) == []


def test_place_folder_moves_a_finished_folder(tmp_path: Path) -> None:
    """The target appears with all its files, and its missing parents are made."""
    staged = tmp_path / "staged"
    (staged / "sub").mkdir(parents=True)
    (staged / "sub" / "file").write_bytes(b"all")
    place_folder(staged, tmp_path / "far" / "away")
    assert (tmp_path / "far" / "away" / "sub" / "file").read_bytes() == b"all"
    assert not staged.exists()


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_place_folder_refuses_what_is_there(tmp_path: Path, kind: str) -> None:
    """A folder or file at the target stays as it was, and so does what was staged."""
    staged, target = tmp_path / "staged", tmp_path / "target"
    staged.mkdir()
    (staged / "new").write_bytes(b"new")
    if kind == "folder":
        target.mkdir()
        (target / "old").write_bytes(b"old")
    else:
        target.write_bytes(b"old")
    with pytest.raises(InUse, match="exists already"):
        place_folder(staged, target)
    assert (target / "old" if kind == "folder" else target).read_bytes() == b"old"
    assert (staged / "new").exists()


@pytest.mark.parametrize("kind", ["folder", "file", "dangling link"])
def test_place_file_refuses_what_is_there(tmp_path: Path, kind: str) -> None:
    """Nothing that is at the target is replaced or written through, not even a link to nowhere."""
    staged, target = tmp_path / "staged", tmp_path / "target"
    staged.write_bytes(b"new")
    if kind == "folder":
        target.mkdir()
    elif kind == "file":
        target.write_bytes(b"old")
    else:
        target.symlink_to(tmp_path / "nowhere")
    with pytest.raises(InUse, match="exists already"):
        place_file(staged, target)
    assert not (tmp_path / "nowhere").exists()
    assert kind != "file" or target.read_bytes() == b"old"


def test_place_file_on_a_filesystem_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where links are refused, as on FAT, the file is renamed instead, and still nothing is replaced."""

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    for name in ("one", "two"):
        (tmp_path / name).write_bytes(name.encode())
    place_file(tmp_path / "one", tmp_path / "target")
    with pytest.raises(InUse):
        place_file(tmp_path / "two", tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == b"one"
    assert not (tmp_path / "one").exists()


def test_check_absent_wants_a_folder_to_write_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path can be created if it does not exist and its folder does; a bare name is in the current folder."""
    monkeypatch.chdir(tmp_path)
    assert check_absent(Path("new")) == Path("new")
    with pytest.raises(InUse):
        check_absent(tmp_path)
    with pytest.raises(InputError, match="create the folder first"):
        check_absent(tmp_path / "missing" / "file")


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    """Readers see the old bytes until the block ends; one that fails leaves them, and nothing beside them."""
    target = tmp_path / "keys.json"
    with replacing(target, 0o600) as staged:
        staged.write_text("old")
        assert not target.exists()
    assert target.stat().st_mode & 0o777 == 0o600
    (tmp_path / ".keys.json.new").write_text("left by a process that was killed")
    with pytest.raises(FileNotFoundError), replacing(target) as staged:
        staged.write_bytes(b"half" + (tmp_path / "none").read_bytes())
    assert target.read_text() == "old"
    with replacing(target) as staged:
        staged.write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["keys.json"]
    assert target.read_text() == "new"
