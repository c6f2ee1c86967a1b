"""`python kernels/cuda/build.py`: compile the CUDA kernels and their bindings into fdserve/ops/_kernels_cuda.so.

It needs nvcc and an installed Paddle, for its headers; no GPU, and the CPU's Paddle will do. The architectures are
those of FDSERVE_CUDA_ARCHS ("80 90a 100 120" without): code for each, and for later ones PTX of the last.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).parent
TARGET = HERE.parents[1] / "fdserve/ops/_kernels_cuda.so"
ARCHITECTURES = "80 90a 100 120"
FLAGS = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden"]


def code_flags(architectures: list[str]) -> list[str]:
    """nvcc's -gencode flags."""
    flags = [f"-gencode=arch=compute_{each},code=sm_{each}" for each in architectures]
    # What is named with an "a" runs nowhere else, its PTX neither.
    plain = [each for each in architectures if each.isdecimal()]
    return flags + [f"-gencode=arch=compute_{each},code=compute_{each}" for each in plain[-1:]]


def include_flags(nvcc: str) -> list[str]:
    """Where Paddle's and CUDA's headers are. CUDA 13 keeps thrust, which Paddle includes, in a folder of its own."""
    headers = _paddle() / "include"
    cuda = _cuda_include(nvcc)
    return [f"-I{folder}" for folder in (HERE, headers, headers / "third_party", cuda, cuda / "cccl")]


def _paddle() -> Path:
    """Where the package is. Imports nothing of it."""
    paddle = find_spec("paddle")
    if paddle is None or paddle.origin is None:
        sys.exit("Paddle is not installed for this Python: its headers are needed.")
    return Path(paddle.origin).parent


def _cuda_include(nvcc: str) -> Path:
    """nvcc says it in a dry run; its own place is no guide where it is a wrapper."""
    with tempfile.NamedTemporaryFile(suffix=".cu") as empty:
        told = subprocess.run([nvcc, "--dryrun", "-c", empty.name], capture_output=True, text=True, check=True).stderr
    top = next(line.partition("TOP=")[2].strip() for line in told.splitlines() if "TOP=" in line)
    return Path(top) / "include"


def main() -> None:
    """Compile, on as many cores as --jobs says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=TARGET, help="the library (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compilers at a time")
    arguments = parser.parse_args()
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        sys.exit("nvcc, CUDA's compiler, was not found.")
    architectures = os.environ.get("FDSERVE_CUDA_ARCHS", ARCHITECTURES).split()
    with tempfile.TemporaryDirectory() as folder:
        commands = []
        for source in sorted(HERE.glob("*.cu")):
            target = Path(folder) / f"{source.stem}.o"
            commands.append([nvcc, *FLAGS, *code_flags(architectures), "-c", str(source), "-o", str(target)])
        # The bindings hold no device code, and the host's compiler alone is content with Paddle's headers.
        bindings = ["g++", "-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-w"]
        bindings += ["-DPADDLE_WITH_CUDA", "-DPADDLE_WITH_CUSTOM_KERNEL"]
        for source in sorted(HERE.glob("bindings*.cc")):
            target = Path(folder) / f"{source.stem}.o"
            commands.append([*bindings, *include_flags(nvcc), "-c", str(source), "-o", str(target)])
        with ThreadPoolExecutor(arguments.jobs) as pool:
            statuses = list(pool.map(lambda command: subprocess.run(command, check=False).returncode, commands))
        if any(statuses):
            sys.exit("a kernel does not compile")
        objects = [command[-1] for command in commands]
        libraries = _paddle() / "base"
        paddle = [f"-L{libraries}", "-l:libpaddle.so", f"-L{_paddle() / 'libs'}"]
        linker = ["-Xlinker", "--allow-shlib-undefined,--no-as-needed"]
        subprocess.run([nvcc, "-shared", *linker, "-o", str(arguments.out), *objects, *paddle], check=True)
    print(f"compiled {arguments.out} for {' '.join(architectures)}")


if __name__ == "__main__":
    main()
