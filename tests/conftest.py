"""Fixtures that every test shares."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

# How long an example takes says nothing on a machine with neighbours.
settings.register_profile("fdserve", deadline=None)
settings.load_profile("fdserve")

# Begun before all others, or one process would end with a long file when the other has none left; by turns those that
# compute and those that mostly wait.
LONG = [
    "http/test_schemathesis.py",
    "e2e/test_chaos.py",
    "cuda/test_compile.py",
    "e2e/test_hosts.py",
    "e2e/test_tensor_parallel.py",
    "cuda/test_emulated_model.py",
    "e2e/test_server.py",
    "e2e/test_real_shape.py",
    "e2e/test_sampling_params.py",
    "cuda/test_emulated.py",
    "cuda/test_emulated_ranks.py",
    "e2e/test_reproducible.py",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the long files first."""
    places = {Path(__file__).parent / name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    """Run each `@pytest.mark.anyio` test on both event loops."""
    return str(request.param)
