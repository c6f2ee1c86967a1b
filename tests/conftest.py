"""Fixtures that every test shares."""

from __future__ import annotations

import faulthandler
import gc
import os
import signal
from collections.abc import Generator
from contextlib import suppress
from pathlib import Path
from threading import Timer

import pytest
from hypothesis import settings

from bench.memory import tree

# How long an example takes says nothing on a machine with neighbours.
settings.register_profile("fdserve", deadline=None)
settings.load_profile("fdserve")

# The slowest test takes 160 s on two busy cores, and no test waits longer than 400 s for what it started.
LIMIT_SECONDS = 600.0

# Begun before all others, or one process would end with a long file when the other has none left; by turns those that
# compute and those that mostly wait.
LONG = [
    "http/test_schemathesis.py",
    "e2e/test_chaos.py",
    "cuda/test_compile.py",
    "e2e/test_hosts.py",
    "e2e/test_tensor_parallel.py",
    "cuda/test_emulated_model.py",
    "e2e/test_server.py",
    "e2e/test_real_shape.py",
    "e2e/test_sampling_params.py",
    "cuda/test_emulated.py",
    "cuda/test_emulated_ranks.py",
    "e2e/test_reproducible.py",
]


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Looks at garbage would take a quarter of the time, and there is none: what is collected stays, whoever looks
    later.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the long files first."""
    places = {Path(__file__).parent / name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Give each test, its fixtures included, so much time; none to one that is debugged."""
    timer = Timer(LIMIT_SECONDS, _end, [item])
    timer.daemon = True
    if not item.config.getoption("usepdb"):
        timer.start()
    try:
        return (yield)
    finally:
        timer.cancel()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """pytest-xdist gives the tests of a file whose process ended to another one, with the test that ended it."""
    if (hung := _hung(item)) is not None and hung.exists() and item.nodeid in hung.read_text().splitlines():
        pytest.fail("It hung in another process: see above.", pytrace=False)


def _hung(item: pytest.Item) -> Path | None:
    """Where the processes of a run note the tests that hung; None where there is one process."""
    own = item.config.getoption("basetemp")
    return Path(own).parent / "hung" if hasattr(item.config, "workerinput") else None


def _end(item: pytest.Item) -> None:
    """Tell where the test hangs, and end this process with all that it started; pytest-xdist starts another one.

    An exception in the main thread would not do: trio's event loop is left waiting for the test then, and so is whoever
    wants to close it.
    """
    if (hung := _hung(item)) is not None:
        with hung.open("a") as file:
            print(item.nodeid, file=file)
    item.config.pluginmanager.getplugin("capturemanager").suspend_global_capture(in_=True)
    os.write(2, f"\n{item.nodeid} took more than {LIMIT_SECONDS:g} s\n".encode())
    faulthandler.dump_traceback(2)
    for pid in reversed(tree(os.getpid())):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    """Run each `@pytest.mark.anyio` test on both event loops."""
    return str(request.param)
