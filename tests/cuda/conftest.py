"""The emulated kernels, compiled once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cuda.harness import compile_emulated


@pytest.fixture(scope="session")
def objects(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return compile_emulated(tmp_path_factory.mktemp("emulated"))
