"""HttpOptions: what the server demands of its clients, and how long it waits for them."""

import ipaddress
import re
from dataclasses import dataclass
from pathlib import Path

from adapterhub_local.errors import InputError
from adapterhub_local.options import check_options, option

MAX_TERMS = 16  # adapters of a mix: each adds its rank to what every token is multiplied with


@dataclass(frozen=True)
class HttpOptions:
    """Limits on requests; each is checked here. The option of a field explains it; the others:

    body_timeout    seconds in which a body must have come
    send_timeout    seconds in which a client must have taken what it was sent
    require_keys    refuse requests without an API key even if there is no key
    """

    max_body: int = option(4 << 20, "The largest body of a request.", low=1, unit="B", live=True)
    max_tokens: int | None = option(
        None, "Most tokens of an answer.", low=1, derived="what the context holds", live=True
    )
    timeout: float = option(600.0, "Seconds a request may take, waiting included.", above=0, live=True)
    body_timeout: float = 30.0
    send_timeout: float = 30.0
    lora_root: Path | None = option(
        None, "Folder below which /v1/load_lora_adapter may read.", derived="none: it loads from the registry alone"
    )
    pins: tuple[str, ...] = option(
        (), "Keep this adapter in memory and in a slot from the start.", "--pin", metavar="REF"
    )
    origins: tuple[str, ...] = option(
        (),
        "Origin whose web pages may ask (CORS), such as http://localhost:3000, or * for all.",
        "--allow-origin",
        metavar="ORIGIN",
    )
    stored_responses: int = option(
        1000,
        "Answers of /v1/responses that are stored in memory, each for an hour, for requests that refer to them by id; "
        "0 stores none.",
        low=0,
        live=True,
    )
    request_log: Path | None = option(
        None,
        "Folder to log answers to chats in, with their whole conversations, if their requests ask for it by store = "
        "true; POST /v1/feedback then rates them, and `qhub data from-log` makes training data of both. Only this user "
        "can read it.",
        metavar="FOLDER",
        derived="nothing of any request is written",
    )
    request_log_all: bool = option(
        False, "Log the answers to all chats, whether their requests ask for it or not: let your users know.", live=True
    )
    request_log_size: int = option(
        256 << 20, "The most that the log holds: then its oldest file goes.", low=8 << 20, unit="B"
    )
    share_prefixes: bool = option(
        False,
        "Let API keys share the computed beginnings of prompts: it saves time, but how long an answer takes then shows "
        "how others' prompts begin.",
        live=True,
    )
    hosts: tuple[str, ...] = option(
        (),
        "Without API keys, also answer to this host name, besides localhost and loopback addresses.",
        "--allow-host",
        metavar="NAME",
    )
    drain: float = option(
        10.0, "Seconds that running answers may take to finish when the server stops.", low=0, live=True
    )
    notice: float = option(
        0.0,
        "Seconds in which /ready reports that the server stops while it still takes requests, for a balancer to see.",
        low=0,
        live=True,
    )
    replica: str | None = option(
        None, "Name of this server among several, in the header X-Qhub-Replica of each answer.", derived="no header"
    )
    root_path: str = option(
        "",
        "Path below which a proxy shows this server, such as /llm; requests come with it or without.",
        metavar="PATH",
    )
    forwarded: tuple[str, ...] = option(
        (),
        "Trust X-Forwarded-For and X-Forwarded-Proto of a proxy at this address or network.",
        "--trust-proxy",
        metavar="ADDRESS",
    )
    limits: str | None = option(
        None,
        "Share the limits of API keys among all servers with this Redis, such as redis://10.0.0.5:6379/0. Its password "
        "is read from QHUB_REDIS_PASSWORD or REDISCLI_AUTH.",
        metavar="URL",
        derived="each server counts for itself",
    )
    router: str | None = option(
        None,
        "Router that chooses the adapter where a request's model is auto, such as router@prod.",
        derived="none: auto is not a model",
        metavar="REF",
    )
    router_threshold: float | None = option(
        None,
        "The least probability with which it chooses an adapter; below it the base answers.",
        low=0,
        derived="what the router was made with",
    )
    router_allows: tuple[str, ...] = option(
        (),
        "Names that it may choose, such as 'team/*', among those that a key may ask.",
        "--router-allow",
        metavar="PATTERN",
    )
    otlp: str | None = option(
        None,
        "Send traces of requests to this OpenTelemetry collector, by OTLP over HTTP, such as http://127.0.0.1:4318.",
        metavar="URL",
        derived="OTEL_EXPORTER_OTLP_ENDPOINT, or none",
    )
    require_keys: bool = False

    def __post_init__(self) -> None:
        check_options(self)
        for name in ("body_timeout", "send_timeout"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} is {getattr(self, name)}: it must be more than 0")
        if self.request_log is None and self.request_log_all:
            raise InputError("--request-log-all says what is logged: give --request-log FOLDER, where to")
        if self.router is None and (self.router_threshold is not None or self.router_allows):
            raise InputError("--router-threshold and --router-allow are of a router: give --router NAME")
        if self.router_threshold is not None and self.router_threshold > 1:
            raise InputError(f"router_threshold is {self.router_threshold}: a probability is at most 1")
        for origin in self.origins:
            if origin != "*" and not re.fullmatch(r"https?://[^/\s?#]+", origin):
                raise InputError(f"'{origin}' is not an origin of web pages: write https://example.org, no path, or *")
        if self.root_path and not re.fullmatch(r"(/[A-Za-z0-9._~-]+)+", self.root_path):
            raise InputError(f"'{self.root_path}' is not a root path: write /llm, without a slash at the end")
        if self.replica is not None and not re.fullmatch(r"[A-Za-z0-9._:-]{1,128}", self.replica):
            raise InputError(f"'{self.replica}' cannot be a replica's name: use letters, digits, '.', '_', ':' and '-'")
        for address in self.forwarded:
            try:
                ipaddress.ip_network(address, strict=False)
            except ValueError:
                raise InputError(f"'{address}' is not an address or network: write 10.0.0.7 or 10.0.0.0/8") from None
        for host in self.hosts:
            if not re.fullmatch(r"\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+", host):
                raise InputError(f"'{host}' is not the name of a host: write it without scheme and port")
        if self.otlp is not None and (wrong := otlp_problem(self.otlp)):
            raise InputError(f"--otlp, or OTEL_EXPORTER_OTLP_ENDPOINT: {wrong}")
        if self.lora_root is not None and not self.lora_root.is_dir():
            raise InputError(f"{self.lora_root} is not a folder: adapters could not be loaded from there")


def otlp_problem(url: str) -> str | None:
    """What is wrong with the address of a collector of traces; it is not repeated, since it may hold a password."""
    if re.fullmatch(r"https?://[^/\s?#@]+(/[^\s?#]*)?", url):
        return None
    return (
        "this is not the address of a collector: write http://HOST:4318, credentials go into OTEL_EXPORTER_OTLP_HEADERS"
    )
