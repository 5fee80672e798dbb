"""Traces: what a collector gets of each request, whose child it is, and that none is needed for an answer."""

import ast
import json
import logging
import secrets
import socket
import sys
import time
from collections.abc import Iterator

import pytest

from adapterhub_local import settings
from adapterhub_local.base.bases import read_record
from adapterhub_local.base.load import load_base
from adapterhub_local.errors import InputError
from adapterhub_local.keys import Keys
from adapterhub_local.registry import Registry
from serve.__main__ import command
from serve.listen import log_json
from serve.options import HttpOptions
from serve.traces import with_collector
from tests.patience import PATIENCE
from tests.serve.adapter_makers import publish
from tests.serve.collector import Collector, attributes
from tests.serve.conftest import Server
from tests.test_layout import SOURCES

pytest.importorskip("opentelemetry.sdk", reason="no OpenTelemetry: pip install -e '.[otel]'")
pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="no OTLP exporter: pip install -e '.[otel]'")

STAGES = ["prepare", "queue", "prefill", "decode"]
SECRET = "Xylophone"  # of a prompt
ERROR, UNSET = 2, 0


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    """A collector that servers send to soon."""
    with pytest.MonkeyPatch.context() as patch, Collector() as running:
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
        yield running


@pytest.fixture(scope="module")
def traced(built_base, collector: Collector, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that sends traces, and wants keys."""
    registry = Registry(tmp_path_factory.mktemp("traced"))
    base = read_record(built_base)
    publish(registry, "alpha", base, seed=1, rank=4)
    http = HttpOptions(otlp=collector.url, replica="r1", timeout=PATIENCE)
    running = Server(load_base(base, device="cpu"), registry, http=http)
    key, token = Keys(registry.home).create(adapters=("alpha",))
    running.key = key
    running.http.headers["Authorization"] = f"Bearer {token}"
    yield running
    running.stop()


def parent(is_sampled: bool = True) -> tuple[str, str, dict[str, str]]:
    """Ids of a trace and of a span of who asks, and the header that says so."""
    trace, span = secrets.token_hex(16), secrets.token_hex(8)
    return trace, span, {"traceparent": f"00-{trace}-{span}-0{int(is_sampled)}", "tracestate": "who=me"}


@pytest.mark.parametrize("is_streamed", [False, True])
def test_an_answer_is_a_span_with_its_stages(traced: Server, collector: Collector, is_streamed: bool) -> None:
    """It is a child of the caller's span; it has who asked which weights for how much, and no text; what it waited
    for lies inside it, one after the other."""
    trace, above, headers = parent()
    body = {"model": "alpha", "prompt": SECRET, "max_tokens": 6, "ignore_eos": True, "stream": is_streamed}
    answer = traced.http.post("/v1/completions", json=body, headers={**headers, "X-Request-Id": "one"})
    assert answer.status_code == 200
    spans = {each.name: each for each in collector.wait(trace, 5)}
    root = spans.pop("POST /v1/completions")
    assert (root.parent_span_id.hex(), root.kind, root.trace_state) == (above, 2, "who=me")
    version = traced.registry.resolve("alpha")
    assert attributes(root) == {
        "http.request.method": "POST",
        "http.route": "/v1/completions",
        "url.path": "/v1/completions",
        "http.response.status_code": 200,
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "qhub",
        "gen_ai.request.model": "alpha",
        "gen_ai.response.model": "alpha@1",
        "gen_ai.response.finish_reasons": ["length"],
        "gen_ai.usage.input_tokens": len(SECRET),
        "gen_ai.usage.output_tokens": 6,
        "qhub.adapter": "alpha@1",
        "qhub.adapter_digest": version.content_digest,
        "qhub.key_id": traced.key.id,
        "qhub.request_id": "one",
    }
    assert root.status.code == UNSET
    assert sorted(spans) == sorted(STAGES)
    edges = [root.start_time_unix_nano]
    for name in STAGES:
        assert spans[name].parent_span_id == root.span_id
        edges += [spans[name].start_time_unix_nano, spans[name].end_time_unix_nano]
    assert edges == sorted(edges)
    assert edges[-1] <= root.end_time_unix_nano
    assert not any(SECRET.encode() in body for body in collector.bodies)
    assert {"service.name": "qhub", "service.instance.id": "r1"}.items() <= collector.resources[-1].items()


def test_who_does_not_trace_is_not_traced(traced: Server, collector: Collector) -> None:
    """A caller whose span is not sampled gets none below it; the one after it, who traces, does."""
    quiet, _, unsampled = parent(is_sampled=False)
    loud, _, sampled = parent()
    for headers in (unsampled, sampled):
        traced.http.post("/v1/completions", json={"model": "alpha", "prompt": "Hi", "max_tokens": 1}, headers=headers)
    collector.wait(loud, 4)  # one token: there is nothing to decode
    assert not [each for each in collector.spans if each.trace_id.hex() == quiet]


@pytest.mark.parametrize(
    "header", [None, "", "00", f"00-{'0' * 32}-{'1' * 16}-01", f"ff-{'a' * 32}-{'b' * 16}-01", "x" * 5000, "é"]
)
def test_a_trace_begins_here_without_a_caller_who_can_be_read(
    traced: Server, collector: Collector, header: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    """What is not a traceparent is ignored; the log names the trace that begins."""
    headers = {"traceparent": header.encode()} if header is not None else {}
    with caplog.at_level(logging.INFO, "serve.access"):
        body = {"model": "alpha", "prompt": "Hi", "max_tokens": 1}
        assert traced.http.post("/v1/completions", json=body, headers=headers).status_code == 200
        deadline = time.monotonic() + PATIENCE
        while not (logged := [each.fields["trace_id"] for each in caplog.records if hasattr(each, "fields")]):
            assert time.monotonic() < deadline  # the line is written when the answer was sent
            time.sleep(0.01)
    assert [each.name for each in collector.wait(logged[-1], 4) if not each.parent_span_id] == ["POST /v1/completions"]


@pytest.mark.parametrize(
    ("path", "body", "token", "status", "model"),
    [
        ("/v1/completions", {"model": "alpha", "prompt": "Hi"}, "qhub-none", 401, None),
        ("/v1/completions", {"model": "tiny", "prompt": "Hi"}, None, 403, "tiny"),
        ("/v1/completions", {"model": "alpha", "prompt": SECRET, "max_tokens": "many"}, None, 400, None),
        ("/v1/chat/completions", {"model": "alpha@9", "messages": [{"role": "user", "content": "Hi"}]}, None, 404,
         "alpha@9"),
        ("/tokenize", {"prompt": "Hi"}, None, 200, None),
    ],
)  # fmt: skip
def test_what_is_refused_is_a_span_too(
    traced: Server, collector: Collector, path: str, body: dict, token: str | None, status: int, model: str | None
) -> None:
    """One span with the status; a client's mistake is not an error of the server."""
    trace, _, headers = parent()
    headers |= {"Authorization": f"Bearer {token}"} if token is not None else {}
    assert traced.http.post(path, json=body, headers=headers).status_code == status
    (span,) = collector.wait(trace, 1)
    found = attributes(span)
    assert (found["http.response.status_code"], found.get("gen_ai.request.model")) == (status, model)
    assert span.status.code == UNSET
    assert "error.type" not in found


def test_an_answer_that_breaks_off_is_an_error(
    traced: Server, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its status was 200 long before; the span says what came of it."""
    trace, _, headers = parent()
    traced.slow_down(monkeypatch)
    body = {"model": "alpha", "prompt": "Hi", "max_tokens": 90, "ignore_eos": True, "stream": True}
    with traced.http.stream("POST", "/v1/completions", json=body, headers=headers) as response:
        lines = response.iter_lines()
        next(lines)
        monkeypatch.setattr(traced.service.engine, "step", traced.service.engine.fail_all)
        list(lines)
    (root,) = [each for each in collector.wait(trace, 5) if each.name.startswith("POST")]
    found = attributes(root)
    assert root.status.code == ERROR
    assert (found["http.response.status_code"], found["error.type"]) == (200, "500")
    assert found["gen_ai.response.finish_reasons"] == ["abort"]


def test_what_only_looks_is_not_traced(traced: Server, collector: Collector) -> None:
    """Probes, scrapes and lists leave no spans: they come every few seconds, and say nothing."""
    before, (after, _, headers) = parent(), parent()
    for path in ("/health", "/ready", "/metrics", "/v1/models", "/nothing"):
        traced.http.get(path, headers=before[2])
    traced.http.post("/tokenize", json={"prompt": "Hi"}, headers=headers)
    collector.wait(after, 1)
    assert not [each for each in collector.spans if each.trace_id.hex() == before[0]]


@pytest.mark.parametrize("kind", ["nobody listens", "nobody answers", "refuses"])
def test_a_collector_that_is_away_harms_nobody(
    kind: str, built_base, served_registry: Registry, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers come as always, more than the queue of spans holds, and the server ends without waiting for long."""
    monkeypatch.setattr("serve.traces.CLOSE_SECONDS", 0.1)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "8")
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "8")
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        if kind == "nobody answers":
            silent.listen(1)
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        if kind == "refuses":  # its address is that of something else
            url = server.url
        running = Server(load_base(read_record(built_base), device="cpu"), served_registry, http=HttpOptions(otlp=url))
        try:
            statuses = [running.complete(model="alpha", prompt="Hi", max_tokens=2).status_code for _ in range(10)]
        finally:
            running.stop()
    assert statuses == [200] * 10


def test_what_the_exporter_says_is_in_the_log(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """That a collector is away is a JSON line as all others."""
    for name in ("serve", "serve.access", "opentelemetry"):
        log = logging.getLogger(name)
        for attribute in ("handlers", "propagate", "level"):
            monkeypatch.setattr(log, attribute, getattr(log, attribute))
    log_json(access=True)
    logging.getLogger("opentelemetry.exporter.otlp.proto.http.trace_exporter").warning("it is %s", "away")
    assert json.loads(capsys.readouterr().err)["message"] == "it is away"


def test_without_the_extra_the_option_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is loaded, with what to install; that a variable names a collector is only noted."""
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk", None)  # as if it were not installed
    with pytest.raises(InputError, match=r"pip install 'adapterhub-local\[otel\]'") as refused:
        command(["--otlp", "http://127.0.0.1:4318", "--base", "nothing"], standalone_mode=False)
    assert refused.value.exit_code == 2
    assert with_collector(HttpOptions()) == (HttpOptions(), None)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4318")
    options, note = with_collector(HttpOptions())
    assert options.otlp is None
    assert note is not None
    assert note.startswith("OTEL_EXPORTER_OTLP_ENDPOINT is set, but no traces are sent: OpenTelemetry is not installed")
    monkeypatch.undo()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4318")
    assert with_collector(HttpOptions()) == (HttpOptions(otlp="http://127.0.0.1:4318"), None)


@pytest.mark.parametrize(
    ("environment", "endpoint"),
    [
        ({}, None),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a:4318"}, "http://a:4318"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": ""}, None),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://b"}, "http://b"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a", "OTEL_SDK_DISABLED": "TRUE"}, None),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a", "OTEL_TRACES_EXPORTER": "none"}, None),
    ],
)
def test_the_variables_of_opentelemetry(
    environment: dict[str, str], endpoint: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The collector is the one that they name, unless they switch traces off."""
    for name in ("ENDPOINT", "TRACES_ENDPOINT"):
        monkeypatch.delenv(f"OTEL_EXPORTER_OTLP_{name}", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert settings.otlp_endpoint() == endpoint


@pytest.mark.parametrize(
    "url", ["collector:4318", "grpc://a:4317", "http://", "http://me:secret@a:4318", "http://a/?k=1"]
)
def test_addresses_that_are_none(url: str) -> None:
    """They are refused without being repeated."""
    with pytest.raises(InputError, match="not the address of a collector") as refused:
        HttpOptions(otlp=url)
    assert "secret" not in str(refused.value)


def test_nothing_of_opentelemetry_is_loaded_without_the_option() -> None:
    """No module of ours imports it when it is imported itself."""
    for path in SOURCES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        assert "opentelemetry" not in json.dumps([ast.unparse(node) for node in names]), path
