"""A server with a request log and two keys, and what is in its log."""

import json
from pathlib import Path

import httpx

from adapterhub_local.base.bases import read_record
from adapterhub_local.base.load import load_base
from adapterhub_local.data.answer_log import log_files
from adapterhub_local.keys import Keys
from adapterhub_local.registry import Registry
from adapterhub_local.settings import home as home_at
from serve.options import HttpOptions
from tests.serve.adapter_makers import publish
from tests.serve.conftest import TOOL_TEMPLATE, Server

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, "temperature": 0}
PLACE = {"type": "object", "properties": {"place": {"enum": ["Rome", "Oslo"]}}, "required": ["place"]}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": PLACE}}


class Logging:
    """A server with a request log and two keys."""

    def __init__(self, built_base: Path, folder: Path, **options: object) -> None:
        home = home_at(folder / "home")
        registry = Registry(home)
        publish(registry, "alpha", read_record(built_base), seed=1)
        self.token, self.other = (Keys(home).create()[1] for _ in range(2))
        self.key = self.token.split("-")[1]
        base = load_base(read_record(built_base), device="cpu")
        base.tokenizer.chat_template = TOOL_TEMPLATE
        self.folder = folder / "log"
        self.server = Server(base, registry, http=HttpOptions(request_log=self.folder, **options))

    def post(self, path: str, body: dict, token: str | None = None) -> httpx.Response:
        """POST as the first key, or another one."""
        return self.server.http.post(path, json=body, headers={"Authorization": f"Bearer {token or self.token}"})

    def rate(self, answer_id: str, token: str | None = None, **given: object) -> httpx.Response:
        """POST /v1/feedback."""
        return self.post("/v1/feedback", {"id": answer_id, **given}, token)

    def records(self) -> list[dict]:
        """Everything that is in the log once feedback has passed behind it."""
        self.rate("none", rating=1)
        return [json.loads(line) for path in log_files(self.folder) for line in path.read_bytes().splitlines()]
