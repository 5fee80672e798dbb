"""The way to the Hub: a client, and the one place where its many errors become ours, a sentence each.

Knows nothing of adapters or of the registry.
"""

import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from huggingface_hub import constants, get_token
from huggingface_hub.errors import (
    EntryNotFoundError,
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    validate_repo_id,
)
from huggingface_hub.utils import logging as hub_logging

from adapterhub_local.errors import HubError, InputError, NotFound, QhubError
from adapterhub_local.hub.patience import Note, PatientApi

_PROBE = 5  # seconds to wait for a connection that only shows whether there is a way
LOG_IN = "log in with `hf auth login` or set HF_TOKEN"


def check_repo_id(repo_id: str) -> str:
    """`repo_id`, if it is spelled ORG/REPO as the Hub wants it. Raises InputError."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        is_valid = False
    else:
        is_valid = repo_id.count("/") == 1
    if not is_valid:
        raise InputError(f"{repo_id!r} is not a repository of the Hub: write ORG/REPO, such as my-name/sentiment-lora")
    return repo_id


def is_model_id(text: object) -> bool:
    """Whether `text` could be the id of a model on the Hub (`org/model`, or an old one-word id), not a path."""
    if not isinstance(text, str):
        return False
    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return True


def connect(endpoint: str | None, token: str | None, *, to_write: bool = False, note: Note | None = None) -> PatientApi:
    """A client of the Hub at `endpoint` (default: huggingface_hub's own), which waits where it is asked to.

    `note` gets a line about long waits. Raises HubError without a token to write.
    """
    token = token or get_token()
    if to_write and not token:
        raise HubError(f"pushing needs a token of the Hub with write access: {LOG_IN}")
    api = PatientApi(endpoint=endpoint, token=token, library_name="qhub")
    api.note = note
    return api


@contextmanager
def hub_errors(repo_id: str, revision: str | None = None, *, endpoint: str | None = None) -> Iterator[None]:
    """Run calls to the Hub about `repo_id`: quiet unless at a terminal, every failure a QhubError."""
    where = endpoint or constants.ENDPOINT
    with _quiet():
        try:
            _check_reachable(where)
            yield
        except QhubError:
            raise
        except (OSError, HTTPError, HFValidationError, ValueError, KeyError, RuntimeError) as error:
            raise _translate(error, where, repo_id, revision) from error


def _check_reachable(endpoint: str) -> None:
    """Raises HubError where the host has no address or nobody listens there; the client would try for 23 seconds.

    What may be better in a moment (a timeout, a lost connection, a 5xx) is left to the client, which tries again.
    """
    url = urlsplit(endpoint)
    proxied = {"all", url.scheme} & getproxies().keys()
    if constants.HF_HUB_OFFLINE or url.hostname is None or (proxied and not proxy_bypass(url.hostname)):
        return  # not to be asked, or the proxy knows the way
    try:
        socket.create_connection((url.hostname, url.port or (80 if url.scheme == "http" else 443)), _PROBE).close()
    except (TimeoutError, ConnectionResetError):
        pass
    except OSError as error:
        raise _no_answer(endpoint, error) from None


def _no_answer(endpoint: str, error: BaseException) -> HubError:
    return HubError(f"the Hub at {endpoint} did not answer ({_first_line(error)}): check the network and try again")


def status_of(error: BaseException) -> int | None:
    """The HTTP status the Hub answered with, or None if there was no answer."""
    return error.response.status_code if isinstance(error, HfHubHTTPError) else None


def _translate(error: BaseException, endpoint: str, repo_id: str, revision: str | None) -> QhubError:
    if isinstance(error, RuntimeError) and error.__cause__ is not None:  # how an upload fails
        error = error.__cause__
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):  # how a download does
        error = error.__cause__
    if isinstance(error, GatedRepoError):
        return HubError(f"{repo_id} is gated: ask for access on {endpoint}/{repo_id}, then {LOG_IN}")
    if isinstance(error, RepositoryNotFoundError):
        return NotFound(f"there is no repository {repo_id} on the Hub that you may see: check the name, or {LOG_IN}")
    if isinstance(error, RevisionNotFoundError):
        wanted = f"revision '{revision}'" if revision else "such revision"
        return NotFound(f"{repo_id} has no {wanted}: its branches and tags are on {endpoint}/{repo_id}/refs")
    if isinstance(error, LocalTokenNotFoundError):
        return HubError(f"the Hub wants a token for {repo_id}: {LOG_IN}")
    if isinstance(error, OfflineModeIsEnabled):
        return HubError("HF_HUB_OFFLINE is set, so the Hub is not asked: unset it to push or pull")
    if isinstance(error, HfHubHTTPError):
        return _refused(error, endpoint, repo_id)
    if isinstance(error, LocalEntryNotFoundError | HTTPError):
        return _no_answer(endpoint, error)
    if isinstance(error, EntryNotFoundError):
        return HubError(f"a file of {repo_id} disappeared while it was read: try again")
    if isinstance(error, HFValidationError):
        return InputError(f"the Hub rejects this name: {_first_line(error)}")
    if isinstance(error, OSError) and not isinstance(error, FileMetadataError):
        return HubError(f"{repo_id}: {error.strerror or error}")
    return HubError(f"{endpoint} did not answer as the Hub does ({type(error).__name__}: {_first_line(error)})")


def _refused(error: HfHubHTTPError, endpoint: str, repo_id: str) -> HubError:
    status = error.response.status_code
    reason = error.server_message or error.response.headers.get("X-Error-Message") or error.response.reason_phrase
    reason = " ".join(reason.split())[:300]
    advice = {
        401: f"the token is missing, wrong or expired: {LOG_IN}",
        403: f"the token may not do this: make one with write access to {repo_id.partition('/')[0]}",
        412: "others are changing it at the same time: try again",
        429: "too many requests, for longer than is waited: try again later, what is there is not sent again",
    }
    hint = advice.get(status, "try again later" if status >= 500 else "nothing was changed by this request")
    return HubError(f"the Hub at {endpoint} refused {repo_id} with {status} ({reason}): {hint}")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def _quiet() -> Iterator[None]:
    """No log lines of the Hub's client; no progress bars unless a person watches."""
    verbosity = hub_logging.get_verbosity()
    hide_bars = (
        not sys.stderr.isatty()
        and not are_progress_bars_disabled()
        and constants.HF_HUB_DISABLE_PROGRESS_BARS is None  # the user's own choice stands
    )
    hub_logging.set_verbosity_error()
    if hide_bars:
        disable_progress_bars()
    try:
        yield
    finally:
        hub_logging.set_verbosity(verbosity)
        if hide_bars:
            enable_progress_bars()
