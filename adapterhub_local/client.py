"""The registry of another machine, through the API of its server: where verbs go when QHUB_SERVER names one.

QHUB_SERVER=https://gpu-box:8000 QHUB_API_KEY=... qhub list
"""

import re
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote, urlsplit

from adapterhub_local import settings
from adapterhub_local.errors import BadReference, InputError, InUse, NotFound, QhubError, RemoteError

PAGE = 200  # entries of one answer
POLL = 0.5  # seconds between two questions about a job
SECONDS = 60.0  # for an answer
# what this machine's verbs raise, by the status that a server maps it to
RAISED: dict[int, type[QhubError]] = {400: InputError, 403: InputError, 404: NotFound, 409: InUse, 422: InputError}


def chosen_server() -> "Server | None":
    """The server that QHUB_SERVER names, None where it names none. Raises InputError for what is not an address."""
    url = settings.server()
    return None if url is None else Server(url, settings.api_key())


def check_here(command: str) -> None:
    """Raise InputError for a verb that would work on this machine while QHUB_SERVER names another."""
    if settings.server() is not None:
        raise InputError(
            f"QHUB_SERVER is set, and `qhub {command}` works on this machine alone: "
            f"QHUB_SERVER= qhub {command} ... does so"
        )


class Server:
    """A server's API under /v1. Raises the error that the same request raises here; RemoteError where none answers."""

    def __init__(self, url: str, key: str | None) -> None:
        check_address(url)
        self.url = url.rstrip("/").removesuffix("/v1")
        self._key = key
        # a proxy does not know this machine's servers
        self._may_use_proxy = urlsplit(url).hostname not in ("127.0.0.1", "localhost", "::1")

    def get(self, path: str, **parameters: Any) -> Any:
        """What is at a path, which begins with a slash; parameters that are None or empty are left out."""
        return self._ask("GET", path, parameters)

    def put(self, path: str, body: dict[str, Any]) -> Any:
        """Have something be so."""
        return self._ask("PUT", path, {}, body)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """Have something done."""
        return self._ask("POST", path, {}, body)

    def delete(self, path: str, **parameters: Any) -> Any:
        """Have something be no more."""
        return self._ask("DELETE", path, parameters)

    def pages(self, path: str, **parameters: Any) -> Iterator[Any]:
        """All entries of a list, a page of which is asked for when it is needed."""
        after = None
        while True:
            page = self.get(path, **parameters, after=after, limit=PAGE)
            yield from page["data"]
            after = page["after"]
            if after is None:
                return

    def total(self, path: str, **parameters: Any) -> int:
        """How many entries a list has."""
        return int(self.get(path, **parameters, limit=1)["total"])

    def result(self, job: dict[str, Any]) -> Any:
        """What comes of a job that was started, once it has ended. Raises QhubError with its reason if it failed."""
        while job["state"] == "running":
            time.sleep(POLL)
            job = self.get(f"/jobs/{quote(job['id'])}")
        if job["state"] != "done":
            raise QhubError(f"{' '.join(job['command'])} on {self.url}: {job['error'] or job['state']}")
        return job["result"]

    def _ask(self, method: str, path: str, parameters: dict[str, Any], body: dict[str, Any] | None = None) -> Any:
        import httpx

        given = {name: value for name, value in parameters.items() if value not in (None, "", (), [])}
        if not path.split("/")[-1] or not {".", ".."}.isdisjoint(path.split("/")):  # it would lead to another endpoint
            raise BadReference(f"'{path.removeprefix('/registry/').partition('/')[2]}' is not a name")
        address = f"{self.url}/v1{quote(path, safe='/@:')}"
        try:
            with httpx.Client(timeout=SECONDS, trust_env=self._may_use_proxy) as client:
                answer = client.request(method, address, params=given, json=body, headers=bearer(self._key))
        except httpx.HTTPError as error:
            reason = str(error) or type(error).__name__
            raise RemoteError(f"{self.url} (QHUB_SERVER) does not answer: {reason}") from None
        if answer.is_success:
            try:
                return answer.json()
            except ValueError:
                raise RemoteError(f"{self.url} (QHUB_SERVER) answers with something that is not JSON") from None
        raise self._error(answer.status_code, _message(answer))

    def _error(self, status: int, message: str) -> QhubError:
        if status == 401:
            hint = "it does not know the key in QHUB_API_KEY" if self._key else "set QHUB_API_KEY to a key of it"
            return InputError(f"{self.url} wants an API key: {hint}")
        kind = RAISED.get(status, RemoteError)
        return kind(f"{self.url}: {message or f'status {status}'}" if kind is RemoteError else message)


def bearer(key: str | None) -> dict[str, str]:
    """The header that sends a key, none for no key. Raises InputError for what no key can be."""
    if key is None:
        return {}
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise InputError(
            "QHUB_API_KEY is not a key: it has a letter that no key has, such as a line break or an accent"
        )
    return {"Authorization": f"Bearer {key}"}


def check_address(url: str) -> None:
    """Raise InputError for what cannot be a server's address."""
    try:
        parts = urlsplit(url)
        host = (parts.hostname or "").encode("idna").decode()
        is_address = parts.scheme in ("http", "https") and bool(host) and not re.search(r"\s", host) and parts.port != 0
    except ValueError:  # a port that is not a number, a name that no host can have
        is_address = False
    if not is_address:
        raise InputError(f"'{url}' is not a server's address: write it as http://127.0.0.1:8000")


def _message(answer: Any) -> str:
    """What a server says went wrong: in an OpenAI error body, or in the first line of another."""
    try:
        error = answer.json()["error"]
        return str(error["message"])
    except (ValueError, KeyError, TypeError):
        return f"status {answer.status_code} {answer.reason_phrase}: is it a server of this project?"
