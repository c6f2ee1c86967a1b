"""Traces, as a collector on loopback gets them."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from fdserve.app import TRACES_SECONDS
from fdserve.config import Config
from fdserve.errors import StartupError
from fdserve.server.tracing import TRACED_CHOICES, Tracing
from tests.http.client import serving
from tests.http.fake_engine import FakeEngine, broken, endless, say

pytestmark = pytest.mark.anyio

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Collector(ThreadingHTTPServer):
    """Keeps what is sent; does not answer while `silent`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.bodies: list[bytes] = []
        self.headers: list[dict[str, str]] = []
        self.silent = False
        self.closing = Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1/traces"

    @property
    def config(self) -> Config:
        return Config(otlp_traces_endpoint=self.url, api_key="secret")

    @property
    def resource(self) -> dict[str, Any]:
        """What the first spans are said to come from."""
        return _attributes(ExportTraceServiceRequest.FromString(self.bodies[0]).resource_spans[0].resource.attributes)

    @property
    def spans(self) -> list[Any]:
        """All spans, in the order in which they began."""
        requests = [ExportTraceServiceRequest.FromString(body) for body in self.bodies]
        parts = [scope for request in requests for part in request.resource_spans for scope in part.scope_spans]
        return sorted([span for part in parts for span in part.spans], key=lambda span: span.start_time_unix_nano)


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        collector = self.server
        assert isinstance(collector, Collector)
        body = self.rfile.read(int(self.headers["content-length"]))
        if collector.silent:
            collector.closing.wait(60)
            return
        collector.bodies.append(body)
        collector.headers.append(dict(self.headers))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as collector:
        thread = Thread(target=collector.serve_forever, args=(0.01,))
        thread.start()
        yield collector
        collector.closing.set()
        collector.shutdown()
        thread.join()


def _attributes(attributes: Any) -> dict[str, Any]:
    return {attribute.key: _value(attribute.value) for attribute in attributes}


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    return [_value(each) for each in value.array_value.values] if kind == "array_value" else getattr(value, kind)


def headers(**others: str) -> dict[str, str]:
    return {"authorization": "Bearer secret", **others}


async def test_a_chat_and_its_phases(collector: Collector) -> None:
    before = time.time_ns()
    async with serving(FakeEngine(say("Hello", delay=0.02)), collector.config) as client:
        response = await client.chat(
            "my secret question",
            headers=headers(traceparent=f"00-{TRACE}-{PARENT}-01", x_request_id="mine"),
            max_tokens=50,
            temperature=0.5,
            top_p=0.9,
        )
        assert response.status == 200
    after = time.time_ns()
    request, *phases = collector.spans
    assert request.name == "POST /v1/chat/completions"
    assert request.kind == request.SPAN_KIND_SERVER
    assert (request.trace_id.hex(), request.parent_span_id.hex()) == (TRACE, PARENT)
    assert request.status.code == request.status.STATUS_CODE_UNSET
    usage = response.json()["usage"]
    assert _attributes(request.attributes) == {
        "http.request.method": "POST",
        "http.route": "/v1/chat/completions",
        "http.response.status_code": 200,
        "url.path": "/v1/chat/completions",
        "url.scheme": "http",
        "network.protocol.version": "1.1",
        "fdserve.request.id": "mine",
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "fdserve",
        "gen_ai.request.model": "fake-model",
        "gen_ai.response.id": response.json()["id"],
        "gen_ai.request.choice.count": 1,
        "gen_ai.request.max_tokens": 50,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.9,
        "gen_ai.usage.input_tokens": usage["prompt_tokens"],
        "gen_ai.usage.output_tokens": usage["completion_tokens"],
        "gen_ai.usage.cache_read.input_tokens": 1,
        "gen_ai.response.finish_reasons": ["stop"],
    }
    assert [phase.name for phase in phases] == ["queue", "prefill", "decode"]
    for phase in phases:
        assert phase.parent_span_id == request.span_id
        assert _attributes(phase.attributes) == {"fdserve.choice.index": 0}
    moments = [before, request.start_time_unix_nano]
    for phase in phases:
        moments += [phase.start_time_unix_nano, phase.end_time_unix_nano]
    moments += [request.end_time_unix_nano, after]
    assert moments == sorted(moments)
    assert phases[2].end_time_unix_nano - phases[2].start_time_unix_nano > 0.07e9
    assert not any(b"secret" in body or b"Hello" in body for body in collector.bodies)


async def test_every_choice_has_its_phases(collector: Collector) -> None:
    async with serving(config=collector.config) as client:
        await client.complete("Hi", n=2, headers=headers())
    phases = [(_attributes(span.attributes).get("fdserve.choice.index"), span.name) for span in collector.spans]
    assert sorted(phases[1:]) == [(index, name) for index in (0, 1) for name in ("decode", "prefill", "queue")]
    attributes = _attributes(collector.spans[0].attributes)
    assert attributes["gen_ai.operation.name"] == "text_completion"
    assert attributes["gen_ai.request.choice.count"] == 2
    assert attributes["gen_ai.response.finish_reasons"] == ["stop", "stop"]


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/completions", {"prompt": "Hi"}),
        ("/v1/responses", {"input": "Hi"}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 50}),
    ],
)
async def test_the_id_that_the_client_has(collector: Collector, path: str, fields: dict[str, Any]) -> None:
    async with serving(config=collector.config) as client:
        response = await client.post(path, {"model": "fake-model", **fields}, headers=headers())
    told = _attributes(collector.spans[0].attributes)
    assert told["gen_ai.response.id"] == response.json()["id"]
    assert (told["url.path"], told["url.scheme"]) == (path, "http")


async def test_what_never_came_to_the_model_has_no_id(collector: Collector) -> None:
    engine = FakeEngine()
    engine.max_requests = 0
    async with serving(engine, collector.config) as client:
        assert (await client.chat(headers=headers())).status == 429
    told = _attributes(collector.spans[0].attributes)
    assert told["url.path"] == "/v1/chat/completions"
    assert "gen_ai.response.id" not in told


async def test_prompts_are_counted_once_each(collector: Collector) -> None:
    async with serving(config=collector.config) as client:
        response = await client.complete(["Hi", "Hello there"], n=2, headers=headers())
    usage, told = response.json()["usage"], _attributes(collector.spans[0].attributes)
    assert told["gen_ai.usage.input_tokens"] == usage["prompt_tokens"]
    assert told["gen_ai.usage.cache_read.input_tokens"] == usage["prompt_tokens_details"]["cached_tokens"]
    assert told["gen_ai.usage.output_tokens"] == usage["completion_tokens"]
    assert told["gen_ai.request.choice.count"] == 4


async def test_of_many_choices_some_are_traced(collector: Collector) -> None:
    async with serving(config=collector.config) as client:
        await client.complete("Hi", n=40, headers=headers())
    assert len(collector.spans) == 1 + 3 * TRACED_CHOICES
    told = _attributes(collector.spans[0].attributes)
    assert told["gen_ai.request.choice.count"] == len(told["gen_ai.response.finish_reasons"]) == 40


async def test_a_stream_that_breaks_off_is_an_error(collector: Collector) -> None:
    async with serving(FakeEngine(broken("Hel")), collector.config) as client:
        await client.chat(stream=True, headers=headers())
    request = collector.spans[0]
    told = _attributes(request.attributes)
    assert (told["http.response.status_code"], told["error.type"]) == (200, "internal_error")
    assert request.status.code == request.status.STATUS_CODE_ERROR


async def test_what_is_refused_or_fails(collector: Collector) -> None:
    engine = FakeEngine()
    async with serving(engine, collector.config) as client:
        await client.chat(temperature="hot", headers=headers())
        await client.chat()
        await client.post("/v1/tokenize", {"prompt": "Hi"}, headers=headers())
        engine.max_requests = 0
        await client.chat(headers=headers())
        engine.drain()
        await client.chat(headers=headers())
        for path in ("/health", "/metrics", "/nowhere"):
            await client.get(path)
    found = [(_attributes(span.attributes), span.status.code) for span in collector.spans]
    assert [(told["http.route"], told["http.response.status_code"], told.get("error.type")) for told, _ in found] == [
        ("/v1/chat/completions", 400, "invalid_value"),
        ("/v1/chat/completions", 401, "invalid_api_key"),
        ("/v1/tokenize", 200, None),
        ("/v1/chat/completions", 429, "queue_full"),
        ("/v1/chat/completions", 503, "unavailable"),
    ]
    error = collector.spans[0].status.STATUS_CODE_ERROR
    assert [code == error for _, code in found] == [False] * 4 + [True]


async def test_a_client_that_leaves(collector: Collector) -> None:
    async with serving(FakeEngine(endless()), collector.config) as client:
        await client.chat(stream=True, leave_after=3, headers=headers())
    request, *phases = collector.spans
    told = _attributes(request.attributes)
    assert told["http.response.status_code"] == 499
    assert "gen_ai.response.finish_reasons" not in told
    assert phases[-1].name == "decode"
    assert phases[-1].end_time_unix_nano == request.end_time_unix_nano


async def test_a_traceparent_that_is_none_begins_a_trace(collector: Collector) -> None:
    async with serving(config=collector.config) as client:
        for value in ("nonsense", f"00-{'0' * 32}-{PARENT}-01", ""):
            assert (await client.chat(headers=headers(traceparent=value))).status == 200
        await client.chat(headers=headers(traceparent=f"00-{TRACE}-{PARENT}-00"))  # not sampled
    requests = [span for span in collector.spans if span.name.startswith("POST")]
    assert len({span.trace_id for span in requests}) == 3
    assert all(span.parent_span_id == b"" and span.trace_id.hex() != TRACE for span in requests)


async def test_opentelemetrys_own_variables(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(config=collector.config) as client:
        await client.chat(headers=headers())
    assert collector.resource["service.name"] == "fdserve"
    collector.bodies.clear()
    monkeypatch.setenv("OTEL_SERVICE_NAME", "ernie-in-production")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-tenant=mine")
    async with serving(config=collector.config) as client:
        await client.chat(headers=headers())
    assert collector.resource["service.name"] == "ernie-in-production"
    assert collector.headers[-1]["x-tenant"] == "mine"


async def test_a_collector_that_is_silent_holds_up_neither_answers_nor_the_stop(collector: Collector) -> None:
    collector.silent = True
    async with serving(config=collector.config) as client:
        assert (await client.chat(headers=headers())).status == 200
        began = time.monotonic()
    assert time.monotonic() - began < TRACES_SECONDS + 2


async def test_a_trace_that_fails_costs_nothing_else(
    collector: Collector, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("a defect")

    monkeypatch.setattr(Tracing, "_attributes", fail)
    async with serving(config=collector.config) as client:
        assert (await client.chat(headers=headers(x_request_id="mine"))).status == 200
    assert "request mine cannot be traced" in caplog.text
    assert not collector.bodies


def test_variables_that_contradict_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "256")  # less than a batch
    with pytest.raises(StartupError, match=r"OTEL_BSP_ variables: .*max_queue_size"):
        Tracing("http://127.0.0.1:1/v1/traces", "fake-model")


def test_without_opentelemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(StartupError, match=r"pip install '.\[cpu,tracing\]'"):
        Tracing("http://127.0.0.1:1/v1/traces", "fake-model")


@pytest.mark.parametrize(
    "url", ["127.0.0.1:4318", "grpc://127.0.0.1:4317", "http://", "http:///v1/traces", "http://a b"]
)
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(StartupError, match="otlp_traces_endpoint is no URL"):
        Config(otlp_traces_endpoint=url)


def test_nothing_of_opentelemetry_is_imported_without_it() -> None:
    import subprocess

    code = "import fdserve.app, sys, json; print(json.dumps([name for name in sys.modules if 'opentelemetry' in name]))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert json.loads(ran.stdout) == []
