"""Remotes by name: `remotes/<name>.json` in the home says where each is. No secret is kept there."""

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fsspec.registry import get_filesystem_class, known_implementations

from adapterhub_local.durable import canonical_json, place_file, staging, sync_folder
from adapterhub_local.errors import BadReference, Corrupt, InputError, InUse, NotFound
from adapterhub_local.refs import check_name
from adapterhub_local.settings import Home, make_folder

EXTRAS = {"s3": "s3", "s3a": "s3"}  # scheme -> the extra of this package that brings its client
# what opens nothing by itself but something inside another place, or only what this process has in memory
WRAPPERS = frozenset(
    ("async_wrapper", "asyncwrapper", "asynclocal", "blockcache", "cached", "dask", "data", "dir", "filecache",
     "generic", "libarchive", "reference", "simplecache", "tar", "zip")
)  # fmt: skip
SECRETS = ("key", "secret", "token", "password", "passwd", "sas", "connection_string")


@dataclass(frozen=True)
class Remote:
    """A place outside this home that keeps versions: a folder or any URL fsspec opens, with options for its client."""

    name: str
    url: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> Path | None:
        """Where it is, if it is a folder of this machine."""
        return None if "://" in self.url else Path(self.url)


def add_remote(home: Home, name: str, url: str, options: Mapping[str, Any] | None = None) -> Remote:
    """Keep where `name` is. A folder is created and made absolute; other places are not contacted.

    Raises InUse if the name is taken, InputError for a URL that cannot be one, that holds a secret or that nothing
    installed here opens.
    """
    _check(name)
    options = dict(options or {})
    if secret := next((key for key in options if any(word in key.lower() for word in SECRETS)), None):
        raise InputError(f"'{secret}' is a secret, which is not kept: give it as the store's own tools read it, "
                         "for S3 AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or a profile")  # fmt: skip
    remote = Remote(name, _check_url(url), options)
    if remote.folder is not None:
        if options:
            raise InputError(f"{url} is a folder, which takes no options")
        try:
            remote.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{remote.folder} cannot be made ({error.strerror}): name another folder") from None
    path = _path(home, name)
    make_folder(path.parent)
    with staging(home.tmp) as stage:
        (stage / "remote").write_bytes(canonical_json({"options": options, "url": remote.url}))
        try:
            place_file(stage / "remote", path)
        except InUse:
            raise InUse(f"there is a remote '{name}' already: `qhub remote rm {name}` forgets it") from None
    return remote


def list_remotes(home: Home) -> list[Remote]:
    """All remotes, by name."""
    folder = home.root / "remotes"
    return [_read(path) for path in sorted(folder.glob("*.json"))] if folder.is_dir() else []


def find_remote(home: Home, name: str) -> Remote:
    """The remote called `name`. Raises NotFound with the nearest names."""
    path = _path(home, _check(name))
    if not path.is_file():
        known = [remote.name for remote in list_remotes(home)]
        near = difflib.get_close_matches(name, known, n=3)
        hint = f"`qhub remote add {name} URL` adds it" + (f", there is {', '.join(known[:5])}" if known else "")
        if near:
            hint = f"did you mean {' or '.join(near)}?"
        raise NotFound(f"there is no remote '{name}': {hint}")
    return _read(path)


def remote_at(home: Home, text: str) -> Remote:
    """The remote called so, or the place that a URL, or a path with a '/', names without being kept.

    Raises NotFound, InputError.
    """
    return Remote(text, _check_url(text)) if "/" in text else find_remote(home, text)


def remove_remote(home: Home, name: str) -> Remote:
    """Forget where a remote is; what it keeps stays there. Raises NotFound."""
    remote = find_remote(home, name)
    _path(home, name).unlink()
    sync_folder(home.root / "remotes")
    return remote


def check_kind(scheme: str) -> None:
    """Raise InputError, saying what to install or write instead, unless something installed opens `scheme`://."""
    kinds = sorted(known_implementations.keys() - WRAPPERS)
    if scheme not in kinds:
        near = difflib.get_close_matches(scheme.lower(), kinds, n=1)
        hint = (
            f"did you mean {near[0]}://?"
            if near
            else "write a folder or s3://bucket/team to push and to pull, or "
            "to pull only what fsspec opens, such as gs://, az://, sftp:// or https://"
        )
        raise InputError(f"'{scheme}://' is not a kind of place that can be opened: {hint}")
    try:
        get_filesystem_class(scheme)
    except ImportError as error:
        hint = f"pip install 'adapterhub-local[{EXTRAS[scheme]}]'" if scheme in EXTRAS else str(error)
        raise InputError(f"{scheme}:// needs a package that is not installed: {hint}") from None


def _path(home: Home, name: str) -> Path:
    return home.root / "remotes" / f"{name}.json"


def _check(name: str) -> str:
    if "/" in check_name(name):
        raise BadReference(f"'{name}' cannot name a remote: leave out the '/'")
    return name


def _check_url(url: str) -> str:
    scheme, separator, rest = url.partition("://")
    if "::" in url or not url.isprintable() or not url.strip() or (separator and not rest.strip("/")):
        raise InputError(f"'{url.encode('unicode_escape').decode()[:80]}' is not a place for versions: give a folder "
                         "or a URL such as s3://bucket/team")  # fmt: skip
    if not separator:
        _check_folder(url)
    if not separator or scheme in ("file", "local"):
        folder = Path(rest if separator else url).expanduser().absolute()
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{folder} is a file: name a folder or a URL such as s3://bucket/team")
        return str(folder)
    if "@" in rest.partition("/")[0]:
        raise InputError(f"the {scheme} URL has a user or a password in it, which is not kept: give them as the "
                         "store's own tools read them, for S3 AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")  # fmt: skip
    check_kind(scheme)
    return url.rstrip("/")


def _check_folder(path: str) -> None:
    """Raise InputError for what was hardly meant as a folder: `s3`, `s3:bucket/team` and `s3:/bucket`."""
    scheme, _, rest = path.partition(":")
    kinds = known_implementations.keys() - WRAPPERS - {"file", "local"}
    if scheme.lower() in kinds and not Path(path).exists():
        meant = f"{scheme.lower()}://{rest.strip('/') or 'bucket/team'}"
        raise InputError(
            f"'{path}' is not a folder here and looks like a kind of place: write {meant}, or ./{path} for that folder"
        )


def _read(path: Path) -> Remote:
    try:
        fields = json.loads(path.read_bytes())
        return Remote(path.stem, str(fields["url"]), dict(fields["options"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Corrupt(f"{path} cannot be read ({error}): remove the file and add the remote again") from None
