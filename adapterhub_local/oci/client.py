"""One repository of a registry over HTTP, as the OCI distribution specification 1.1 has it.

httpx and not a library of its own: what there is for Python rebuilds manifests from dictionaries, and a version is
known by the very bytes of its manifest.
"""

import base64
import hashlib
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self
from urllib.parse import urljoin

import httpx

from adapterhub_local.digests import from_hex
from adapterhub_local.durable import CHUNK, digest_bytes
from adapterhub_local.errors import Corrupt, NotFound, RemoteError
from adapterhub_local.oci.address import Address, is_safe
from adapterhub_local.oci.credentials import credentials
from adapterhub_local.registry.version import MANIFEST_TYPE, File

TIMEOUT = 30.0  # seconds without a byte
MAX_MANIFEST = 4 << 20  # bytes; registries take no larger ones
_CHALLENGE = re.compile(r'(\w+)="([^"]*)"')


class Repository:
    """`with Repository(address) as repository`: blobs and manifests by digest, manifests by tag too.

    Raises RemoteError for what the registry refuses or does not answer, NotFound for what it does not have, Corrupt for
    bytes that are not what their digest says.
    """

    def __init__(self, address: Address) -> None:
        self.address = address
        self._authorization: str | None = None
        is_here = address.url.startswith("http:")  # no proxy stands between this machine and itself
        self._client = httpx.Client(timeout=TIMEOUT, follow_redirects=True, trust_env=not is_here)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()

    def has_blob(self, digest: str) -> bool:
        """Whether the blob is there."""
        return self._ask("HEAD", f"blobs/{digest}", allowed=(404,)).status_code == 200

    def put_blob(self, file: File, content: Path | bytes) -> bool:
        """Send a blob unless it is there; whether it was sent."""
        if self.has_blob(file.digest):
            return False
        begun = self._ask("POST", "blobs/uploads/", content=b"")
        place = httpx.URL(urljoin(str(begun.url), begun.headers.get("Location", "")))
        place = place.copy_merge_params({"digest": file.digest})
        headers = {"Content-Type": "application/octet-stream", "Content-Length": str(file.size)}
        if isinstance(content, bytes):
            self._ask("PUT", str(place), content=content, headers=headers)
        else:
            with open(content, "rb") as opened:
                self._ask("PUT", str(place), content=_blocks(opened), headers=headers)
        return True

    def put_manifest(self, reference: str, manifest: bytes) -> None:
        """Store a manifest by its digest or under a tag, which moves if it is another's."""
        answer = self._ask("PUT", f"manifests/{reference}", content=manifest, headers={"Content-Type": MANIFEST_TYPE})
        stored = answer.headers.get("Docker-Content-Digest")
        if stored is not None and stored != digest_bytes(manifest):
            raise Corrupt(
                f"{self.address} stored a manifest with the digest {stored}, sent was {digest_bytes(manifest)}"
            )

    def digest_of(self, tag: str) -> str | None:
        """The digest of what a tag points to, None if there is none."""
        try:
            return digest_bytes(self.manifest(tag))
        except NotFound:
            return None

    def manifest(self, reference: str) -> bytes:
        """The manifest of a tag or digest. Raises NotFound."""
        with self._stream(f"manifests/{reference}", {"Accept": MANIFEST_TYPE}) as answer:
            data = b""
            for block in answer.iter_bytes():
                data += block
                if len(data) > MAX_MANIFEST:
                    raise Corrupt(
                        f"{self.address} has a manifest of more than {MAX_MANIFEST:,} bytes: nothing was read"
                    )
        if reference.startswith("sha256:") and digest_bytes(data) != reference:
            raise Corrupt(f"{self.address} has other bytes than {reference} says: nothing was registered")
        return data

    def fetch(self, file: File, target: Path) -> None:
        """Write a blob to `target`, its size and digest checked."""
        with open(target, "xb") as out:
            self._receive(file, out)

    def read(self, file: File) -> bytes:
        """A small blob, its size and digest checked."""
        out = io.BytesIO()
        self._receive(file, out)
        return out.getvalue()

    def _receive(self, file: File, out: BinaryIO) -> None:
        hasher, size = hashlib.sha256(), 0
        with self._stream(f"blobs/{file.digest}", {}) as answer:
            for block in answer.iter_bytes(CHUNK):
                size += len(block)
                if size > file.size:  # whoever serves it may never end
                    break
                hasher.update(block)
                out.write(block)
        if size != file.size:
            more = "more than " if size > file.size else ""
            raise Corrupt(
                f"{self.address}: {file.path} came with {more}{min(size, file.size):,} of {file.size:,} bytes: "
                "nothing was registered, push it again"
            )
        if from_hex(hasher.hexdigest()) != file.digest:
            raise Corrupt(f"{self.address}: {file.path} does not match its digest: nothing was registered")

    @contextmanager
    def _stream(self, path: str, headers: dict[str, str]) -> Iterator[httpx.Response]:
        with self._plain_errors():
            for attempt in (1, 2):
                request = self._request("GET", path, headers=headers)
                answer = self._client.send(request, stream=True)
                try:
                    if answer.status_code == 401 and attempt == 1:
                        self._log_in(answer)
                        continue
                    if answer.status_code >= 400:
                        answer.read()
                        self._refuse(answer, path)
                    yield answer
                    return
                finally:
                    answer.close()

    def _ask(self, method: str, path: str, *, allowed: tuple[int, ...] = (), **given: Any) -> httpx.Response:
        with self._plain_errors():
            answer = self._client.send(self._request(method, path, **given))
            if answer.status_code == 401:
                self._log_in(answer)
                content = given.get("content")
                if content is not None and not isinstance(content, bytes):
                    content.restart()
                answer = self._client.send(self._request(method, path, **given))
        if answer.status_code >= 400 and answer.status_code not in allowed:
            self._refuse(answer, path)
        return answer

    def _request(self, method: str, path: str, headers: dict[str, str] | None = None, **given: Any) -> httpx.Request:
        url = path if path.startswith(("http:", "https:")) else f"{self.address.url}/{path}"
        own = dict(headers or {})
        if self._authorization is not None and httpx.URL(url).netloc == httpx.URL(self.address.url).netloc:
            own["Authorization"] = self._authorization
        return self._client.build_request(method, url, headers=own, **given)

    def _log_in(self, refused: httpx.Response) -> None:
        """Get what the registry asks for: user and password, or a token made of them."""
        known = credentials(self.address.host)
        scheme, _, rest = refused.headers.get("WWW-Authenticate", "").partition(" ")
        basic = "Basic " + base64.b64encode(":".join(known).encode()).decode() if known else None
        if scheme.lower() == "basic":
            if basic is None:
                host = self.address.host
                raise RemoteError(
                    f"{host} wants a user and a password: `docker login {host}` or `oras login` writes them where "
                    "qhub looks for them"
                )
            self._authorization = basic
            return
        challenge = dict(_CHALLENGE.findall(rest))
        if scheme.lower() != "bearer" or "realm" not in challenge:
            raise RemoteError(f"{self.address.host} refuses without saying how to log in")
        scope = challenge.get("scope") or f"repository:{self.address.repository}:pull,push"
        wanted = {"service": challenge["service"], "scope": scope} if "service" in challenge else {"scope": scope}
        if basic is not None and not is_safe(challenge["realm"]):
            raise RemoteError(
                f"{self.address.host} wants the password sent to {challenge['realm'][:80]!r}, without encryption"
            )
        answer = self._client.get(challenge["realm"], params=wanted, headers={"Authorization": basic} if basic else {})
        if answer.status_code >= 400:
            self._refuse(answer, "token")
        try:
            found = answer.json()
            self._authorization = f"Bearer {found.get('token') or found['access_token']}"
        except (ValueError, KeyError, AttributeError, TypeError):
            raise RemoteError(f"{self.address.host} answered the log-in without a token") from None

    def _refuse(self, answer: httpx.Response, path: str) -> None:
        host, status = self.address.host, answer.status_code
        if status in (401, 403):
            whose = "the credentials that are stored for it" if credentials(host) else "to do this without credentials"
            raise RemoteError(
                f"{host} refuses {whose} ({self.address.repository}): `docker login {host}` or `oras login`"
            )
        if status == 404:
            raise NotFound(f"{self.address.host} has no {self.address.repository} with {path.rpartition('/')[2]}")
        try:
            reason = "; ".join(str(error.get("message")) for error in answer.json()["errors"])[:200]
        except (ValueError, KeyError, TypeError, AttributeError):
            reason = answer.reason_phrase
        raise RemoteError(f"{host} answered {status}: {reason}")

    @contextmanager
    def _plain_errors(self) -> Iterator[None]:
        """What httpx raises, as one sentence."""
        try:
            yield
        except httpx.TimeoutException:
            raise RemoteError(f"{self.address.host} has not answered for {TIMEOUT:g} s: try again later") from None
        except httpx.RemoteProtocolError as error:
            raise RemoteError(f"{self.address.host} broke off in the middle ({error}): try again") from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise RemoteError(f"{self.address.host} cannot be reached: {error}") from None


class _blocks:
    """A file a part at a time, from its beginning as often as it is sent."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def __iter__(self) -> Iterator[bytes]:
        while block := self.file.read(CHUNK):
            yield block

    def restart(self) -> None:
        self.file.seek(0)
