"""A test that hangs ends, and so does whatever it started; the others go on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.executor.process_table import is_alive

ROOT = Path(__file__).parents[1]
CONFTEST = """
import tests.conftest
from tests.conftest import *

tests.conftest.LIMIT_SECONDS = 2.0
"""
TESTS = """
import subprocess
from pathlib import Path

import anyio
import pytest

pids = (Path(__file__).parent / "pids").open("a")
GRANDCHILD = "sleep 100 & echo $!; wait"

def test_before() -> None:
    pass

@pytest.mark.anyio
async def test_asynchronous() -> None:
    async with await anyio.open_process(GRANDCHILD, start_new_session=True) as process:
        print(process.pid, int(await process.stdout.receive()), file=pids, flush=True)
        await anyio.sleep_forever()

@pytest.fixture
def slow_to_stop():
    process = subprocess.Popen(GRANDCHILD, shell=True, stdout=subprocess.PIPE)
    print(process.pid, int(process.stdout.readline()), file=pids, flush=True)
    yield
    process.wait()

def test_synchronous(slow_to_stop: None) -> None:
    raise ValueError

def test_after() -> None:
    pass
"""


def run(directory: Path, *options: str, name: str = "") -> tuple[str, list[int]]:
    """What pytest says, and the processes that the tests started."""
    (directory / "conftest.py").write_text(CONFTEST)
    (directory / "test_hangs.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "-p", "no:cacheprovider", *options]
    told = subprocess.run(
        [*command, f"{directory}/test_hangs.py{name}"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    assert told.returncode != 0
    return told.stdout, [int(pid) for pid in (directory / "pids").read_text().split()]


def test_others_go_on(tmp_path: Path) -> None:
    told, pids = run(tmp_path, "-n", "1", "--dist", "loadfile")
    for name in ("test_asynchronous[asyncio]", "test_asynchronous[trio]", "test_synchronous"):
        assert told.count(f"{name} took more than 2 s") == 1
    assert " in slow_to_stop\n" in told
    assert " 2 passed" in told
    assert len(pids) == 6
    assert not any(map(is_alive, pids))


def test_in_one_process(tmp_path: Path) -> None:
    told, pids = run(tmp_path, name="::test_asynchronous[trio]")
    assert "test_asynchronous[trio] took more than 2 s" in told
    assert len(pids) == 2
    assert not any(map(is_alive, pids))
