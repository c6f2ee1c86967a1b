"""Fixtures for tests of the engine over fake ranks."""

from __future__ import annotations

import pytest


@pytest.fixture
def quick_restarts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lost ranks start again after a moment, for tests that do not look at the time between."""
    monkeypatch.setattr("fdserve.engine.engine.MAX_BACKOFF_SECONDS", 0.05)


@pytest.fixture
def always_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step that computes as many tokens as the one before it is followed by one that is planned while it runs."""
    monkeypatch.setattr("fdserve.engine.pace.SHORT_SECONDS", -1.0)
