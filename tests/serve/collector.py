"""An OpenTelemetry collector on the loopback: it takes OTLP over HTTP, and keeps the spans that it decodes."""

import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

from tests.patience import PATIENCE


def plain(value: Any) -> Any:
    """An attribute's value as Python has it."""
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [plain(each) for each in value.array_value.values]
    return getattr(value, kind)


class Collector:
    """Runs inside a `with`. `bodies` are requests as they came, `spans` what is in them, `resources` who sent it."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.spans: list[Any] = []
        self.resources: list[dict[str, Any]] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                collector.take(self.path, self.headers["Content-Type"], body)
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def take(self, path: str, kind: str, body: bytes) -> None:
        """Decode what a client sends."""
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        assert (path, kind) == ("/v1/traces", "application/x-protobuf")
        self.bodies.append(body)
        for group in ExportTraceServiceRequest.FromString(body).resource_spans:
            self.resources.append({each.key: plain(each.value) for each in group.resource.attributes})
            for scope in group.scope_spans:
                self.spans += scope.spans

    def wait(self, trace_id: str, count: int) -> list[Any]:
        """The spans of a trace, once there are so many."""
        deadline = time.monotonic() + PATIENCE
        while len(found := [each for each in self.spans if each.trace_id.hex() == trace_id]) < count:
            assert time.monotonic() < deadline, [each.name for each in found]
            time.sleep(0.02)
        assert len(found) == count, [each.name for each in found]
        return found

    def __enter__(self) -> "Collector":
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def attributes(span: Any) -> dict[str, Any]:
    """What a span says."""
    return {each.key: plain(each.value) for each in span.attributes}
