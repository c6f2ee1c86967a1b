"""What the README shows works as printed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.http.processes import ServerProcess

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
CURLS = re.findall(r"```bash\n(curl .*?)```", README, re.DOTALL)
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    """`make serve ARGS=--enable-logprob`, on a free port."""
    with ServerProcess("-m", "fdserve", "--port", "0", "--enable-logprob", "--kv-cache-memory", "64M") as server:
        server.listening()
        server.wait_line("^ready")
        yield server


def run(server: ServerProcess, *command: str) -> str:
    command = tuple(part.replace("127.0.0.1:8188", f"127.0.0.1:{server.port}") for part in command)
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout


def events(text: str) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_the_readme_has_these_examples() -> None:
    assert len(CURLS) == 4
    assert len(PYTHON) == 1


def test_the_first_curl_looks_like_a_real_answer(server: ServerProcess) -> None:
    answer = json.loads(run(server, "bash", "-c", CURLS[0]))
    (choice,) = answer["choices"]
    assert "579" in choice["message"]["content"]
    assert "carry" in choice["message"]["reasoning_content"]
    assert choice["finish_reason"] == "stop"
    usage = answer["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_the_streaming_curl(server: ServerProcess) -> None:
    chunks = events(run(server, "bash", "-c", CURLS[1]))
    text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks if chunk["choices"])
    assert "long prompt" in text
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] > 10


def test_the_logprobs_curl(server: ServerProcess) -> None:
    answer = json.loads(run(server, "bash", "-c", CURLS[2]))
    content = answer["choices"][0]["logprobs"]["content"]
    assert len(content) > 5
    assert all(len(entry["top_logprobs"]) == 5 for entry in content)


def test_the_completions_curl(server: ServerProcess) -> None:
    answer = json.loads(run(server, "bash", "-c", CURLS[3]))
    assert "long prompt" in answer["choices"][0]["text"]


def test_the_python_example(server: ServerProcess) -> None:
    assert "--enable-logprob" in run(server, sys.executable, "-c", PYTHON[0])
