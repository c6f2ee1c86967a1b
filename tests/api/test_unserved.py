from __future__ import annotations

import pytest

from fdserve.api.unserved import hints, unserved
from tests.http.client import serving

PATHS = {"/v1/chat/completions", "/v1/models", "/v1/models/{model:path}", "/health", "/tokenize", "/v1/tokenize"}


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("/chat/completions", "/v1/chat/completions"),
        ("/v1/v1/chat/completions", "/v1/chat/completions"),
        ("//v1/chat/completions", "/v1/chat/completions"),
        ("/v1/chat/completions/", "/v1/chat/completions"),
        ("/V1/Chat/Completions", "/v1/chat/completions"),
        ("/v2/chat/completions", "/v1/chat/completions"),
        ("/v1/health", "/health"),
        ("/models", "/v1/models"),
        ("/tokenize/", "/v1/tokenize"),
        ("/openai/v1/chat/completions", "/v1/chat/completions"),
        ("/v1/chat/completions/chat/completions", "/v1/chat/completions"),
        ("/v1/chat/completion", "/v1/chat/completions"),
        ("/v1/chat/complitions", "/v1/chat/completions"),
    ],
)
def test_near_misses(path: str, meant: str) -> None:
    assert hints(PATHS)(path) == f"Did you mean {meant}?"


@pytest.mark.parametrize("path", ["", "/", "//", "/v1", "/v1/", "/v1/nothing", "/favicon.ico", "*", "/v1/chat", "/é\n"])
def test_no_idea_what_is_meant(path: str) -> None:
    assert hints(PATHS)(path) == "GET /openapi.json lists all that there are."


@pytest.mark.anyio
async def test_what_is_served_elsewhere() -> None:
    async with serving() as client:
        for path, what in (
            ("/v1/embeddings", "Embeddings are not served here"),
            ("/embeddings", "Embeddings are not served here"),
            ("/v1/images/generations", "Image generation is not served here"),
            ("/v1/audio/speech", "Speech and transcription are not served here"),
            ("/v1/moderations", "Moderation is not served here"),
            ("/v1/files/abc/content", "The files API is not served here"),
            ("/v1/fine_tuning/jobs", "Fine-tuning is not served here"),
            ("/v1/assistants", "The assistants API is not served here"),
        ):
            for method in ("GET", "POST"):
                response = await client.request(method, path)
                assert (response.status, response.error["code"]) == (404, "unknown_url")
                assert what in response.error["message"]
                assert response.error["type"] == "invalid_request_error"


@pytest.mark.anyio
async def test_what_is_served_below_a_path_elsewhere() -> None:
    async with serving() as client:
        for method, path, status, what in (
            ("POST", "/v1/responses/input_tokens", 405, "Counting a response's tokens is not served here"),
            ("POST", "/v1/responses/input_tokens/", 404, "Counting a response's tokens is not served here"),
            ("POST", "/v1/responses/compact", 405, "Compaction is not served here"),
            ("POST", "/v1/responses/resp_1/cancel", 404, "POST /v1/requests/{id}/cancel ends one"),
            ("GET", "/v1/responses/resp_1/input_items", 404, "The items of a response's input are not served here"),
            ("POST", "/v1/responses/resp_1", 405, "takes GET, HEAD, DELETE, OPTIONS, not POST."),
            ("GET", "/v1/responses/compact", 404, "Response with id 'compact' not found."),
            ("POST", "/v1/messages/batches", 404, "The batch API is not served here"),
            ("GET", "/v1/messages/batches/batch_1/results", 404, "The batch API is not served here"),
        ):
            response = await client.request(method, path)
            assert response.status == status, path
            assert what in response.json()["error"]["message"], path


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/responses/resp_1", "/v1/messages", "/v1/responses/a/b/cancel"])
def test_nothing_is_said_of_what_is_served(path: str) -> None:
    assert unserved(path) is None
