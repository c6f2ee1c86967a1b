from __future__ import annotations

import pytest

from fdserve.errors import UnsupportedMediaType
from fdserve.http.media_type import check_media_type
from tests.http.client import serving


@pytest.mark.parametrize(
    "media_type",
    [
        *(None, "", "application/json", "application/json; charset=utf-8", "Application/JSON ;charset=UTF-8"),
        *("text/json", "application/vnd.api+json", "application/x-www-form-urlencoded", "text/plain;charset=UTF-8"),
    ],
)
def test_what_is_read(media_type: str | None) -> None:
    check_media_type({} if media_type is None else {"content-type": media_type})


@pytest.mark.parametrize(
    "media_type", ["application/xml", "multipart/form-data; boundary=x", "text/html", "jso", "application/json2", ","]
)
def test_what_is_not(media_type: str) -> None:
    with pytest.raises(UnsupportedMediaType, match="must be application/json"):
        check_media_type({"content-type": media_type})


def test_encodings() -> None:
    for encoding in ("", "identity", " Identity"):
        check_media_type({"content-encoding": encoding})
    for encoding in ("gzip", "br", "deflate, gzip"):
        with pytest.raises(UnsupportedMediaType, match="send the body plain"):
            check_media_type({"content-encoding": encoding})


@pytest.mark.anyio
async def test_over_http() -> None:
    body = b'{"prompt": "Hi"}'
    async with serving() as client:
        for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
            response = await client.post(path, body, headers={"content-type": "multipart/form-data; boundary=x"})
            assert (response.status, response.error["code"]) == (415, "unsupported_media_type")
            assert response.error["type"] == "invalid_request_error"
        assert not client.engine.requests
        response = await client.post("/v1/completions", body, headers={"content-type": "text/plain"})
        assert response.status == 200
        # Where nothing is read, the type of a body does not matter.
        response = await client.post("/v1/requests/x/cancel", body, headers={"content-type": "text/html"})
        assert response.status == 404
        response = await client.request("GET", "/health", headers={"content-type": "text/html"})
        assert response.status == 200
