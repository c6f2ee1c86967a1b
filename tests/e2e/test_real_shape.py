"""A checkpoint in the published 0.3B shape, its weights random: loaded, served, and measured for memory."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.test_server import rank_of
from tests.http.processes import ROOT, ServerProcess, until


@pytest.fixture(params=["torch", "paddle"])
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    command = [sys.executable, "-m", "bench.random_checkpoint", "--shape", "0.3B", "--layout", request.param]
    subprocess.run([*command, "--out", str(tmp_path)], cwd=ROOT, check=True, timeout=120, stdout=subprocess.DEVNULL)
    assert sum(path.stat().st_size for path in tmp_path.glob("*.safetensors")) > 700e6
    return tmp_path


def test_it_serves_within_memory(checkpoint: Path) -> None:
    arguments = ["--port", "0", "--model", str(checkpoint), "--max-model-len", "32768", "--enable-logprob"]
    with ServerProcess("-m", "fdserve", *arguments) as server:
        server.listening()
        until(lambda: server.get("/health")[0] == 200, 60)
        prompt = list(range(1000, 1700))
        fields = {"temperature": 0, "max_tokens": 8, "ignore_eos": True, "logprobs": 2, "return_token_ids": True}
        status, cold = server.post(prompt, **fields)
        assert status == 200
        _, warm = server.post(prompt, **fields)
        first, second = json.loads(cold), json.loads(warm)
        assert len(first["choices"][0]["completion_token_ids"]) == 8
        assert second["choices"][0]["completion_token_ids"] == first["choices"][0]["completion_token_ids"]
        assert second["choices"][0]["logprobs"] == first["choices"][0]["logprobs"]
        assert second["usage"]["prompt_tokens_details"]["cached_tokens"] == 640
        assert server.memory() + peak_memory(rank_of(server)) < 2 << 30


def peak_memory(pid: int) -> int:
    """The most bytes that were ever resident."""
    match = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert match is not None
    return int(match[1]) << 10
