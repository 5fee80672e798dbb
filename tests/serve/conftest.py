"""A tiny real NF4 base, adapters published to a real registry, and a real server on the loopback."""

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from adapterhub_local.base.bases import read_record
from adapterhub_local.base.load import LoadedBase, load_base
from adapterhub_local.registry import Registry
from serve.engine.options import EngineOptions
from serve.http.app import create_app
from serve.options import HttpOptions
from serve.server import DrainingServer, http_config
from serve.service import Service
from serve.services import Services
from tests.patience import PATIENCE
from tests.serve.adapter_makers import served_registry

__all__ = ["served_registry"]

OPTIONS = EngineOptions(max_rows=8, tokens_per_step=64, queue_limit=32)

# In the manner of Qwen 2.5: tools in the system's turn, calls and results in tags.
TOOL_TEMPLATE = (
    "{%- if tools %}<|im_start|>system\nYou may call:{% for tool in tools %}\n{{ tool | tojson }}{% endfor %}\n"
    "Answer with <tool_call>{...}</tool_call><|im_end|>\n{% endif -%}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    '{% for call in message.tool_calls or [] %}<tool_call>\n{"name": "{{ call.function.name }}", '
    '"arguments": {{ call.function.arguments | tojson }}}\n</tool_call>{% endfor %}<|im_end|>\n{% endfor %}'
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class Server:
    """A running server, the registry it asks and clients for it."""

    def __init__(
        self,
        base: LoadedBase | Sequence[LoadedBase],
        registry: Registry,
        *,
        http: HttpOptions | None = None,
        options: EngineOptions = OPTIONS,
    ) -> None:
        self.registry = registry
        self.health_headers: dict[str, str] = {}  # where keys are needed, one that may see the engine's numbers
        http = replace(http or HttpOptions(), drain=0.2)
        app = create_app(base, registry=registry, options=options, http=http)
        self.services: Services = app.state.services
        self.service: Service = self.services.first
        self._uvicorn = DrainingServer(http_config(app, port=0), self.services, lambda: None)
        self._thread = threading.Thread(target=self._uvicorn.run, daemon=True)
        self._thread.start()
        while not self._uvicorn.started:
            assert self._thread.is_alive()
            time.sleep(0.01)
        port = self._uvicorn.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.http = httpx.Client(base_url=self.url, timeout=PATIENCE, trust_env=False)
        self.client = openai.OpenAI(
            base_url=f"{self.url}/v1", api_key="none", max_retries=0, http_client=httpx.Client(trust_env=False)
        )

    def complete(self, **body) -> httpx.Response:
        """POST /v1/completions, greedy and short unless said otherwise."""
        return self.http.post("/v1/completions", json={"max_tokens": 8, "temperature": 0, **body})

    def samples(self) -> dict[tuple, float]:
        """Every value of /metrics, by its name and the values of its labels in order."""
        return {
            (sample.name, *sorted(sample.labels.values())): sample.value
            for family in text_string_to_metric_families(self.http.get("/metrics").text)
            for sample in family.samples
        }

    def slow_down(self, monkeypatch: pytest.MonkeyPatch, seconds: float = 0.05) -> None:
        """Give each step of the engine time for other things to happen in: a tiny model may have said all before."""
        step = self.service.engine.step

        def slow() -> object:
            time.sleep(seconds)
            return step()

        monkeypatch.setattr(self.service.engine, "step", slow)

    def wait_until_idle(self) -> dict:
        """The engine's numbers once nothing runs, waits or is held."""
        deadline = time.monotonic() + PATIENCE
        while True:
            numbers = self.http.get("/health", headers=self.health_headers).json()["engine"]
            if not numbers["running"] and not numbers["waiting"]:
                return numbers
            assert time.monotonic() < deadline, numbers
            time.sleep(0.01)

    def begin_stop(self) -> None:
        """What a signal does."""
        self._uvicorn.should_exit = True

    def stop(self) -> None:
        self.http.close()
        self.client.close()
        self.begin_stop()
        self._thread.join(20)
        assert not self._thread.is_alive()


@pytest.fixture(scope="session")
def loaded_base(built_base: Path) -> LoadedBase:
    """The tiny base in float32, for what is to be compared with: nothing of the server touches it."""
    return load_base(read_record(built_base), device="cpu")


@pytest.fixture(scope="session")
def server(built_base: Path, served_registry: Registry) -> Iterator[Server]:
    """A server for all tests of the session; those that publish use names of their own."""
    running = Server(load_base(read_record(built_base), device="cpu"), served_registry)
    yield running
    running.stop()


@pytest.fixture(scope="session")
def tool_server(built_base: Path, served_registry: Registry) -> Iterator[Server]:
    """A server whose base's chat template has tools."""
    base = load_base(read_record(built_base), device="cpu")
    base.tokenizer.chat_template = TOOL_TEMPLATE
    running = Server(base, served_registry)
    yield running
    running.stop()
