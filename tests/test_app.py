from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator

import pytest

from tests.http.client import serving

pytestmark = pytest.mark.anyio

PYTHONS_OWN = 0.005


@pytest.fixture(autouse=True)
def _switching() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(PYTHONS_OWN)
    yield
    sys.setswitchinterval(before)


def seconds() -> float:
    """What it takes to wait a hundred times, as the event loop does for a few dozen tokens."""
    began = time.perf_counter()
    for _ in range(100):
        time.sleep(0.0001)
    return time.perf_counter() - began


async def test_threads_that_run_python_hold_the_event_loop_up_but_little() -> None:
    ended = False

    def compute() -> None:
        while not ended:
            pass

    async with serving():
        thread = threading.Thread(target=compute)
        thread.start()
        try:
            served = seconds()
            sys.setswitchinterval(PYTHONS_OWN)
            otherwise = seconds()
        finally:
            ended = True
    assert served < otherwise / 2
