"""Addresses of versions at a registry: `oci://ghcr.io/team/sentiment:v3`, or by digest `...@sha256:<64 digits>`."""

import ipaddress
import re
from dataclasses import dataclass
from urllib.parse import urlsplit

from adapterhub_local.errors import InputError

PREFIX = "oci://"
_HOST = re.compile(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?)(:[0-9]{1,5})?")
# as the distribution specification has them
_PART = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_REPOSITORY = re.compile(rf"{_PART}(?:/{_PART})*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


@dataclass(frozen=True)
class Address:
    """A repository at a registry, and a tag or a digest of it, or neither."""

    host: str
    repository: str
    tag: str | None = None
    digest: str | None = None

    @classmethod
    def parse(cls, text: str) -> "Address":
        """The address that `text` spells. Raises InputError."""
        rest, at, digest = text.removeprefix(PREFIX).partition("@")
        host, slash, path = rest.partition("/")
        repository, colon, tag = path.partition(":")
        if (
            not text.startswith(PREFIX)
            or not (slash and _HOST.fullmatch(host) and _REPOSITORY.fullmatch(repository))
            or len(repository) > 255
            or (colon and not _TAG.fullmatch(tag))
            or (at and (colon or not _DIGEST.fullmatch(digest)))
        ):
            shown = text.encode("unicode_escape").decode()[:80]
            raise InputError(
                f"'{shown}' is not an address: write oci://HOST/TEAM/NAME:TAG, in lower case except for the tag"
            )
        return cls(host, repository, tag or None, digest or None)

    def __str__(self) -> str:
        behind = f"@{self.digest}" if self.digest else f":{self.tag}" if self.tag else ""
        return f"{PREFIX}{self.host}/{self.repository}{behind}"

    @property
    def url(self) -> str:
        """Where its API is: without encryption on this machine only, as Docker has it."""
        name = _HOST.fullmatch(self.host)
        bare = name[1].strip("[]") if name else ""
        scheme = "http" if bare == "localhost" or _is_loopback(bare) else "https"
        return f"{scheme}://{self.host}/v2/{self.repository}"


def is_safe(url: str) -> bool:
    """Whether what is sent to a URL is encrypted, or stays on this machine."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    return parts.scheme == "https" or (parts.scheme == "http" and (host == "localhost" or _is_loopback(host)))


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
