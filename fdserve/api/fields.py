"""From a body to a request: the places where a field may stand."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

import msgspec

from fdserve.http.request import decode
from fdserve.protocol.chat import ChatRequest, ConversationRequest
from fdserve.protocol.completion import CompletionRequest
from fdserve.protocol.generation import GenerationRequest
from fdserve.protocol.messages import CountTokensRequest, MessagesRequest
from fdserve.protocol.responses import ResponsesRequest

R = TypeVar("R", bound=GenerationRequest)

# Fields that OpenAI does not have, and its reasoning_effort; a client may also put them into chat_template_kwargs.
EXTRA_FIELDS = frozenset(
    {"top_k", "min_p", "min_tokens", "repetition_penalty", "bad_words", "bad_words_token_ids", "allowed_token_ids"}
    | {"stop_token_ids", "ignore_eos", "include_stop_str_in_output", "skip_special_tokens"}
    | {"guided_json", "guided_regex", "guided_choice", "guided_grammar", "structural_tag", "structured_outputs"}
    | {"prompt_logprobs", "temp_scaled_logprobs", "top_p_normalized_logprobs", "return_token_ids"}
    | {"prompt_token_ids", "truncate_prompt_tokens", "disable_chat_template", "chat_template"}
    | {"add_generation_prompt", "continue_final_message", "enable_thinking", "reasoning_effort"}
    | {"reasoning_max_tokens", "response_max_tokens", "max_streaming_response_tokens"}
    | {"priority", "cache_salt", "request_id", "logits_processors_args"}
)

_KINDS = (ChatRequest, CompletionRequest, ResponsesRequest, MessagesRequest, CountTokensRequest)
_DECODERS: dict[type, msgspec.json.Decoder[Any]] = {kind: msgspec.json.Decoder(kind) for kind in _KINDS}

_NOTHING, _NULL = msgspec.Raw(), msgspec.Raw(b"null")


class _Places(msgspec.Struct):
    """Where fields may stand besides the body itself."""

    extra_body: msgspec.Raw = _NOTHING
    chat_template_kwargs: msgspec.Raw = _NOTHING


_PLACES = msgspec.json.Decoder(_Places)


def _raw_decoder(names: Iterable[str]) -> msgspec.json.Decoder[msgspec.Struct]:
    """Takes the fields of these names out of an object as text: an object may have any number of others."""
    return msgspec.json.Decoder(msgspec.defstruct("Fields", [(name, msgspec.Raw, _NOTHING) for name in names]))


_OF_KINDS: dict[type, msgspec.json.Decoder[msgspec.Struct]] = {
    kind: _raw_decoder(kind.__struct_fields__) for kind in _KINDS
}
_OF_KWARGS = _raw_decoder(EXTRA_FIELDS)


def read_request(body: bytes, kind: type[R]) -> R:
    """The request in a JSON body.

    Fields inside `extra_body`, and those of EXTRA_FIELDS inside a chat's `chat_template_kwargs`, count like fields of
    the body: the body's come first, then those of extra_body, then those of chat_template_kwargs. Raises
    InvalidRequest.
    """
    # They are put together as text: the objects of a large body take seconds, in which no other request goes on.
    places = decode(body, _PLACES)
    kwargs = places.chat_template_kwargs if issubclass(kind, ConversationRequest) else _NOTHING
    if _is_object(places.extra_body) or _is_object(kwargs):
        body = msgspec.json.encode(_gathered(body, kind))
    request: R = decode(body, _DECODERS[kind])
    return request


def _gathered(body: bytes, kind: type[GenerationRequest]) -> dict[str, msgspec.Raw]:
    fields = _given(body, _OF_KINDS[kind])
    if _is_object(fields.get("extra_body", _NOTHING)):
        extra = fields.pop("extra_body")
        fields = {**_given(extra, _OF_KINDS[kind]), **fields}
    if issubclass(kind, ConversationRequest) and _is_object(kwargs := fields.get("chat_template_kwargs", _NOTHING)):
        fields = {**_given(kwargs, _OF_KWARGS), **fields}
    return fields


def _is_object(value: msgspec.Raw) -> bool:
    return bytes(memoryview(value)[:1]) == b"{"


def _given(text: bytes | msgspec.Raw, decoder: msgspec.json.Decoder[msgspec.Struct]) -> dict[str, msgspec.Raw]:
    """The fields of an object that the decoder knows, but for those that are null."""
    fields = msgspec.structs.asdict(decode(bytes(text), decoder))
    return {name: value for name, value in fields.items() if value not in (_NOTHING, _NULL)}
