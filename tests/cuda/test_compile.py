"""The CUDA kernels and their bindings compile, where CUDA's compiler is."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cuda.harness import SOURCES, has_nvcc


@pytest.mark.skipif(not has_nvcc(), reason="needs nvcc")
def test_everything_compiles_and_links(tmp_path: Path) -> None:
    out = tmp_path / "kernels.so"
    command = [sys.executable, str(SOURCES / "build.py"), "--out", str(out), "--jobs", "2"]
    environment = {**os.environ, "FDSERVE_CUDA_ARCHS": "80 90a", "NVCC_APPEND_FLAGS": " ".join(fast_flags())}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    symbols = out.read_bytes()
    for name in (
        "rms_norm",
        "swiglu",
        "rope_and_store",
        "attention",
        "moe",
        "sample",
        "quant_linear",
        "sum_ranks",
        "sample_settle",
    ):
        assert f"fdserve_cuda_{name}".encode() in symbols


def fast_flags() -> list[str]:
    """What has nvcc leave out optimizations, where it knows how to: they take most of the time and refuse no source."""
    told = subprocess.run(["nvcc", "--help"], capture_output=True, text=True, check=True, timeout=30).stdout
    return ["--Ofast-compile=max"] if "--Ofast-compile" in told else []


def test_the_structures_are_those_of_the_launchers(tmp_path: Path) -> None:
    """Sizes and offsets as the C++ compiler sees them."""
    from tests.cuda.checks import CMoe, CPaged
    from tests.cuda.sampling import CSample
    from tests.cuda.sampling_ranks import CRanks, CSizes

    lines = []
    expected = []
    kinds: list[tuple[str, type[ctypes.Structure]]] = [
        *[("FdservePaged", CPaged), ("FdserveMoe", CMoe), ("FdserveSample", CSample)],
        *[("FdserveRanks", CRanks), ("FdserveSampleSizes", CSizes)],
    ]
    for name, kind in kinds:
        lines.append(f'std::printf("%zu\\n", sizeof({name}));')
        expected.append(ctypes.sizeof(kind))
        for field, _ in kind._fields_:
            lines.append(f'std::printf("%zu\\n", offsetof({name}, {field}));')
            expected.append(getattr(kind, field).offset)
    source = tmp_path / "layout.cc"
    body = "\n".join(lines)
    source.write_text(
        f'#include <cstddef>\n#include <cstdio>\n#include "launchers.h"\nint main() {{\n{body}\n}}\n', encoding="utf-8"
    )
    program = tmp_path / "layout"
    headers = [f"-I{SOURCES}", f"-I{Path(__file__).parent}", "-DFDSERVE_EMULATED"]
    subprocess.run(["g++", "-std=c++17", *headers, str(source), "-o", str(program)], check=True, timeout=120)
    told = subprocess.run([str(program)], capture_output=True, text=True, check=True, timeout=30).stdout
    assert [int(line) for line in told.split()] == expected
