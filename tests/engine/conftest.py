"""Fixtures for tests of the engine over fake ranks."""

from __future__ import annotations

import pytest


@pytest.fixture
def quick_restarts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lost ranks start again after a moment, for tests that do not look at the time between."""
    monkeypatch.setattr("fdserve.engine.engine.MAX_BACKOFF_SECONDS", 0.05)
