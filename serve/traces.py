"""Traces: a span for each request for an answer, with what it waited for, sent to an OpenTelemetry collector.

The spans are made when the request has ended, and sent in the background: a collector that is away costs spans, which
are dropped beyond a bound, and never an answer. Nothing of prompts or answers is in them. Needs the extra `otel`.
"""

import logging
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

from adapterhub_local.errors import InputError
from adapterhub_local.settings import otlp_endpoint
from serve.course import Course
from serve.options import HttpOptions

logger = logging.getLogger(__name__)
HOW = (
    "OpenTelemetry is not installed, which traces need: pip install 'adapterhub-local[otel]' in the environment of "
    "qhub, or leave out --otlp"
)
PATH = "/v1/traces"  # where collectors take them, below the address that is given
CLIENT_LEFT = 499  # as the log has it
CLOSE_SECONDS = 3.0  # for what has not been sent when the server stops
OPERATIONS = {  # as the semantic conventions for generative AI have them
    "/v1/chat/completions": "chat",
    "/v1/messages": "chat",
    "/v1/responses": "chat",
    "/api/chat": "chat",
    "/v1/completions": "text_completion",
    "/api/generate": "text_completion",
    "/v1/embeddings": "embeddings",
}


def has_packages() -> bool:
    """Whether the extra is installed."""
    try:
        return all(find_spec(f"opentelemetry.{name}") for name in ("sdk", "exporter.otlp.proto.http"))
    except ModuleNotFoundError:  # not even the packages around them
        return False


def with_collector(http: HttpOptions) -> tuple[HttpOptions, str | None]:
    """The options with the collector that the environment names, if they name none; and what a user should know.

    Raises InputError if they name one and the extra is not installed. If only a variable names one, the server starts
    without it: machines have such variables for all their programs.
    """
    if http.otlp is not None and not has_packages():
        raise InputError(HOW)
    endpoint = otlp_endpoint()
    if http.otlp is not None or endpoint is None:
        return http, None
    if not has_packages():
        return http, f"OTEL_EXPORTER_OTLP_ENDPOINT is set, but no traces are sent: {HOW.partition(', or')[0]}"
    return replace(http, otlp=endpoint), None


class Span:
    """A request that is being traced. `traceparent` is for who does a part of the work, empty where all is off."""

    def __init__(self, span: Any, context: Any, traceparent: str, started: float, offset: int) -> None:
        self.traceparent = traceparent
        self.trace_id: str = f"{span.get_span_context().trace_id:032x}"
        self._span = span
        self._context = context  # of what is inside it
        self._started = started  # on the monotonic clock
        self._offset = offset  # from there to the epoch, in ns

    def end(self, tracer: Any, course: Course, status: int, about: Mapping[str, Any]) -> None:
        """See `Traces.end`."""
        if not self._span.is_recording():
            return
        for name, begin, until in stages(course, self._started):
            part = tracer.start_span(name, self._context, start_time=_epoch(begin, self._offset))
            part.end(_epoch(until, self._offset))
        failed = course.failed or status or CLIENT_LEFT
        self._span.set_attributes({**about, **attributes(course), "http.response.status_code": status or CLIENT_LEFT})
        if failed >= 500:
            from opentelemetry.trace import StatusCode

            self._span.set_attribute("error.type", str(failed))
            self._span.set_status(StatusCode.ERROR)
        self._span.end()


class Traces:
    """What is sent to one collector."""

    def __init__(self, url: str, replica: str | None = None) -> None:
        """`url`: the collector's address, with or without the path for traces. `replica`: the name of this server.

        Raises InputError if the extra is not installed.
        """
        if not has_packages():
            raise InputError(HOW)
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        own = {"service.name": "qhub", **({"service.instance.id": replica} if replica is not None else {})}
        found = Resource.create()  # what OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES say goes first
        if str(found.attributes.get("service.name", "")).startswith("unknown_service"):
            resource = found.merge(Resource(own))
        else:
            resource = Resource(own).merge(found)
        endpoint = url if url.endswith(PATH) else url.rstrip("/") + PATH
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
        self._tracer = self._provider.get_tracer("adapterhub-local")
        self._propagator = TraceContextTextMapPropagator()

    def begin(self, method: str, path: str, headers: Mapping[str, str], started: float) -> Span:
        """A request came when it `started`, of time.monotonic(): its span is a child of the one in its headers, and
        sent if that is."""
        from opentelemetry.trace import SpanKind, set_span_in_context

        offset = time.time_ns() - time.monotonic_ns()
        about = {"http.request.method": method, "http.route": path, "url.path": path}
        if (operation := OPERATIONS.get(path)) is not None:
            about |= {"gen_ai.operation.name": operation, "gen_ai.provider.name": "qhub"}
        above = self._propagator.extract(headers)
        span = self._tracer.start_span(
            f"{method} {path}", above, SpanKind.SERVER, about, start_time=_epoch(started, offset)
        )
        inside = set_span_in_context(span, above)
        carrier: dict[str, str] = {}
        self._propagator.inject(carrier, inside)
        return Span(span, inside, carrier.get("traceparent", ""), started, offset)

    def end(self, span: Span, course: Course, status: int, about: Mapping[str, Any]) -> None:
        """It has ended: `status` as it was answered, 0 if the client left before; `about` are more attributes."""
        span.end(self._tracer, course, status, about)

    def close(self) -> None:
        """Send what is left, for a moment. Blocks: not for the event loop."""
        ending = threading.Thread(target=self._provider.shutdown, name="traces", daemon=True)
        ending.start()
        ending.join(CLOSE_SECONDS)
        if ending.is_alive():
            logger.warning("the collector took too long for the last traces: they are dropped")


def _epoch(seconds: float, offset: int) -> int:
    return int(seconds * 1e9) + offset


def stages(course: Course, started: float) -> Iterator[tuple[str, float, float]]:
    """What a request went through, each with begin and end: as far as it came."""
    times = (
        ("prepare", course.ready),  # name looked up, prompt read, adapter in memory
        ("queue", course.begun),
        ("prefill", course.first),
        ("decode", course.last),
    )
    begin = started
    for name, until in times:
        if until is None or (name == "decode" and course.last == course.first):
            return
        yield name, begin, max(begin, until)
        begin = max(begin, until)


def attributes(course: Course) -> dict[str, Any]:
    """What is known of a request, by the semantic conventions for generative AI, and by names of ours."""
    found: dict[str, Any] = {}
    if course.model:
        found["gen_ai.request.model"] = course.model
    if course.label is not None:
        found["gen_ai.response.model"] = course.adapter or course.label
    if course.digest is not None:
        found |= {"qhub.adapter": course.adapter, "qhub.adapter_digest": course.digest}
    if course.reasons:
        found["gen_ai.response.finish_reasons"] = course.reasons
        found["gen_ai.usage.input_tokens"] = course.num_prompt
        found["gen_ai.usage.output_tokens"] = course.num_completion
    return found
