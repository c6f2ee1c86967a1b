"""The emulated kernels, compiled once, whichever of the processes that share the tests out needs them first."""

from __future__ import annotations

import fcntl
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cuda.harness import EMULATOR, HERE, LAUNCHERS, SOURCES, compile_emulated, link_emulated


def made_once(directory: Path, make: Callable[[Path], None]) -> Path:
    """The directory that `make` fills, or has filled in another process of this run."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        directory = directory.parent.parent / directory.name
    with directory.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not directory.exists():
            unfinished = directory.with_suffix(".unfinished")
            unfinished.mkdir(exist_ok=True)
            make(unfinished)
            unfinished.rename(directory)
    return directory


@pytest.fixture(scope="session")
def objects(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    directory = made_once(tmp_path_factory.getbasetemp() / "emulated", compile_emulated)
    return [directory / f"{source.stem}.o" for source in (*LAUNCHERS, *EMULATOR)]


@pytest.fixture(scope="session")
def library(objects: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The launchers and the bindings, compiled for the CPU, as a library of Paddle ops."""

    def make(directory: Path) -> None:
        from paddle.utils.cpp_extension import CppExtension

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
        link_emulated([*objects, *bindings.values()], directory / "ops.so", *folders, *paddle.extra_link_args)

    return made_once(tmp_path_factory.getbasetemp() / "emulated_ops", make) / "ops.so"
