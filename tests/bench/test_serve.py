"""The commands that load a server, over the demo model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench import server_metrics
from bench.__main__ import main
from bench.timeline import read_steps, steps_of_run
from tests.bench.scripted import ScriptedServer, stream
from tests.http.processes import ServerProcess, until

LOAD = ["--random-input-len", "20", "--random-output-len", "6", "--vocab-size", "1500", "--ignore-eos"]


@pytest.fixture(scope="module")
def step_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the server of `url` writes its steps to."""
    return tmp_path_factory.mktemp("server") / "steps.jsonl"


@pytest.fixture(scope="module")
def url(step_log: Path) -> Iterator[str]:
    options = ["--port", "0", "--kv-cache-memory", "64M", "--step-log", str(step_log)]
    with ServerProcess("-m", "fdserve", *options) as server:
        server.listening()
        server.wait_line("^ready")
        yield f"http://127.0.0.1:{server.port}"


def test_a_closed_loop(url: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "results" / "run.json"
    saving = ["--save-detailed", "--result-dir", str(path.parent), "--result-filename", path.name, "--metadata", "a=b"]
    arguments = ["serve", "--base-url", url + "/v1", *LOAD, "--num-prompts", "8", "--max-concurrency", "3"]
    assert main([*arguments, *saving, "--num-warmups", "2", "--goodput", "ttft:60000"]) == 0
    shown = capsys.readouterr()
    assert "Output tokens/s" in shown.out
    assert "Ranks idle (%)" in shown.out
    result = json.loads(path.read_text())
    assert (result["completed"], result["failed"], result["a"], result["model_id"]) == (8, 0, "b", "fdserve-demo")
    assert result["output_lens"] == [6] * 8
    assert result["total_input_tokens"] == 160
    assert result["max_concurrent_requests"] == 3
    assert result["request_goodput"] == pytest.approx(result["request_throughput"])
    assert result["output_throughput"] == pytest.approx(48 / result["duration"])
    assert 0 < result["median_ttft_ms"] <= result["p99_ttft_ms"] <= result["p99_e2el_ms"]
    assert result["server"]["counters"]["generated_tokens_total"] == 48
    assert 0 < result["server"]["idle_share"] < 1
    assert result["client"]["received"] >= 8


def test_an_open_loop_of_chats(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["serve", "--base-url", url, *LOAD, "--endpoint", "/v1/chat/completions"]
    assert main([*arguments, "--num-prompts", "10", "--request-rate", "50", "--burstiness", "2"]) == 0
    assert "Failed requests                                    0" in capsys.readouterr().out


def test_failures_are_counted_and_shown(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    extra = ["--num-prompts", "4", "--extra-body", '{"top_p": 7}']
    assert main(["serve", "--base-url", url, *LOAD, *extra]) == 1
    assert "4 x HTTP 400: " in capsys.readouterr().out


def test_a_server_that_is_not_fdserve(capsys: pytest.CaptureFixture[str]) -> None:
    answer = stream(*[json.dumps({"choices": [{"text": "a"}]})] * 3)
    with ScriptedServer(*[answer] * 4) as server:
        arguments = ["serve", "--base-url", server.url, "--num-prompts", "4", "--max-concurrency", "1"]
        assert main([*arguments, "--model", "m"]) == 0
        assert json.loads(server.requests[1])["model"] == "m"
    shown = capsys.readouterr().out
    # Without a usage the chunks count.
    assert "Generated tokens                                  12" in shown
    assert "Ranks idle" not in shown


def test_comparing_and_plotting(url: str, step_log: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "runs.json"
    servers = ["--base-url", f"A={url}", "--base-url", f"B={url}/v1"]
    arguments = ["compare", *servers, "--runs", "2", *LOAD, "--num-prompts", "4", "--max-concurrency", "2"]
    assert main([*arguments, "--save-detailed", "--result-filename", str(path)]) == 0
    assert "B/A" in capsys.readouterr().out
    results: list[dict[str, Any]] = json.loads(path.read_text())
    assert [result["label"] for result in results] == ["A", "B", "B", "A"]
    assert results[0]["seed"] == results[1]["seed"] != results[2]["seed"] == results[3]["seed"]
    assert main(["plot", "curves", str(path), "--out", str(tmp_path / "curves.svg")]) == 0
    assert "<svg" in (tmp_path / "curves.svg").read_text()
    path.write_text(json.dumps(results[-1]))

    def tokens_told() -> int:
        steps = read_steps(step_log) if step_log.stat().st_size else []
        if not steps or steps[-1].ended < results[-1]["begin_time"]:
            return 0
        return sum(step.prefill_tokens + step.decode_tokens for step in steps_of_run(steps, results[-1]))

    until(lambda: tokens_told() == 4 * (20 + 5))  # the log is written twice a second
    assert main(["plot", "timeline", str(step_log), str(path), "--out", str(tmp_path / "line.png")]) == 0
    assert (tmp_path / "line.png").read_bytes().startswith(b"\x89PNG")
    assert main(["plot", "timeline", str(path), str(path), "--out", "x.png"]) == 1
    assert main(["plot", "timeline", str(step_log), str(step_log), "--out", "x.png"]) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["serve", "--base-url", "ftp://x"],
        ["serve", "--goodput", "itl:3"],
        ["serve", "--percentile-metrics", "ttft,speed"],
        ["serve", "--request-rate", "0"],
        ["compare", "--base-url", "A=http://127.0.0.1:1"],
    ],
)
def test_wrong_options(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_commands_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert main(["fly"]) == 2
    shown = capsys.readouterr()
    assert shown.out == shown.err
    assert "kernels" in shown.out


def test_what_the_counters_say() -> None:
    before = {"steps_total": 1.0, "step_seconds_total": 1.0, "generated_tokens_total": 0.0, "requests_running": 0.0}
    after = {"steps_total": 5.0, "step_seconds_total": 2.5, "generated_tokens_total": 8.0, "requests_running": 3.0}
    server = server_metrics.changes(before, after, 2.0)
    assert (server["idle_share"], server["tokens_per_step"]) == (0.25, 2.0)
    assert "requests_running" not in server["counters"]
    assert server_metrics.changes({}, {}, 2.0) == {}
