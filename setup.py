"""Compiles kernels/ into fdserve/ops/_kernels*.so; everything else about the package is in pyproject.toml."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# No -march: a wheel travels, so the kernels choose an instruction set when they run.
# Contraction off: batch invariance needs a multiply-add to be fused where the source says so, and nowhere else.
FLAGS = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno"]


class BuildKernels(build_ext):
    """Compiles against the headers of the Paddle that is installed where the build runs."""

    def run(self) -> None:
        compiler = shlex.split(os.environ.get("CXX", "g++"))[0]
        if shutil.which(compiler) is None:
            sys.exit(f"fdserve needs a C++17 compiler to build its kernels, and {compiler!r} was not found.")
        from paddle.utils.cpp_extension import CppExtension

        # By compiler: where PADDLE_CUDA_ARCH_LIST is set, Paddle's GPU build cannot do with a list for all of them.
        paddle = CppExtension([], name="paddle", extra_compile_args={"cxx": []})
        for extension in self.extensions:
            extension.include_dirs += paddle.include_dirs
            extension.library_dirs += paddle.library_dirs
            extension.extra_compile_args += paddle.extra_compile_args["cxx"]
            # A wheel should not name the build's folders: no run-time paths (Paddle is always loaded first), and
            # Paddle's own error messages without its headers' location.
            extension.extra_link_args += paddle.extra_link_args
            extension.extra_compile_args += [f"-fmacro-prefix-map={folder}=." for folder in paddle.include_dirs]
        super().run()
        if not self.inplace:
            # The package in the sources hides the installed one from whoever runs Python here: it gets the library too.
            self.copy_extensions_to_source()


kernels = Extension(
    "fdserve.ops._kernels",
    sources=sorted(str(path) for path in Path("kernels/cpu").glob("*.cc")),
    depends=sorted(str(path) for path in Path("kernels/cpu").glob("*.h")),
    language="c++",
    extra_compile_args=FLAGS,
)
setup(ext_modules=[kernels], cmdclass={"build_ext": BuildKernels})
