"""The CUDA kernels and their bindings compile, where CUDA's compiler is."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

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


@cache
def ptx_of(source: str) -> str:
    """A source, compiled for Hopper."""
    with TemporaryDirectory() as directory:
        out = Path(directory) / "kernels.ptx"
        command = ["nvcc", "-std=c++17", "-O3", "-arch=sm_90", "-ptx", str(SOURCES / source), "-o", str(out)]
        subprocess.run(command, check=True, timeout=120)
        return out.read_text()


@pytest.mark.skipif(not has_nvcc(), reason="needs nvcc")
@pytest.mark.parametrize("source", ["rows.cu", "rope.cu"])
def test_rows_are_read_and_written_16_bytes_at_a_time(source: str) -> None:
    """Compilers take vectors apart where a program looks at their elements alone."""
    accesses = re.findall(r"(?:ld|st)\.global\S*", ptx_of(source))
    assert any(".v4." in access for access in accesses)
    assert [access for access in accesses if access.endswith("16")] == []


@pytest.mark.skipif(not has_nvcc(), reason="needs nvcc")
def test_a_row_is_under_way_before_any_of_it_is_waited_for() -> None:
    """Both vectors that a thread has of the row, and of the residual, are loaded before the first sum."""
    ptx = ptx_of("rows.cu")
    kernel = ptx[re.search(r"\.entry \S*rms_norm_kernelI13__nv_bfloat16Li2E", ptx).end() :]  # type: ignore[union-attr]
    before = re.split(r"(?:add|fma|mul)\S*\.f32", kernel, maxsplit=1)[0]
    assert len(re.findall(r"ld\.global\S*v4", before)) >= 4


@pytest.mark.skipif(not has_nvcc(), reason="needs nvcc")
@pytest.mark.parametrize("source", ["attention.cu", "rows.cu"])
def test_kernels_keep_to_their_registers(source: str, tmp_path: Path) -> None:
    """Of Hopper. The wide kernels of attention have their totals in memory: they, and little else. And no product of a
    warpgroup is waited for sooner than the source says."""
    command = ["nvcc", "-std=c++17", "-O3", "-gencode=arch=compute_90a,code=sm_90a", "-Xptxas", "-v", "-cubin"]
    told = subprocess.run(
        [*command, str(SOURCES / source), "-o", str(tmp_path / "kernels.cubin")],
        capture_output=True, text=True, check=True, timeout=170,
    ).stderr  # fmt: skip
    frames = re.findall(r"Function properties for (\S+)\s+(\d+) bytes stack frame", told)
    assert len(frames) >= 8
    for name, frame in frames:
        head_dim = 128 if "Li128E" in name else 64
        # A wide kernel's may not all fit the registers besides.
        kept = {"11wide_kernel": head_dim * 4 + 64, "13hopper_kernel": head_dim * 2}
        assert int(frame) <= sum(size for kernel, size in kept.items() if kernel in name), name
    assert "serialized" not in told


def fast_flags() -> list[str]:
    """What has nvcc leave out optimizations, where it knows how to: they take most of the time and refuse no source."""
    told = subprocess.run(["nvcc", "--help"], capture_output=True, text=True, check=True, timeout=30).stdout
    return ["--Ofast-compile=max"] if "--Ofast-compile" in told else []


def test_the_structures_are_those_of_the_launchers(tmp_path: Path) -> None:
    """Sizes and offsets as the C++ compiler sees them."""
    from tests.cuda.attention import CPaged
    from tests.cuda.checks import CMoe
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
        for field, *_ in kind._fields_:
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
