from __future__ import annotations

from fdserve.server.running_requests import RunningRequests


def test_running_requests_are_cancelled_by_any_of_their_ids() -> None:
    running = RunningRequests()
    cancelled: list[str] = []
    with running.register(["response-1", "mine"], lambda: cancelled.append("first")):
        assert running.cancel("response-1")
        assert running.cancel("mine")
        assert cancelled == ["first", "first"]
        assert not running.cancel("other")
    assert not running.cancel("mine")


def test_running_requests_of_one_id_are_cancelled_together() -> None:
    running = RunningRequests()
    cancelled: list[str] = []
    with running.register(["mine"], lambda: cancelled.append("first")):
        with running.register(["mine", "mine"], lambda: cancelled.append("second")):
            assert running.cancel("mine")
            assert sorted(cancelled) == ["first", "second"]
        cancelled.clear()
        assert running.cancel("mine")
        assert cancelled == ["first"]


def test_a_request_that_ends_while_it_is_cancelled() -> None:
    running = RunningRequests()
    calls: list[str] = []

    def leave() -> None:
        first.__exit__(None, None, None)

    first = running.register(["mine"], leave)
    second = running.register(["mine"], lambda: calls.append("second"))
    first.__enter__()
    second.__enter__()
    assert running.cancel("mine")
    assert calls == ["second"]
    second.__exit__(None, None, None)
    assert not running.cancel("mine")
