"""Compiles the CUDA launchers alone, without Paddle, into a library for the checks and timings."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

from tests.cuda.harness import LAUNCHERS, SOURCES


def build(library: Path, architecture: str) -> None:
    """Compile for one architecture ("90a"), all sources at a time. Raises CalledProcessError."""
    target = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    with tempfile.TemporaryDirectory() as directory:
        objects = [Path(directory) / f"{source.stem}.o" for source in LAUNCHERS]
        flags = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC", target, f"-I{SOURCES}"]
        commands = [
            ["nvcc", *flags, "-c", str(source), "-o", str(target)]
            for source, target in zip(LAUNCHERS, objects, strict=True)
        ]
        processes = [subprocess.Popen(command) for command in commands]
        for process, status in [(process, process.wait()) for process in processes]:
            if status:
                raise subprocess.CalledProcessError(status, process.args)
        subprocess.run(["nvcc", "-shared", "-o", str(library), *map(str, objects)], check=True)
