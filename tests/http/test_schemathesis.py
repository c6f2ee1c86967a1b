"""A server against what /openapi.json promises: generated requests, right and wrong ones, to every endpoint."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.http.processes import ServerProcess

# Other names of an endpoint, and another with the body of chats.
LEFT_OUT = ["/v1/tokenize", "/v1/detokenize", "/v1/chat/completions/render"]
# Half of the work is theirs, for one of two clients: each keeps a core busy.
HALF = ["/v1/chat/completions", "/v1/completions"]
OPTIONS = [
    # A schema cannot say which fields go together, so what it allows may be refused.
    "--exclude-checks=positive_data_acceptance",
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
        paths = json.loads(server.get("/openapi.json")[1])["paths"]
        others = [path for path in paths if path not in HALF and path not in LEFT_OUT]
        with ThreadPoolExecutor(2) as pool:
            halves = [pool.submit(run, url, tmp_path / str(number), half) for number, half in enumerate([HALF, others])]
        assert [half.result() for half in halves] == [operations(paths, HALF), operations(paths, others)]
        assert server.running() == 0


def operations(document: dict[str, dict[str, object]], paths: list[str]) -> int:
    return sum(len(document[path]) for path in paths)


def run(url: str, directory: Path, paths: list[str]) -> int:
    """How many operations were tested; there is nothing to say against any."""
    directory.mkdir()
    included = [f"--include-path={path}" for path in paths]
    command = [sys.executable, "-m", "schemathesis.cli", "run", url, *OPTIONS, *included]
    result = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    match = re.search(r"Tested: (\d+)", result.stdout)
    assert match is not None, result.stdout
    return int(match[1])
