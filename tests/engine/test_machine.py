from __future__ import annotations

import os
from pathlib import Path

import pytest

from fdserve.engine.machine import available_cores, available_memory


def test_a_containers_memory_limit_counts(tmp_path: Path) -> None:
    machine = available_memory(tmp_path)
    assert 64 << 20 < machine < 1 << 50
    (tmp_path / "memory.current").write_text("1000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert available_memory(tmp_path) > 64 << 20
    (tmp_path / "memory.max").write_text("5000\n")
    assert available_memory(tmp_path) == 4000
    (tmp_path / "memory.stat").write_text("anon 300\ninactive_file 500\nactive_file 100\n")
    assert available_memory(tmp_path) == 4600
    (tmp_path / "memory.stat").unlink()
    (tmp_path / "memory.max").write_text("500\n")
    assert available_memory(tmp_path) == 0


@pytest.mark.parametrize(("quota", "cores"), [("50000 100000", 1), ("100000 100000", 1), ("max 100000", None)])
def test_a_quota_of_processor_time_counts(tmp_path: Path, quota: str, cores: int | None) -> None:
    everything = len(os.sched_getaffinity(0))
    assert available_cores(tmp_path) == everything
    (tmp_path / "cpu.max").write_text(quota)
    assert available_cores(tmp_path) == (cores or everything)
