"""The long load, over the demo model for two seconds, and what is said of memory."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from bench.__main__ import main
from bench.memory import MemoryLog, Trace, growth, resident_bytes, tree
from bench.soak import Load, trace_line
from bench.soak_load import KINDS, draw, exchange
from tests.bench.scripted import ScriptedServer, stream
from tests.http.processes import ServerProcess


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    """A process whose child has one, too; they end with it."""
    code = "import subprocess, sys; print(flush=True); subprocess.run(['cat'])"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process


def test_all_that_descends_from_a_process_is_found(child: subprocess.Popen[bytes]) -> None:
    pids = tree(os.getpid())
    assert pids[0] == os.getpid()
    assert child.pid in pids
    assert resident_bytes(child.pid) > 1 << 20
    log = MemoryLog(child.pid)
    log.sample()
    assert log.traces[child.pid].command.startswith(sys.executable)
    assert len(log.traces[child.pid].resident) == 2


def test_threads_may_end_meanwhile() -> None:
    with ThreadPoolExecutor(1) as pool:

        def come_and_go() -> None:
            for _ in range(400):
                thread = threading.Thread(target=lambda: None)
                thread.start()
                thread.join()

        done = pool.submit(come_and_go)
        while not done.done():
            assert tree(os.getpid())[0] == os.getpid()


def test_a_process_that_ended_has_no_memory(child: subprocess.Popen[bytes]) -> None:
    log = MemoryLog(child.pid)
    child.communicate()
    with pytest.raises(OSError, match="No such"):
        log.sample()


@pytest.mark.parametrize("slope", [0.0, 1000.0, -300.0])
def test_the_slope_is_within_its_interval(slope: float) -> None:
    noise = random.Random(0)
    times = [5.0 * index + noise.random() for index in range(600)]
    lines = [growth(times, [int(1e8 + slope * at + noise.gauss(0, 1e4)) for at in times]) for _ in range(50)]
    within = [abs(line.slope - slope) <= line.confidence for line in lines if line is not None]
    assert len(within) == 50
    assert sum(within) >= 42  # 95 % of 50 are expected
    assert all(line is not None and line.confidence < 5 for line in lines)


def test_too_few_samples_have_no_slope() -> None:
    assert growth([0.0, 1.0], [1, 2]) is None
    assert growth([*range(20), 1000], [1] * 21) is None


def test_what_is_shown_of_a_process() -> None:
    trace = Trace(7, "python -m x", [float(at) for at in range(100)], [(1000 + 2 * at) << 10 for at in range(100)])
    assert trace_line(trace, 10, 99).split()[:7] == ["7", "1000", "1020", "1198", "+120.00", "±", "0.00"]
    assert "(ended early)" in trace_line(trace, 10, 105)
    assert "had settled" in trace_line(trace, 200, 300)
    assert "?" in trace_line(trace, 95, 99)


def test_a_load_mixes_every_kind() -> None:
    generator = random.Random(0)
    drawn = [draw(generator) for _ in range(400)]
    assert {kind for kind, _, _ in drawn} == set(KINDS)
    assert 0.1 < sum(leave for _, _, leave in drawn) / len(drawn) < 0.3
    assert not any(leave and not fields["stream"] for _, fields, leave in drawn)


def test_failures_are_told_from_what_is_to_fail() -> None:
    with Load("http://127.0.0.1:1", 0) as load:
        load.outcomes += [("chat", "200"), ("chat", "left"), ("chat", "500"), ("refused", "400"), ("refused", "200")]
        assert load.failures() == {"chat: 500": 1, "refused: 200": 1}


def test_a_stream_that_ends_with_an_error_has_failed() -> None:
    with ScriptedServer(stream('{"error": {"message": "lost"}}')) as server, pytest.raises(ValueError, match="lost"):
        exchange(server.url, "/v1/completions", {"stream": True}, leave=False)


def test_the_soak_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "soak.json"
    with ServerProcess("-m", "fdserve", "--port", "0", "--kv-cache-memory", "16M", "--enable-logprob") as server:
        server.listening()
        server.wait_line("^ready")
        arguments = ["--port", str(server.port), "--pid", str(server.process.pid), "--json", str(path)]
        load = ["--duration", "2", "--settle", "0.2", "--request-rate", "20", "--sample-every", "0.1"]
        assert main(["soak", *arguments, *load]) == 0
    shown = capsys.readouterr().out
    assert shown.count(" ± ") == 2  # of the API process and of its rank
    content = json.loads(path.read_text())
    assert [len(trace["resident"]) > 12 for trace in content["traces"]] == [True, True]
    assert sum(content["requests"].values()) > 12
    assert main(["soak", *arguments, *load]) == 1
    assert "No such" in capsys.readouterr().err
