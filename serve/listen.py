"""Listen: an address or a socket to bind, who can reach it, and how uvicorn serves there. Loads no torch."""

import ipaddress
import logging
import os
import socket
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI

from adapterhub_local.errors import InputError
from adapterhub_local.keys import Keys
from adapterhub_local.settings import Home
from serve.http.connections import ImpatientProtocol
from serve.http.front import JsonLines

GRACE_SECONDS = 10  # for answers that were ended to reach their clients
KEEP_ALIVE_SECONDS = 60  # longer than clients keep idle connections, or they send into one that is being closed


def check_reachable(host: str, port: int, home: Home) -> bool:
    """Whether keys are required: where others reach `host`. Raises InputError if there is none then."""
    if is_loopback(host):
        return False
    resolve(host, port)  # a name that means nothing is reported as such
    if not any(key.is_valid() for key in Keys(home).all()):
        raise InputError(
            f"{host} can be reached by others, and there is no API key: make one with `qhub key create`, "
            "or listen on 127.0.0.1"
        )
    return True


def http_config(app: FastAPI, **settings: Any) -> uvicorn.Config:
    """How the product listens; `settings` are uvicorn's own, such as a port."""
    usual: dict[str, Any] = {"timeout_graceful_shutdown": 2 * GRACE_SECONDS, "proxy_headers": False}
    return uvicorn.Config(
        app,
        http=ImpatientProtocol,
        log_level="warning",
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        **(usual | settings),
    )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`. A name counts by all addresses it has."""
    try:
        found = {entry[4][0] for entry in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
        return all(ipaddress.ip_address(str(address).partition("%")[0]).is_loopback for address in found)
    except (OSError, UnicodeError):
        return False


def log_json(*, access: bool) -> None:
    """What the server logs, as JSON lines on standard error; `access`: one for each request, too."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    levels = {
        "serve": logging.WARNING,
        "serve.access": logging.INFO if access else logging.WARNING,
        "opentelemetry": logging.WARNING,  # that a collector of traces is away
    }
    for name, level in levels.items():
        log = logging.getLogger(name)
        log.handlers, log.propagate = [handler], False
        log.setLevel(level)


def resolve(host: str, port: int) -> tuple[socket.AddressFamily, socket.SocketKind, int, tuple[Any, ...]]:
    """Family, kind, protocol and address to bind. Raises InputError if `host` has no address."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"'{host}' has no address ({reason}): give another with --host") from None
    return family, kind, protocol, address


def listen(host: str, port: int) -> socket.socket:
    """A bound socket. Raises InputError if the address cannot be used."""
    family, kind, protocol, address = resolve(host, port)
    try:
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        reason = error.strerror or error
        raise InputError(
            f"cannot listen on {host} port {port} ({reason}): choose another with --host and --port"
        ) from None
    return listener


def listen_at(path: Path) -> socket.socket:
    """A bound unix socket that this user alone may connect to. Raises InputError if the path cannot be used."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if path.is_socket() and not _is_answered(path):
            path.unlink()  # left by a server that was killed
        mask = os.umask(0o177)
        try:
            listener.bind(str(path))
        finally:
            os.umask(mask)
    except OSError as error:
        listener.close()
        raise InputError(f"cannot listen at {path} ({error.strerror or error}): choose another with --uds") from None
    return listener


def _is_answered(path: Path) -> bool:
    """Whether somebody listens at a unix socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        try:
            client.connect(str(path))
        except ConnectionRefusedError:
            return False
    return True


def shown_host(host: str) -> str:
    return f"[{host}]" if ":" in host else host
