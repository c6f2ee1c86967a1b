"""From a body to a request: the places where a field may stand."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from fdserve.http.errors import invalid_field
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


def read_request(body: bytes, kind: type[R]) -> R:
    """The request in a JSON body.

    Fields inside `extra_body`, and those of EXTRA_FIELDS inside a chat's `chat_template_kwargs`, count like fields of
    the body: the body's come first, then those of extra_body, then those of chat_template_kwargs. Raises
    InvalidRequest.
    """
    request: R = decode(body, _DECODERS[kind])
    if not request.extra_body and not getattr(request, "chat_template_kwargs", None):
        return request
    fields = _given(msgspec.json.decode(body))
    fields = {**_given(fields.pop("extra_body", {})), **fields}
    kwargs = fields.get("chat_template_kwargs")
    if issubclass(kind, ConversationRequest) and isinstance(kwargs, dict):
        fields = {**{name: kwargs[name] for name in EXTRA_FIELDS & kwargs.keys()}, **fields}
    try:
        return msgspec.convert(fields, kind, str_keys=True)
    except msgspec.ValidationError as error:
        raise invalid_field(str(error), kind) from None


def _given(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}
