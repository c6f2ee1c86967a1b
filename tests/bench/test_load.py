from __future__ import annotations

import json

import pytest

from bench.load import ask, main
from tests.http.processes import ServerProcess


def test_a_smoke_run_over_the_demo_model(capsys: pytest.CaptureFixture[str]) -> None:
    with ServerProcess("-m", "fdserve", "--port", "0", "--kv-cache-memory", "64M") as server:
        server.listening()
        server.wait_line("^ready")
        url = f"http://127.0.0.1:{server.port}"
        with pytest.raises(RuntimeError, match="Token id"):
            ask(url, [99_999], 4)
        # The demo model has no ids as high as the load's prompts.
        answer = ask(url, [5, 6, 7], 9)
        assert answer.tokens == 9
        assert len(answer.gaps) <= 9
        arguments = ["--base-url", url, "--concurrency", "3", "--num-prompts", "6", "--output-len", "5", "--json"]
        main([*arguments, "--input-len", "20", "--vocab-size", "1500"])
    report = json.loads(capsys.readouterr().out)
    assert report["requests"] == 6
    assert report["output_tokens_per_second"] == pytest.approx(30 / report["seconds"])
    assert 0 < report["median_ttft"] <= report["p99_ttft"]
