"""A real server with the bundled model, for clients that are not ours."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.http.processes import ServerProcess


@pytest.fixture(scope="package")
def server() -> Iterator[ServerProcess]:
    settings = {"FDSERVE_ENABLE_LOGPROB": "1", "FDSERVE_KV_CACHE_MEMORY": "64M", "FDSERVE_MAX_MODEL_LEN": "1024"}
    with ServerProcess("-m", "fdserve", "--port", "0", **settings) as process:
        process.listening()
        process.wait_line("^ready")
        yield process
