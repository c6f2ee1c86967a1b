"""How setup.py has the CPU's kernels compiled."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

# What it would compile, where Paddle is the GPU build.
SHOW = """
import runpy, sys
from paddle.utils.cpp_extension import extension_utils
from setuptools.command.build_ext import build_ext
extension_utils.core.is_compiled_with_cuda = lambda: True
build_ext.build_extensions = lambda self: print(*self.extensions[0].extra_compile_args)
build_ext.copy_extensions_to_source = lambda self: None
sys.argv = ["setup.py", "--quiet", "build_ext", "--build-lib", sys.argv[1], "--build-temp", sys.argv[1]]
runpy.run_path("setup.py", run_name="__main__")
"""


def test_paddles_gpu_build_may_have_a_list_of_architectures(tmp_path: Path) -> None:
    shown = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SHOW, str(tmp_path)],
        cwd=ROOT, env=os.environ | {"PADDLE_CUDA_ARCH_LIST": "9.0"}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert shown.returncode == 0, shown.stderr
    flags = shown.stdout.split()
    assert "-DPADDLE_WITH_CUSTOM_KERNEL" in flags
    assert "-ffp-contract=off" in flags
    assert not any("arch=" in flag for flag in flags)
