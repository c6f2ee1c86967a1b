"""Every kernel is tested on each instruction set this CPU has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fdserve.ops import library, set_num_threads


@pytest.fixture(params=["baseline-float32", "avx2-float32", "avx512-float32", "avx512bf16-bfloat16", "amx-bfloat16"])
def dtype(request: pytest.FixtureRequest) -> Iterator[str]:
    """A compute dtype, with the instruction set it is computed on forced; two threads."""
    isa, dtype = request.param.split("-")
    try:
        library.force_isa(isa)
    except ValueError as error:
        pytest.skip(str(error))
    set_num_threads(2)
    yield dtype
    library.force_isa(None)


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """An instruction set, forced, for ops that compute in float32 alone; two threads."""
    try:
        library.force_isa(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    set_num_threads(2)
    yield request.param
    library.force_isa(None)
