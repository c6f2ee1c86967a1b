from __future__ import annotations

from pathlib import Path

import pytest

from bench import accuracy
from bench.__main__ import main


def test_a_row_for_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    accuracy.compare(accuracy.DEMO, prompts=2, tokens=3, longest=24)
    title, _, *rows = capsys.readouterr().out.splitlines()
    assert "48 tokens, 2 continuations of 3" in title
    assert len(rows) == len(accuracy.SETTINGS)
    for row, (dtype, quantization, kv) in zip(rows, accuracy.SETTINGS, strict=True):
        assert row.split()[:1] == [quantization or dtype]
        assert (kv or "") in row
        assert float(row.split()[-5]) < 0.5  # the error, in parts of the spread


def test_where_two_lists_part() -> None:
    assert accuracy.same_beginning([1, 2, 3], [1, 5, 3]) == 1
    assert accuracy.same_beginning([1, 2], [1, 2]) == 2


def test_no_such_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["accuracy", "--model", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith(f"bench accuracy: {tmp_path} has no config.json")
