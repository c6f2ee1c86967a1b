"""Fixtures that every test shares."""

from __future__ import annotations

import pytest
from hypothesis import settings

# How long an example takes says nothing on a machine with neighbours.
settings.register_profile("fdserve", deadline=None)
settings.load_profile("fdserve")


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    """Run each `@pytest.mark.anyio` test on both event loops."""
    return str(request.param)
