"""Folders with the files of a version, which PEFT can load: links to blobs, or copies where there can be none."""

import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from adapterhub_local.digests import hex_of
from adapterhub_local.durable import may_write, place_folder, share_parents, staging
from adapterhub_local.errors import InUse
from adapterhub_local.registry.blobs import Blobs, is_sound
from adapterhub_local.registry.version import File, Version
from adapterhub_local.settings import Home


def lay_out(home: Home, store: Blobs, version: Version) -> Path:
    """A folder with the version's files, their bytes checked. Raises Corrupt if a blob is damaged or missing.

    In the home, or, where that cannot be written, in a place of this user's.
    """
    blobs = {file.path: store.check(file) for file in version.files}
    name = hex_of(version.content_digest)
    target = home.folders / name
    if _holds(target, version, blobs):
        return target
    if may_write(home.root) and may_write(home.folders) and may_write(home.tmp):
        _make(target, home.tmp, version, blobs, _link_or_copy)
        return target
    target = home.views / name
    if not _holds(target, version, blobs):
        # links to the blobs, which need no room; the home is on another filesystem as a rule
        tmp = home.views.parent / "tmp"
        _make(target, tmp, version, blobs, lambda blob, link: link.symlink_to(blob))
    return target


def _holds(folder: Path, version: Version, blobs: Mapping[str, Path]) -> bool:
    """Whether a folder has the files of a version: links to their blobs, or the same bytes."""
    return folder.is_dir() and all(_is_same(folder / file.path, blobs[file.path], file) for file in version.files)


def _make(
    target: Path, tmp: Path, version: Version, blobs: Mapping[str, Path], place: Callable[[Path, Path], None]
) -> None:
    """Make the folder of a version by one rename; one that was changed by hand, or repaired since, is replaced."""
    if target.is_dir():
        with staging(tmp) as discarded:
            target.rename(discarded / "folder")
    with staging(tmp) as folder:
        staged = folder / "files"
        share_parents(staged)
        for path, blob in blobs.items():
            place(blob.absolute(), staged / path)
        with suppress(InUse):  # another process made the same folder meanwhile
            place_folder(staged, target)


def _is_same(path: Path, blob: Path, file: File) -> bool:
    return path.is_file() and (path.samefile(blob) or is_sound(path, file.digest, file.size))


def _link_or_copy(blob: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        target.hardlink_to(blob)
    except OSError:  # a filesystem without hard links
        shutil.copyfile(blob, target)
