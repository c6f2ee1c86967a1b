from __future__ import annotations

import msgspec
import pytest

from fdserve.errors import InvalidRequest
from fdserve.http.allowed_values import allowed_values
from fdserve.http.request import decode
from fdserve.protocol.chat import ChatRequest


@pytest.mark.parametrize(
    ("path", "values"),
    [
        ("messages[0].role", ["assistant", "developer", "function", "system", "tool", "user"]),
        ("tools[2].type", ["function"]),
        ("tool_choice", ["auto", "none", "required"]),
        ("tool_choice.type", ["function", "allowed_tools"]),
        ("tool_choice.allowed_tools.mode", ["auto", "required"]),
        ("response_format.type", ["json_object", "json_schema", "structural_tag", "text"]),
        ("logit_bias[...]", []),
        ("model", []),
        ("no.such[0].path", []),
        ("", []),
    ],
)
def test_the_values_at_a_path(path: str, values: list[str]) -> None:
    assert allowed_values(ChatRequest, path) == values


def test_an_error_lists_them() -> None:
    decoder = msgspec.json.Decoder(ChatRequest)
    for body, message in (
        (b'{"tool_choice": "any"}', "'tool_choice': invalid enum value 'any'. Supported values are: 'auto'"),
        (b'{"tool_choice": {"type": "tool"}}', "'tool_choice.type': invalid value 'tool'. Supported values are: 'func"),
        (b'{"tool_choice": 5}', "Invalid value for 'tool_choice': expected"),
        (b'{"logit_bias": {"the": 1}}', "Invalid value for a key of 'logit_bias': expected `int`, got `str`."),
    ):
        with pytest.raises(InvalidRequest) as caught:
            decode(body, decoder)
        assert message in caught.value.message
        assert "Supported values" in message or "Supported values" not in caught.value.message
