from __future__ import annotations

import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from fdserve import ops
from fdserve.ops import library
from tests.ops.arrays import normal, packed, tensor, values


def test_importing_the_face_imports_no_paddle() -> None:
    code = "import sys, fdserve.ops as o; assert o.kernels_path().suffix == '.so'; assert 'paddle' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_kernels_never_built_say_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(library, "_library", None)
    monkeypatch.setattr(library, "__file__", str(tmp_path / "library.py"))
    assert ops.kernels_path() is None
    with pytest.raises(ops.KernelsMissing, match="pip"):
        ops.num_threads()


def test_thread_counts() -> None:
    before = ops.num_threads()
    assert before >= 1
    ops.set_num_threads(3)
    assert ops.num_threads() == 3
    ops.set_num_threads(before)
    with pytest.raises(ValueError, match="at least 1"):
        ops.set_num_threads(0)


def test_a_call_releases_the_interpreters_lock() -> None:
    rng = np.random.default_rng(0)
    weight, x = packed(normal(rng, 4096, 1024), "float32"), tensor(normal(rng, 1024, 1024), "float32")
    steps = 0
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(lambda: [ops.linear(x, weight) for _ in range(3)])
        until = time.monotonic() + 30
        while not call.done() and time.monotonic() < until:
            steps += 1
        assert call.done()
    # A held lock would let this thread run only between the three calls.
    assert steps > 1000


def test_concurrent_callers_disturb_no_one(dtype: str) -> None:
    rng = np.random.default_rng(1)
    weight = packed(normal(rng, 300, 200, dtype=dtype), dtype)
    inputs = [tensor(normal(rng, rows, 200, dtype=dtype), dtype) for rows in (1, 5, 40, 400)]
    expected = [values(ops.linear(x, weight)) for x in inputs]
    start = threading.Barrier(4)

    def call(index: int) -> bool:
        start.wait(timeout=30)
        return all((values(ops.linear(inputs[index], weight)) == expected[index]).all() for _ in range(50))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(call, range(4)))


def test_idle_workers_sleep() -> None:
    """After a call the pool costs no processor time: many ranks share a machine."""
    ops.set_num_threads(3)
    x = tensor(np.ones((512, 512), np.float32), "float32")
    ops.swiglu(x)
    time.sleep(0.1)
    before = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before < 0.1
