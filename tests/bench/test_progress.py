from __future__ import annotations

import pytest

from bench import progress
from bench.progress import Progress


def test_a_bar_on_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    bar = Progress(4, "A")
    bar.done = 2
    bar.show()
    bar.close()
    shown = capsys.readouterr()
    assert "[" + "#" * 15 + "." * 15 + "] A: 2 of 4 requests" in shown.err
    assert not shown.out


def test_lines_now_and_then_elsewhere(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    bar = Progress(4)
    bar.show()
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(progress, "LINE_EVERY_SECONDS", 0.0)
    bar.show()
    bar.close()
    assert capsys.readouterr().err == "0 of 4 requests, 0 s\n"
