"""One server with the demo model for all tests that only ask it something."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from tests.http.processes import ServerProcess

SETTINGS = {
    "FDSERVE_ENABLE_LOGPROB": "1",
    "FDSERVE_TRUST_REQUEST_CHAT_TEMPLATE": "1",
    "FDSERVE_KV_CACHE_MEMORY": "64M",
    "FDSERVE_MAX_MODEL_LEN": "1024",
    "FDSERVE_BLOCK_SIZE": "16",
    "FDSERVE_MAX_NUM_SEQS": "8",
}


@pytest.fixture(scope="package")
def server() -> Iterator[ServerProcess]:
    with ServerProcess("-m", "fdserve", "--port", "0", **SETTINGS) as process:
        process.listening()
        process.wait_line("^ready")
        yield process


@pytest.fixture(scope="package")
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="null", max_retries=0) as client:
        yield client
