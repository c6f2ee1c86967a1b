"""A server against what /openapi.json promises: generated requests, right and wrong ones, to every endpoint."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.http.processes import ServerProcess

OPTIONS = [
    # A schema cannot say which fields go together, so what it allows may be refused.
    "--exclude-checks=positive_data_acceptance",
    # Other names of an endpoint, and another with the body of chats.
    "--exclude-path=/v1/tokenize",
    "--exclude-path=/v1/detokenize",
    "--exclude-path=/v1/chat/completions/render",
    "--phases=coverage,fuzzing",
    "--max-examples=5",
    "--seed=1",
    "--no-color",
    "--suppress-health-check=all",
    "--generation-database=none",
]


def test_the_server_does_what_it_describes(tmp_path: Path) -> None:
    environ = {"FDSERVE_PORT": "0", "FDSERVE_ENABLE_LOGPROB": "true", "FDSERVE_LOG_LEVEL": "warning"}
    with ServerProcess("-m", "tests.http.fake_main", **environ) as server:
        server.listening()
        server.wait_line("ready")
        url = f"http://127.0.0.1:{server.port}/openapi.json"
        command = [sys.executable, "-m", "schemathesis.cli", "run", url, *OPTIONS]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stdout + result.stderr
        assert "Tested:" in result.stdout
        assert server.running() == 0
