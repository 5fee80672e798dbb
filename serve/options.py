"""HttpOptions: what the server demands of its clients, and how long it waits for them."""

import re
from dataclasses import dataclass
from pathlib import Path

from adapterhub_local.errors import InputError


@dataclass(frozen=True)
class HttpOptions:
    """Limits on requests; each is checked here.

    max_body        bytes of a request's body
    max_tokens      tokens of one answer; None: what the context has room for
    timeout         seconds that a request may take, waiting included
    body_timeout    seconds in which a body must have come
    send_timeout    seconds in which a client must have taken what it was sent
    lora_root       the folder below which `/v1/load_lora_adapter` may read; None: it loads from the registry alone
    pins            references of adapters that are in memory and in a slot from the start, and stay there
    origins         web pages that may ask from a browser, as https://example.org; * for all
    require_keys    refuse requests without an API key even if there is no key
    """

    max_body: int = 4 << 20
    max_tokens: int | None = None
    timeout: float = 600.0
    body_timeout: float = 30.0
    send_timeout: float = 30.0
    lora_root: Path | None = None
    pins: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    require_keys: bool = False

    def __post_init__(self) -> None:
        for name in ("max_body", "max_tokens", "timeout", "body_timeout", "send_timeout"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise InputError(f"{name} is {value}: it must be more than 0")
        for origin in self.origins:
            if origin != "*" and not re.fullmatch(r"https?://[^/\s?#]+", origin):
                raise InputError(f"'{origin}' is no origin of web pages: write https://example.org, no path, or *")
        if self.lora_root is not None and not self.lora_root.is_dir():
            raise InputError(f"{self.lora_root} is no folder: adapters could not be loaded from there")
