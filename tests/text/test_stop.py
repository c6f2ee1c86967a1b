from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fdserve.text.stop import StopStrings, StopTable

LETTERS = "abc\n"
STOPS = st.lists(st.text(LETTERS, min_size=1, max_size=5), max_size=4)
TEXT = st.text(LETTERS, max_size=40)


def expected(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """By the definition: look at every prefix of the text, the shortest first."""
    for end in range(1, len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end if include else end - len(stop)], stop
    return text, None


def cut(text: str, sizes: list[int]) -> list[str]:
    pieces = []
    for size in sizes:
        pieces.append(text[:size])
        text = text[size:]
    return [*pieces, text]


@given(text=TEXT, stops=STOPS, include=st.booleans(), sizes=st.lists(st.integers(0, 6), max_size=12))
def test_any_split_gives_what_the_definition_gives(
    text: str, stops: list[str], include: bool, sizes: list[int]
) -> None:
    stop_strings = StopStrings(StopTable(stops), include)
    emitted, matches = "", []
    for piece in cut(text, sizes):
        emit, match = stop_strings.push(piece)
        emitted += emit
        matches.append(match)
    emitted += stop_strings.flush()
    wanted, matched = expected(text, stops, include)
    assert emitted == wanted
    assert [match for match in matches if match is not None] == ([matched] if matched else [])
    assert stop_strings.matched == matched


@given(text=TEXT, stops=STOPS)
def test_holds_back_no_more_than_could_still_match(text: str, stops: list[str]) -> None:
    stop_strings = StopStrings(StopTable(stops))
    emitted, match = stop_strings.push(text)
    if match is None:
        held = text[len(emitted) :]
        assert held == "" or any(stop.startswith(held) for stop in stops)
        longer = (text[-size:] for size in range(len(held) + 1, len(text) + 1))
        assert not any(stop.startswith(suffix) for suffix in longer for stop in stops)


@pytest.mark.parametrize(
    ("stops", "text", "emit", "matched"),
    [
        (["\n\n"], "a\nb\n\nc", "a\nb", "\n\n"),
        (["abc", "b"], "xabc", "xa", "b"),  # "b" is complete first
        (["bc", "abc"], "xabc", "x", "abc"),  # both with "c": the longer
        (["abcd", "bc"], "abcd", "a", "bc"),  # inside a longer one that is under way
        (["aab"], "aaab", "a", "aab"),
        ([""], "abc", "abc", None),
        ([], "abc", "abc", None),
        (["世界"], "你好世界!", "你好", "世界"),
    ],
)
def test_examples(stops: list[str], text: str, emit: str, matched: str | None) -> None:
    assert StopStrings(StopTable(stops)).push(text) == (emit, matched)


def test_nothing_follows_a_match() -> None:
    stop_strings = StopStrings(StopTable(["END"]))
    assert stop_strings.push("xEN") == ("x", None)
    assert stop_strings.push("Dy") == ("", "END")
    assert stop_strings.push("z") == ("", None)
    assert stop_strings.flush() == ""


def test_held_text_with_the_stop_string_included() -> None:
    stop_strings = StopStrings(StopTable(["END"]), include_in_output=True)
    assert stop_strings.push("xEN") == ("x", None)
    assert stop_strings.push("Dy") == ("END", "END")


def test_long_stop_strings_cost_no_more() -> None:
    started = time.process_time()
    stop_strings = StopStrings(StopTable(["a" * 20_000 + "b"] + [f"{'ab' * 1000}{i}" for i in range(16)]))
    emitted = "".join(stop_strings.push("a")[0] for _ in range(100_000)) + stop_strings.flush()
    assert emitted == "a" * 100_000
    assert time.process_time() - started < 5
