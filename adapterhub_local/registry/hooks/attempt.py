"""One attempt to notify a hook: a POST or a command, ended at its timeout whatever the other side does."""

import hashlib
import hmac
import os
import signal
import subprocess
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from adapterhub_local.registry.config import Hook
from adapterhub_local.settings import Home, environment_in

MAX_OUTPUT = 500  # characters of a hook's answer or output that are kept


class Failed(Exception):
    """The hook did not accept the change; the message is one line with the reason."""


def attempt(home: Home, hook: Hook, headers: Mapping[str, str], body: bytes) -> str:
    """Give a hook the body; returns its reply. Raises Failed, after `hook.timeout` seconds at the latest."""
    signed = {**headers, **_signature(home, hook, body)}
    return _post(hook, signed, body) if hook.url is not None else _run(home, hook, signed, body)


def _signature(home: Home, hook: Hook, body: bytes) -> dict[str, str]:
    """As GitHub signs what it posts."""
    if hook.secret_file is None:
        return {}
    try:
        secret = (home.root / os.path.expanduser(hook.secret_file)).read_bytes().strip()
    except OSError as error:
        raise Failed(f"secret_file {hook.secret_file} cannot be read: {error.strerror}") from None
    return {"X-Hub-Signature-256": "sha256=" + hmac.new(secret, body, hashlib.sha256).hexdigest()}


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """A signed body goes nowhere else."""


def _post(hook: Hook, headers: Mapping[str, str], body: bytes) -> str:
    assert hook.url is not None
    named = {"Content-Type": "application/json", "User-Agent": "qhub-hook", **headers}
    request = urllib.request.Request(hook.url, body, named, method="POST")  # noqa: S310 - http or https
    try:
        with _ended_after(hook.timeout):
            opener = urllib.request.build_opener(_NoRedirect)
            with opener.open(request, timeout=hook.timeout) as answer:
                answer.read(MAX_OUTPUT)
                return f"HTTP {answer.status}"
    except urllib.error.HTTPError as error:
        error.close()
        raise Failed(f"HTTP {error.code}") from None
    except TimeoutError:
        raise Failed(f"no answer within {hook.timeout:g} s") from None
    except Exception as error:  # whatever a hostile answer makes the client raise
        reason = getattr(error, "reason", error)
        if isinstance(reason, TimeoutError):
            raise Failed(f"no answer within {hook.timeout:g} s") from None
        raise Failed(f"{type(reason).__name__}: {reason}"[:MAX_OUTPUT]) from None


@contextmanager
def _ended_after(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block after this many seconds: a socket's own timeout restarts with every byte."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _run(home: Home, hook: Hook, headers: Mapping[str, str], body: bytes) -> str:
    own = {name.upper().replace("-", "_").removeprefix("X_"): value for name, value in headers.items()}
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as output:
        given.write(body)
        given.seek(0)
        try:
            process = subprocess.Popen(
                hook.command, stdin=given, stdout=output, stderr=output, cwd=home.root, start_new_session=True,
                env=environment_in(home) | own,
            )  # fmt: skip
        except (OSError, ValueError) as error:
            raise Failed(f"{hook.command[0]}: {getattr(error, 'strerror', None) or error}") from None
        try:
            process.wait(hook.timeout)
        except subprocess.TimeoutExpired:
            raise Failed(f"it did not end within {hook.timeout:g} s") from None
        finally:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)  # what it started ends with it
            process.wait()
        size = output.seek(0, os.SEEK_END)
        output.seek(max(0, size - MAX_OUTPUT))
        words = " ".join(output.read().decode(errors="replace").split())
    if process.returncode:
        raise Failed(f"it ended with {process.returncode}{f': {words}' if words else ''}")
    return words or "ended with 0"
