"""From a request's fields to sampling parameters, with the checks that types alone cannot make."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, TypeVar

import msgspec

from fdserve.api.models import check_model
from fdserve.engine.request import SamplingParams
from fdserve.errors import InvalidRequest
from fdserve.http.errors import invalid_field
from fdserve.http.request import decode
from fdserve.protocol.chat import ChatRequest
from fdserve.protocol.completion import CompletionRequest
from fdserve.protocol.generation import GenerationRequest
from fdserve.server import Server

R = TypeVar("R", bound=GenerationRequest)

MIN_TEMPERATURE = 1e-5  # below it sampling is greedy, as in FastDeploy
MIN_TOP_P = 1e-5
MAX_STOP_CHARACTERS = 16_384

# Fields that OpenAI does not have; a client may also put them into chat_template_kwargs.
EXTRA_FIELDS = frozenset(
    {"top_k", "min_p", "min_tokens", "repetition_penalty", "stop_token_ids", "ignore_eos", "return_token_ids"}
    | {"include_stop_str_in_output", "skip_special_tokens", "enable_thinking", "reasoning_max_tokens", "priority"}
)

_UNSUPPORTED = (
    *("logit_bias", "bad_words", "bad_words_token_ids", "logits_processors_args", "prompt_logprobs"),
    *("temp_scaled_logprobs", "top_p_normalized_logprobs"),
    *("guided_json", "guided_regex", "guided_choice", "guided_grammar", "structural_tag"),
    *("functions", "function_call", "audio", "suffix", "echo"),
)
_DECODERS: dict[type, msgspec.json.Decoder[Any]] = {
    kind: msgspec.json.Decoder(kind) for kind in (ChatRequest, CompletionRequest)
}


def read_request(body: bytes, kind: type[R]) -> R:
    """The request in a JSON body.

    Fields inside `extra_body`, and FastDeploy's own inside a chat's `chat_template_kwargs`, count like fields of the
    body: the body's come first, then those of extra_body, then those of chat_template_kwargs. Raises InvalidRequest.
    """
    request: R = decode(body, _DECODERS[kind])
    if not request.extra_body and not getattr(request, "chat_template_kwargs", None):
        return request
    fields = {name: value for name, value in msgspec.json.decode(body).items() if value is not None}
    fields = {**fields.pop("extra_body", {}), **fields}
    kwargs = fields.get("chat_template_kwargs")
    if kind is ChatRequest and isinstance(kwargs, dict):
        fields = {**{name: kwargs[name] for name in EXTRA_FIELDS & kwargs.keys()}, **fields}
    try:
        return msgspec.convert(fields, kind)
    except msgspec.ValidationError as error:
        raise invalid_field(str(error)) from None


def check_request(request: GenerationRequest, server: Server) -> None:
    """Raise NotFound for another model, InvalidRequest for fields that contradict each other or are not supported."""
    check_model(server, request.model)
    if request.stream_options is not None and not request.stream:
        raise InvalidRequest("stream_options is only allowed when stream is true.", param="stream_options")
    for name in _UNSUPPORTED:
        if not _is_neutral(getattr(request, name, None)):
            raise unsupported(name)
    if request.response_format is not None and request.response_format.get("type") != "text":
        raise unsupported("response_format", "with another type than 'text' ")


def unsupported(name: str, which: str = "") -> InvalidRequest:
    """The error for a field that would change the output and cannot be honoured."""
    return InvalidRequest(f"{name} {which}is not supported yet.", param=name, code="unsupported_parameter")


def _is_neutral(value: object) -> bool:
    """Whether a value asks for nothing: null, false, or something empty."""
    return value is None or value is False or (isinstance(value, (str, list, dict)) and not value)


def check_logprobs(wanted: bool, server: Server) -> None:
    """Raise InvalidRequest if a request wants logprobs and the server was started without them."""
    if wanted and not server.config.enable_logprob:
        raise InvalidRequest("Logprobs is disabled, please enable it in startup config.", param="logprobs")


def check_choices(count: int, server: Server, param: str) -> None:
    """Raise InvalidRequest if a request asks for more choices in all than the server ever takes."""
    limit = server.config.max_concurrency
    if count > limit:
        raise InvalidRequest(f"The request asks for {count} choices; this server takes {limit} at most.", param=param)


def check_token_ids(token_ids: Sequence[int], server: Server, param: str) -> None:
    """Raise InvalidRequest if an id is none of the model's."""
    size = server.model.vocab_size
    if token_ids and max(token_ids) >= size:
        message = f"Token id {max(token_ids)} is out of range: the model has ids from 0 to {size - 1}."
        raise InvalidRequest(message, param=param)


def stop_strings(request: GenerationRequest) -> list[str]:
    """The stop strings as a list. Raises InvalidRequest if matching them would hold up other requests."""
    stops = [request.stop] if isinstance(request.stop, str) else list(request.stop or ())
    if sum(map(len, stops)) > MAX_STOP_CHARACTERS:
        message = f"The stop strings have more than {MAX_STOP_CHARACTERS} characters together."
        raise InvalidRequest(message, param="stop")
    return stops


def sampling_params(
    request: GenerationRequest,
    server: Server,
    *,
    prompt_tokens: int,
    max_tokens: int | None,
    logprobs: int | None,
    param: str,
) -> SamplingParams:
    """The parameters of a request's first choice; see `for_choice` for the others.

    `max_tokens` of None fills the context. `param` is the field that the prompt came in. Raises InvalidRequest
    when the prompt leaves no room for a token.
    """
    room = server.engine.max_model_len - prompt_tokens
    if room < 1:
        raise InvalidRequest(
            f"This model's maximum context length is {server.engine.max_model_len} tokens. However, your {param} "
            f"resulted in {prompt_tokens} tokens. Please reduce the length of the {param}.",
            param=param,
            code="context_length_exceeded",
        )
    min_tokens = request.min_tokens or 0
    if max_tokens is not None and min_tokens > max_tokens:
        raise InvalidRequest(f"min_tokens is {min_tokens}, more than max_tokens ({max_tokens}).", param="min_tokens")
    limit = room if max_tokens is None else min(room, max_tokens)
    stop_token_ids = tuple(request.stop_token_ids or ())
    check_token_ids(stop_token_ids, server, "stop_token_ids")
    defaults = server.defaults
    temperature = _first(request.temperature, defaults.temperature, 1.0)
    return SamplingParams(
        max_tokens=limit,
        min_tokens=min(min_tokens, limit),
        seed=random.getrandbits(63) if request.seed is None else request.seed,
        temperature=temperature if temperature >= MIN_TEMPERATURE else 0.0,
        top_p=max(_first(request.top_p, defaults.top_p, 1.0), MIN_TOP_P),
        top_k=min(max(int(_first(request.top_k, defaults.top_k, 0)), 0), server.model.vocab_size),
        min_p=_first(request.min_p, defaults.min_p, 0.0),
        repetition_penalty=_first(request.repetition_penalty, defaults.repetition_penalty, 1.0),
        presence_penalty=_first(request.presence_penalty, defaults.presence_penalty, 0.0),
        frequency_penalty=_first(request.frequency_penalty, defaults.frequency_penalty, 0.0),
        eos_token_ids=() if request.ignore_eos else server.eos_token_ids,
        stop_token_ids=stop_token_ids,
        logprobs=logprobs,
    )


def for_choice(params: SamplingParams, index: int) -> SamplingParams:
    """The parameters of choice number `index`: its own seed, which is the request's for choice 0."""
    return msgspec.structs.replace(params, seed=(params.seed + index) % 2**63) if index else params


def _first(given: float | None, default: float | None, otherwise: float) -> float:
    if given is not None:
        return given
    return default if default is not None else otherwise
