from __future__ import annotations

import itertools
import json
import time
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fdserve.text.tools_json import JsonScanner, StringDecoder

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)
# Close to JSON, and mostly none.
NEARLY = st.text(alphabet='{}[]",:\\u0129.eE+-tfn \n\x01', max_size=14)


def refuse(name: str) -> None:
    raise ValueError(name)


def reference(text: str) -> Any:
    """The value of a text that is JSON, control characters inside strings allowed; raises ValueError."""
    return json.loads(text, strict=False, parse_constant=refuse)


def scan(pieces: list[str]) -> tuple[JsonScanner, str, str]:
    """The scanner, what it passed on, and what it did not take."""
    scanner = JsonScanner()
    passed = ""
    for number, piece in enumerate(pieces):
        end, taken = scanner.push(piece, 0)
        passed += taken
        if scanner.done or scanner.failed:
            return scanner, passed, piece[end:] + "".join(pieces[number + 1 :])
        assert end == len(piece)
    return scanner, passed, ""


def pieces_of(text: str, cuts: list[int]) -> list[str]:
    edges = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    return [text[start:end] for start, end in itertools.pairwise(edges)]


@given(value=VALUES, ascii=st.booleans(), indent=st.sampled_from([None, 1]), rest=st.sampled_from(["", " x", "}", ","]))
def test_values_are_taken_whole_in_any_pieces(value: Any, ascii: bool, indent: int | None, rest: str) -> None:
    text = json.dumps([value], ensure_ascii=ascii, indent=indent)
    for pieces in [[text + rest], list(text + rest), *([text[:cut], text[cut:] + rest] for cut in range(len(text)))]:
        scanner, passed, left = scan(pieces)
        assert (scanner.done, passed, left) == (True, text, rest)


@settings(max_examples=1000)
@given(text=NEARLY, cuts=st.lists(st.integers(1, 14), max_size=3))
@example("-0.5e+1,", [])
@example("[01]", [])
@example('{"a":1,}', [])
@example('{"a" "b"}', [])
@example("[nul]", [])
@example('["\\u12x4"]', [])
def test_what_is_taken_is_json(text: str, cuts: list[int]) -> None:
    # In a list a number has an end.
    scanner, passed, left = scan(pieces_of(f"[{text}]", cuts))
    try:
        value = reference(f"[{text}]")
    except ValueError:
        assert not scanner.done or left
    else:
        assert (scanner.done, left) == (True, "")
        assert json.loads(passed) == value


@pytest.mark.parametrize(
    "text", ["1 ", "-0,", "12.5e-3]", "true,", "null}", '"a"', '"\\ud83d\\ude00"', "{}", "[ ]", ' \n{ "a" : [1 , 2] }']
)
def test_single_values(text: str) -> None:
    scanner, passed, left = scan(list(text))
    assert scanner.done
    assert reference(passed) == reference(text.rstrip(",]}" if passed != text else ""))
    assert passed + left == text


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        ("nope", "n"),
        ("NaN", ""),
        ("[1,]", "[1,"),
        ("-x", "-"),
        ("1.x", "1."),
        ('{"a"1', '{"a"'),
        ("{1", "{"),
        ('"\\x', '"\\'),
        ('"\\u00g', '"\\u00'),
        ("]", ""),
        ("{]", "{"),
        ("[}", "["),
    ],
)
def test_fails_at_the_first_character_that_cannot_be(text: str, valid: str) -> None:
    for pieces in ([text], list(text)):
        scanner, passed, left = scan(pieces)
        assert (scanner.failed, passed, left) == (True, valid, text[len(valid) :])


def test_control_characters_become_escapes() -> None:
    scanner, passed, _ = scan(["[\n\t", '"a\nb\t\x01', '\r"', "\r]"])
    assert scanner.done
    assert passed == '[\n\t"a\\nb\\t\\u0001\\r"\r]'


def test_depth_costs_nothing() -> None:
    scanner = JsonScanner()
    started = time.process_time()
    for piece in ['[{"a":'] * 50_000 + ["1"] + ["}]"] * 50_000:
        scanner.push(piece, 0)
    assert scanner.done
    assert time.process_time() - started < 3


def decode(pieces: list[str]) -> tuple[StringDecoder, str, str]:
    decoder = StringDecoder()
    decoded = ""
    text = "".join(pieces)
    left = 0
    for piece in pieces:
        at = 0
        while at < len(piece) and not decoder.done and not decoder.failed:
            at, part = decoder.step(piece, at)
            decoded += part
        left += at
    return decoder, decoded, text[left:]


ESCAPES = st.lists(
    st.sampled_from(["\\n", "\\u00e9", "\\ud83d", "\\ude00", '\\"', "\\\\", "\\/", "a", "é", "😀", "\n", "{"]),
    max_size=8,
)


@given(parts=ESCAPES)
def test_strings_are_decoded_in_any_pieces(parts: list[str]) -> None:
    text = "".join(parts) + '"'
    # A surrogate alone has no UTF-8.
    expected = json.loads('"' + text, strict=False).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    for cut in range(len(text)):
        decoder, decoded, left = decode([text[:cut], text[cut:] + "rest"])
        assert (decoder.done, left) == (True, "rest")
        assert decoded == expected
    assert decode(list(text))[1] == expected


@pytest.mark.parametrize(("text", "left"), [("a\\xb", "xb"), ("\\u00zz", "zz"), ("\\ud83d\\u12\\", "\\")])
def test_a_bad_escape_fails(text: str, left: str) -> None:
    for pieces in ([text], list(text)):
        decoder, _, rest = decode(pieces)
        assert decoder.failed
        assert rest == left
        assert text.endswith(decoder.escape + left)
