"""Bodies of many values are refused by their text."""

from __future__ import annotations

import msgspec
import pytest

from fdserve.errors import PayloadTooLarge
from fdserve.http.body_values import MAX_VALUES, check_values
from tests.http.client import serving

MANY = MAX_VALUES + 1


@pytest.mark.parametrize(
    "value",
    [
        [[]] * MAX_VALUES,
        [{}] * MAX_VALUES,
        [""] * MAX_VALUES,
        ['\\"'] * MAX_VALUES,
        ["[\\"] * MAX_VALUES,
        {str(key): 0 for key in range(MAX_VALUES)},
        [["[" * MAX_VALUES]] + [[]] * (MAX_VALUES - 1),
    ],
)
def test_too_many_values(value: object) -> None:
    with pytest.raises(PayloadTooLarge):
        check_values(msgspec.json.encode(value))


@pytest.mark.parametrize(
    "value",
    [
        [[]] * (MAX_VALUES - 1),
        [1] * (2 * MANY),
        "[" * MANY,
        '"' * (2 * MANY),
        '\\"' * MANY,
        ["\n", "[{" * MANY, "\\", "{" * MANY],
        {"a\n": "[" * MANY, "b\\": '"[' * MANY},
    ],
)
def test_brackets_and_quotes_of_texts_are_no_values(value: object) -> None:
    check_values(msgspec.json.encode(value))


@pytest.mark.anyio
async def test_a_request_of_too_many_values() -> None:
    async with serving() as client:
        response = await client.chat(metadata={"a": [[]] * MANY})
        assert (response.status, response.error["code"]) == (413, "request_too_large")
        assert (await client.chat(metadata={"a": "[" * MANY})).status == 200
