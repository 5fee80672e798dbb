"""`config.toml` of a home: how much it may hold, and who is notified of changes. Every mistake is named.

max_bytes = "50GB"                  # a publish that would go over it is refused
[[hooks]]
name = "deploy"                     # a POST to url, or command = ["./notify.sh"], which reads the same body
url = "https://ci.example/adapters"
events = ["alias"]                  # else publish, alias, removal and evaluation
names = ["sentiment*"]              # else all
secret_file = "hooks/deploy.secret" # signs the body; relative to the home
timeout = 10                        # seconds of one try
"""

import difflib
import re
import tomllib
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any
from urllib.parse import urlsplit

from adapterhub_local.errors import InputError
from adapterhub_local.settings import Home
from adapterhub_local.sizes import parse_size

EVENTS = {  # what a hook may ask for -> the kind of record
    "publish": "version", "alias": "alias", "removal": "removal", "evaluation": "evaluation", "tag": "tag",
    "description": "description", "split": "split", "protection": "protection", "approval": "approval", "key": "key",
}  # fmt: skip
DEFAULT_EVENTS = ("publish", "alias", "removal", "evaluation")
MAX_TIMEOUT = 120.0
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
_FIELDS = ("name", "url", "command", "events", "names", "secret_file", "timeout")


@dataclass(frozen=True)
class Hook:
    """Who is notified of which changes: a URL that is posted to, or a command that reads the same body."""

    name: str
    url: str | None = None
    command: tuple[str, ...] = ()
    events: tuple[str, ...] = DEFAULT_EVENTS
    names: tuple[str, ...] = ()
    secret_file: str | None = None
    timeout: float = 10.0

    def wants(self, record: dict[str, Any]) -> bool:
        """Whether the hook is to be notified of this record."""
        is_named = not self.names or any(fnmatchcase(str(record.get("name")), pattern) for pattern in self.names)
        return is_named and record["mark"] in {EVENTS[event] for event in self.events}


@dataclass(frozen=True)
class HomeConfig:
    """What a home's owner wants of it."""

    max_bytes: int | None = None
    hooks: tuple[Hook, ...] = ()


def read_config(home: Home) -> HomeConfig:
    """The home's config, the default if it has none. Raises InputError that names the file and the key."""
    try:
        text = home.config.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return HomeConfig()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{home.config} cannot be read: {error}") from None
    return parse_config(text, str(home.config))


def parse_config(text: str, place: str) -> HomeConfig:
    """The config that `text` spells. Raises InputError naming `place`."""
    try:
        fields = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise InputError(f"{place} is not TOML: {error}") from None
    _check_keys(fields, ("max_bytes", "hooks"), place)
    limit = fields.get("max_bytes")
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int | str)):
        raise InputError(f"{place}: max_bytes is a size such as '50GB'")
    try:
        max_bytes = parse_size(str(limit)) if limit is not None else None
    except InputError as error:
        raise InputError(f"{place}: max_bytes: {error}") from None
    listed = fields.get("hooks", [])
    if not isinstance(listed, list) or not all(isinstance(one, dict) for one in listed):
        raise InputError(f"{place}: hooks are tables, each begins with [[hooks]]")
    hooks = tuple(_hook(one, f"{place}: hook {number}") for number, one in enumerate(listed, 1))
    names = [hook.name for hook in hooks]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"{place}: two hooks are called '{twice}'")
    return HomeConfig(max_bytes, hooks)


def _hook(fields: dict[str, Any], place: str) -> Hook:
    _check_keys(fields, _FIELDS, place)
    name, url, command = fields.get("name"), fields.get("url"), fields.get("command", [])
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InputError(f"{place}: name is lower-case letters, digits, _ and -, and must be there")
    place = f"{place} ('{name}')"
    lists = {key: fields.get(key, default) for key, default in
             (("command", []), ("events", list(DEFAULT_EVENTS)), ("names", []))}  # fmt: skip
    for key, value in lists.items():
        if not isinstance(value, list) or not all(isinstance(one, str) and one for one in value):
            raise InputError(f"{place}: {key} is a list of texts")
    if (url is None) == (not command):
        raise InputError(f"{place}: give it a url or a command, and not both")
    if url is not None:
        _check_url(url, place)
    if unknown := next((event for event in lists["events"] if event not in EVENTS), None):
        raise InputError(f"{place}: there is no event '{unknown}', but {', '.join(EVENTS)}")
    if not lists["events"]:
        raise InputError(f"{place}: events is empty, so it would never be notified: leave it out for the default")
    secret, timeout = fields.get("secret_file"), fields.get("timeout", 10.0)
    if secret is not None and (not isinstance(secret, str) or not secret):
        raise InputError(f"{place}: secret_file is the path of a file")
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not 0 < timeout <= MAX_TIMEOUT:
        raise InputError(f"{place}: timeout is seconds, up to {MAX_TIMEOUT:g}")
    return Hook(
        name, url, tuple(lists["command"]), tuple(lists["events"]), tuple(lists["names"]), secret, float(timeout)
    )


def _check_url(url: object, place: str) -> None:
    try:
        parts = urlsplit(url) if isinstance(url, str) and url.isascii() and url.isprintable() else None
        is_sound = (
            parts is not None and parts.scheme in ("http", "https") and bool(parts.hostname) and " " not in str(url)
        )
        _ = parts.port if parts is not None else None
    except ValueError:
        is_sound = False
    if not is_sound:
        raise InputError(f"{place}: url is an address such as https://ci.example/adapters")
    if "@" in urlsplit(str(url)).netloc:
        raise InputError(f"{place}: a user or a password does not belong in url: the body is signed with secret_file")


def _check_keys(fields: dict[str, Any], known: tuple[str, ...], place: str) -> None:
    for key in fields:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
            raise InputError(f"{place}: there is no key '{key}': {hint}")
