"""Traces: what became of each request, as spans for an OpenTelemetry collector.

A request is told when it is over, so a trace costs nothing while tokens come. Spans hold times and sizes, never texts
or token ids. Names are those of OpenTelemetry's conventions for HTTP and for generative AI where these have one.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from threading import Thread
from typing import Any, Protocol

from fdserve import __version__
from fdserve.config import Config
from fdserve.engine.request import SamplingParams
from fdserve.errors import StartupError
from fdserve.http.request import Request

_OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/responses": "chat",
    "/v1/messages": "chat",
    "/v1/completions": "text_completion",
}
TRACED_CHOICES = 16
"""Of a request: to make their spans takes a tenth of a millisecond each, in which all streams wait."""


class Output(Protocol):
    """What a trace tells of a choice. Times are those of `time.monotonic()`, 0 for what has not come."""

    index: int
    prompt: list[int]
    params: SamplingParams
    submitted: float
    """When the engine was asked."""
    first_token: float
    last_token: float
    generated: int
    cached_tokens: int
    finish_reason: str | None

    @property
    def started(self) -> float:
        """When its first step was planned."""


class Tracing:
    """Sends a trace of each request to `endpoint`, from a thread of OpenTelemetry's.

    What the collector does not take in time is dropped. OpenTelemetry's own variables say the rest: OTEL_SERVICE_NAME,
    OTEL_TRACES_SAMPLER, OTEL_EXPORTER_OTLP_HEADERS and so on.
    """

    def __init__(self, endpoint: str, model: str) -> None:
        """`model` is what responses call it. Raises StartupError where OpenTelemetry is not installed."""
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import OTELResourceDetector, Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError as error:
            raise StartupError(
                "otlp_traces_endpoint needs OpenTelemetry: run `pip install '.[cpu,tracing]'` in the checkout "
                f"({error})."
            ) from None
        self._model = model
        own = Resource({"service.name": "fdserve", "service.version": __version__})
        resource = own.merge(OTELResourceDetector().detect())
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._exporter = OTLPSpanExporter(endpoint=endpoint)
        try:
            self._provider.add_span_processor(BatchSpanProcessor(self._exporter))
        except ValueError as error:
            raise StartupError(f"OpenTelemetry cannot do with its OTEL_BSP_ variables: {error}.") from None
        self._tracer = self._provider.get_tracer("fdserve", __version__)
        self._propagator = TraceContextTextMapPropagator()

    def note(self, request: Request, endpoint: str, status: int) -> None:
        """A request to this route is over: tell its trace. It is part of the client's, where a traceparent says so."""
        from opentelemetry.trace import SpanKind, StatusCode, set_span_in_context

        clock = _Clock()
        span = self._tracer.start_span(
            f"{request.method} {endpoint}",
            self._propagator.extract(request.headers),
            SpanKind.SERVER,
            self._attributes(request, endpoint, status),
            start_time=clock.at(request.started),
        )
        if status >= 500 or (status < 400 and request.failure is not None):  # or a stream broke off
            span.set_status(StatusCode.ERROR)
        if span.is_recording():
            inside = set_span_in_context(span)
            for output in request.outputs[:TRACED_CHOICES]:
                for name, start, end in _phases(output, clock.now):
                    attributes = {"fdserve.choice.index": output.index}
                    child = self._tracer.start_span(name, inside, attributes=attributes, start_time=clock.at(start))
                    child.end(clock.at(end))
        span.end(clock.at(clock.now))

    def close(self, seconds: float) -> None:
        """Send what is left. What the collector has not taken within so many seconds is given up. Blocks."""
        sending = Thread(target=self._provider.shutdown, name="last traces", daemon=True)
        sending.start()
        sending.join(seconds)
        if sending.is_alive():
            self._exporter.shutdown()  # type: ignore[no-untyped-call]  # tries no more

    def _attributes(self, request: Request, endpoint: str, status: int) -> Mapping[str, Any]:
        attributes: dict[str, Any] = {
            "http.request.method": request.method,
            "http.route": endpoint,
            "http.response.status_code": status,
            "url.path": request.path,
            "url.scheme": request.scheme,
            "network.protocol.version": request.http_version,
            "fdserve.request.id": request.id,
        }
        if request.failure is not None:
            attributes["error.type"] = request.failure
        if endpoint in _OPERATIONS:
            attributes["gen_ai.operation.name"] = _OPERATIONS[endpoint]
            attributes["gen_ai.provider.name"] = "fdserve"
            attributes["gen_ai.request.model"] = self._model
        if request.outputs:
            attributes |= _generated(request.outputs)
            if request.response_id is not None:
                attributes["gen_ai.response.id"] = request.response_id
        return attributes


def tracing_of(config: Config, model: str) -> Tracing | None:
    """What sends traces where the settings say so. Raises like `Tracing`."""
    return Tracing(config.otlp_traces_endpoint, model) if config.otlp_traces_endpoint else None


class _Clock:
    """`time.monotonic()` as nanoseconds since 1970, as of now."""

    def __init__(self) -> None:
        self.now = time.monotonic()
        self._since_1970 = time.time_ns()

    def at(self, moment: float) -> int:
        return self._since_1970 - int((self.now - moment) * 1e9)


def _generated(outputs: Sequence[Output]) -> dict[str, Any]:
    """What a request asked of the model, and what it got."""
    params = outputs[0].params
    of_prompts = {id(output.prompt): output for output in reversed(outputs)}.values()  # the first of each
    attributes = {
        "gen_ai.request.choice.count": len(outputs),
        "gen_ai.request.max_tokens": params.max_tokens,
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
        "gen_ai.usage.input_tokens": sum([len(output.prompt) for output in of_prompts]),
        "gen_ai.usage.output_tokens": sum([output.generated for output in outputs]),
        "gen_ai.usage.cache_read.input_tokens": sum([output.cached_tokens for output in of_prompts]),
    }
    reasons = [output.finish_reason for output in outputs if output.finish_reason is not None]
    return attributes | ({"gen_ai.response.finish_reasons": reasons} if reasons else {})


def _phases(output: Output, now: float) -> Iterator[tuple[str, float, float]]:
    """What a choice waited for, one after the other: its name, when it began and ended. The last ends `now` if ever."""
    done = output.finish_reason is not None
    yield "queue", output.submitted, output.started or now
    if output.started:
        yield "prefill", output.started, output.first_token or now
    if output.first_token:
        yield "decode", output.first_token, output.last_token if done else now
