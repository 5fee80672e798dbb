"""What a person writes for an adapter on the Hub: ORG/REPO, a folder in it, a revision, or an address from there."""

import re
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from adapterhub_local.errors import InputError

_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co", "hf-mirror.com")
_FOLDER = re.compile(r"[\w.-]+(/[\w.-]+)*", re.ASCII)


@dataclass(frozen=True)
class Address:
    """A repository, and the folder of it that an adapter is in, None for its root; `revision` as it was written."""

    repo_id: str
    subfolder: str | None = None
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> "Address":
        """`ORG/REPO[/FOLDER][@REVISION]`, or an address such as https://huggingface.co/ORG/REPO/tree/main/FOLDER.

        Raises InputError for an address of something else. That the repository can be one is not looked at.
        """
        if "://" in text:
            return cls._parse_url(text)
        path, _, revision = text.partition("@")
        parts = path.strip("/").split("/")
        return cls("/".join(parts[:2]), cls._folder("/".join(parts[2:])), revision or None)

    @classmethod
    def _parse_url(cls, text: str) -> "Address":
        url = urlsplit(text)
        parts = [unquote(part) for part in url.path.split("/") if part]
        shown = text.encode("unicode_escape").decode()[:100]
        if url.scheme not in ("http", "https") or url.hostname not in _HOSTS or len(parts) < 2:
            raise InputError(f"{shown} is not the address of a repository on the Hub: write ORG/REPO")
        if parts[0] in ("datasets", "spaces"):
            raise InputError(f"{shown} is the address of {parts[0]}, not of an adapter: write ORG/REPO")
        repo_id, rest = "/".join(parts[:2]), parts[2:]
        revision = None
        if rest and rest[0] in ("tree", "blob", "resolve", "commit") and len(rest) > 1:
            revision, rest = rest[1], rest[2:]
        elif rest:
            rest = []
        if rest and rest[-1].endswith((".safetensors", ".json")):  # a file of it was looked at
            rest = rest[:-1]
        return cls(repo_id, cls._folder("/".join(rest)), None if revision == "main" else revision)

    @staticmethod
    def _folder(path: str) -> str | None:
        if path and (not _FOLDER.fullmatch(path) or {".", ".."} & set(path.split("/"))):
            raise InputError(f"{path[:60]!r} cannot be a folder of a repository: write ORG/REPO/FOLDER")
        return path or None
