"""The emulated kernels, compiled once."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.cuda.harness import HERE, SOURCES, compile_emulated, link_emulated


@pytest.fixture(scope="session")
def objects(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return compile_emulated(tmp_path_factory.mktemp("emulated"))


@pytest.fixture(scope="session")
def library(objects: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The launchers and the bindings, compiled for the CPU, as a library of Paddle ops."""
    from paddle.utils.cpp_extension import CppExtension

    directory = tmp_path_factory.mktemp("emulated_ops")
    paddle = CppExtension([], name="paddle", extra_compile_args=[])
    includes = [f"-I{folder}" for folder in (HERE, SOURCES, *paddle.include_dirs)]
    flags = ["-std=c++17", "-O1", "-fPIC", "-DFDSERVE_EMULATED", *paddle.extra_compile_args]
    bindings = {source: directory / f"{source.stem}.o" for source in SOURCES.glob("bindings*.cc")}
    compilers = [
        subprocess.Popen(["g++", *flags, *includes, "-c", str(source), "-o", str(target)])
        for source, target in bindings.items()
    ]
    assert [compiler.wait(240) for compiler in compilers] == [0] * len(bindings)
    folders = [f"-L{folder}" for folder in paddle.library_dirs]
    return link_emulated([*objects, *bindings.values()], directory / "ops.so", *folders, *paddle.extra_link_args)
