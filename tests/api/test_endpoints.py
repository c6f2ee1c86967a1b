"""Models, health and metrics."""

from __future__ import annotations

import anyio
import pytest
from openai.types import Model

import fdserve
from fdserve.config import Config
from fdserve.engine.stats import EngineStats
from fdserve.errors import StartupError
from tests.http.client import serving
from tests.http.fake_engine import FakeEngine, silent

pytestmark = pytest.mark.anyio

PROBES = ("/health", "/ready", "/ping")


async def test_models() -> None:
    async with serving() as client:
        content = (await client.get("/v1/models")).json()
        assert content["object"] == "list"
        (model,) = content["data"]
        Model.model_validate(model, strict=True)
        assert (model["id"], model["max_model_len"], model["object"]) == ("fake-model", 1024, "model")
        for name in ("fake-model", "owner/fake-model", "default"):
            assert (await client.get(f"/v1/models/{name}")).json() == model
        unknown = await client.get("/v1/models/gpt-4")
        assert (unknown.status, unknown.error["code"]) == (404, "model_not_found")


async def test_health_while_loading() -> None:
    engine = FakeEngine()
    engine.hold_loading = True
    async with serving(engine) as client:
        probes = [await client.get(path) for path in PROBES]
        for response in (*probes, await client.chat(), await client.complete()):
            assert (response.status, response.error["code"]) == (503, "unavailable")
            assert "the model is loading" in response.error["message"]
            assert response.headers["retry-after"] == "5"
        assert (await client.get("/v1/models")).json()["data"][0]["id"] == "fake-model"


async def test_health_once_ready_and_while_draining() -> None:
    async with serving() as client:
        for path in PROBES:
            response = await client.get(path)
            assert (response.status, response.json()) == (200, {"status": "ok"})
        client.engine.drain()
        probes = [await client.get(path) for path in PROBES]
        for response in (*probes, await client.chat()):
            assert response.status == 503
            assert "shutting down" in response.error["message"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"])
async def test_a_server_that_drains_says_so_also_when_it_is_full_and_reads_no_body(path: str) -> None:
    async with serving(FakeEngine(silent), Config(max_concurrency=1)) as client, anyio.create_task_group() as tasks:
        tasks.start_soon(client.chat)
        with anyio.fail_after(5):
            while not client.engine.requests:
                await anyio.sleep(0.001)
        client.engine.drain()
        response = await client.post(path, b"no JSON")
        assert response.status == 503
        assert "shutting down" in response.json()["error"]["message"]
        tasks.cancel_scope.cancel()


async def test_health_after_a_failed_start() -> None:
    engine = FakeEngine()
    engine.failure = StartupError("rank 0 has too little memory.")
    async with serving(engine) as client:
        with anyio.fail_after(5):
            await client.app.failed.wait()
        assert client.app.failure == "rank 0 has too little memory."
        response = await client.get("/health")
        assert response.status == 503
        assert "rank 0 has too little memory" in response.error["message"]


async def test_metrics() -> None:
    async with serving() as first, serving() as second:  # two in one process
        await first.chat()
        await first.chat(stream=True)
        await first.complete(model="nobody")
        await first.get("/no/such/path")
        await first.get("/v1/models/fake-model")
        response = await first.get("/metrics")
        assert response.headers["content-type"].startswith("text/plain; version=")
        lines = response.body.decode().splitlines()
        for line in (
            'fdserve_http_requests_total{endpoint="/v1/chat/completions",status="200"} 2.0',
            'fdserve_http_requests_total{endpoint="/v1/completions",status="404"} 1.0',
            'fdserve_http_requests_total{endpoint="other",status="404"} 1.0',
            'fdserve_http_requests_total{endpoint="/v1/models/{model}",status="200"} 1.0',
            "fdserve_time_to_first_token_seconds_count 2.0",
            "fdserve_request_latency_seconds_count 2.0",
            "fdserve_requests_running 0.0",
            "fdserve_prompt_tokens_total 18.0",
        ):
            assert line in lines
        assert "fdserve_prompt_tokens_total 0.0" in (await second.get("/metrics")).body.decode().splitlines()


async def test_version_and_load_answer_in_any_state() -> None:
    engine = FakeEngine()
    engine.hold_loading = True
    async with serving(engine, Config(api_key="secret")) as client:
        assert (await client.get("/version")).json() == {"version": fdserve.__version__}
        response = await client.get("/load")
        assert response.status == 200
        assert response.json() == {
            "server_load": 0,
            "running": 0,
            "waiting": 0,
            "kv_cache_usage": 0.0,
            "kv_blocks_total": 0,
            "kv_blocks_used": 0,
            "kv_blocks_cached": 0,
        }


async def test_load(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving() as client:
        stats = EngineStats(running=3, waiting=2, kv_blocks_total=8, kv_blocks_used=2, kv_blocks_cached=4)
        monkeypatch.setattr(client.engine, "stats", lambda: stats)
        content = (await client.get("/load")).json()
        assert (content["server_load"], content["running"], content["waiting"]) == (5, 3, 2)
        assert (content["kv_cache_usage"], content["kv_blocks_cached"]) == (0.25, 4)


async def test_cancelling_what_does_not_run() -> None:
    async with serving() as client:
        response = await client.request("POST", "/v1/requests/nobody/cancel")
        assert (response.status, response.error["code"]) == (404, "request_not_found")
        assert (response.error["param"], "'nobody'" in response.error["message"]) == ("id", True)
        response = await client.get("/v1/requests/nobody/cancel")
        assert (response.status, response.headers["allow"]) == (405, "POST, OPTIONS")
    async with serving(config=Config(api_key="secret")) as client:
        assert (await client.request("POST", "/v1/requests/nobody/cancel")).status == 401
