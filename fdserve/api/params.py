"""From a request's fields to sampling parameters, with the checks that types alone cannot make."""

from __future__ import annotations

import random
from collections.abc import Iterable

import msgspec

from fdserve.api.models import check_model
from fdserve.api.token_rules import TokenRules, check_token_ids
from fdserve.engine.request import SamplingParams
from fdserve.errors import InvalidRequest
from fdserve.protocol.generation import GenerationRequest
from fdserve.server.server import Server
from fdserve.text.stop import StopTable

MIN_TEMPERATURE = 1e-5  # below it sampling is greedy, as in FastDeploy
MAX_TEMPERATURE = 1e30  # all tokens are as likely long before; it and its inverse are float32s
MIN_TOP_P = 1e-5
MAX_WORDS_CHARACTERS = 16_384
MAX_LOGPROBS = 1 << 22
"""In one answer, or of the prompts of a stream: they take about a gigabyte while they are told."""

_UNSUPPORTED = ("logits_processors_args", "suffix", "audio")


def check_request(request: GenerationRequest, server: Server) -> None:
    """Raise NotFound for another model, InvalidRequest for fields that contradict each other or are not supported."""
    check_model(server, request.model)
    if request.stream_options is not None and not request.stream:
        raise InvalidRequest("stream_options is only allowed when stream is true.", param="stream_options")
    if request.truncate_prompt_tokens == 0:
        raise InvalidRequest("truncate_prompt_tokens cannot be 0.", param="truncate_prompt_tokens")
    check_logprobs(request.prompt_logprobs is not None, server, "prompt_logprobs")
    _check_length(_stop_strings(request), "stop")
    _check_length(request.bad_words or (), "bad_words")
    for name in _UNSUPPORTED:
        if getattr(request, name, None):
            raise unsupported(name)


def _check_length(words: Iterable[str], param: str) -> None:
    """Raise InvalidRequest for more text than can be prepared without holding up other requests."""
    if sum(map(len, words)) > MAX_WORDS_CHARACTERS:
        message = f"The strings of {param} have more than {MAX_WORDS_CHARACTERS} characters together."
        raise InvalidRequest(message, param=param)


def unsupported(name: str, which: str = "") -> InvalidRequest:
    """The error for a field that would change the output and cannot be honoured."""
    return InvalidRequest(f"{name} {which}is not supported.", param=name, code="unsupported_parameter")


def check_logprobs(wanted: bool, server: Server, param: str = "logprobs") -> None:
    """Raise InvalidRequest if a request wants logprobs and the server was started without them."""
    if wanted and not server.config.enable_logprob:
        # FastDeploy's words, and how.
        message = "Logprobs is disabled, please enable it in startup config: --enable-logprob (enable_logprob)."
        raise InvalidRequest(message, param=param)


def check_logprobs_told(count: int, param: str) -> None:
    """Raise InvalidRequest for more logprobs, those of the likeliest tokens among them, than the memory may hold."""
    if count > MAX_LOGPROBS:
        message = (
            f"The answer has more than {MAX_LOGPROBS} logprobs: ask for those of fewer tokens, or for fewer of each."
        )
        raise InvalidRequest(message, param=param)


def check_choices(count: int, server: Server, param: str) -> None:
    """Raise InvalidRequest if a request asks for more choices in all than the server ever takes."""
    limit = server.config.max_concurrency
    if count > limit:
        raise InvalidRequest(f"The request asks for {count} choices; this server takes {limit} at most.", param=param)


def checked_prompt(token_ids: list[int], server: Server, param: str) -> list[int]:
    """A prompt that came as ids. Raises InvalidRequest if it is empty or has an id that is none of the model's."""
    if not token_ids:
        raise InvalidRequest("A prompt is empty.", param=param)
    if min(token_ids) < 0:
        raise InvalidRequest("Token ids cannot be negative.", param=param)
    check_token_ids(token_ids, server, param)
    return token_ids


def truncated(prompt: list[int], request: GenerationRequest, server: Server, max_tokens: int | None) -> list[int]:
    """The last tokens of the prompt, as many as `truncate_prompt_tokens` says.

    -1 keeps as many as leave room for `max_tokens`, or for one token where that is None.
    """
    limit = request.truncate_prompt_tokens
    if limit is None:
        return prompt
    if limit < 0:
        limit = max(1, server.engine.max_model_len - (1 if max_tokens is None else max_tokens))
    return prompt[-limit:]


def stop_table(request: GenerationRequest) -> StopTable:
    """The stop strings, for all choices of the request."""
    return StopTable(_stop_strings(request))


def _stop_strings(request: GenerationRequest) -> list[str]:
    return [request.stop] if isinstance(request.stop, str) else list(request.stop or ())


def sampling_params(
    request: GenerationRequest,
    server: Server,
    rules: TokenRules,
    *,
    prompt_tokens: int,
    max_tokens: int | None,
    logprobs: int | None,
    param: str,
) -> SamplingParams:
    """The parameters of a request's first choice; see `for_choice` for the others.

    `rules` are those of the request, whatever the prompt. `max_tokens` of None fills the context. `param` is the
    field that the prompt came in. Raises InvalidRequest when the prompt leaves no room for a token.
    """
    limit = _limit(server, prompt_tokens, max_tokens, param)
    min_tokens = request.min_tokens or 0
    if max_tokens is not None and min_tokens > max_tokens:
        raise InvalidRequest(f"min_tokens is {min_tokens}, more than max_tokens ({max_tokens}).", param="min_tokens")
    stop_token_ids = tuple(request.stop_token_ids or ())
    check_token_ids(stop_token_ids, server, "stop_token_ids")
    defaults = server.defaults
    temperature = _first(request.temperature, defaults.temperature, 1.0)
    return SamplingParams(
        max_tokens=limit,
        min_tokens=min(min_tokens, limit),
        seed=random.getrandbits(63) if request.seed is None else request.seed,
        temperature=min(temperature, MAX_TEMPERATURE) if temperature >= MIN_TEMPERATURE else 0.0,
        top_p=max(_first(request.top_p, defaults.top_p, 1.0), MIN_TOP_P),
        top_k=min(max(int(_first(request.top_k, defaults.top_k, 0)), 0), server.model.vocab_size),
        min_p=_first(request.min_p, defaults.min_p, 0.0),
        repetition_penalty=_first(request.repetition_penalty, defaults.repetition_penalty, 1.0),
        presence_penalty=_first(request.presence_penalty, defaults.presence_penalty, 0.0),
        frequency_penalty=_first(request.frequency_penalty, defaults.frequency_penalty, 0.0),
        eos_token_ids=() if request.ignore_eos else server.eos_token_ids,
        stop_token_ids=stop_token_ids,
        logit_bias=rules.logit_bias,
        allowed_ids=rules.allowed_ids,
        banned_ids=rules.banned_ids,
        bad_words=rules.bad_words,
        logprobs=logprobs,
        prompt_logprobs=request.prompt_logprobs,
        temp_scaled_logprobs=bool(request.temp_scaled_logprobs),
        top_p_normalized_logprobs=bool(request.top_p_normalized_logprobs),
    )


def _limit(server: Server, prompt_tokens: int, max_tokens: int | None, param: str) -> int:
    """How many tokens may be generated. Raises InvalidRequest, in OpenAI's words, if it would have to be none."""
    context = server.engine.max_model_len
    room = context - prompt_tokens
    if room >= (0 if max_tokens == 0 else 1):
        return room if max_tokens is None else min(room, max_tokens)
    if param == "messages":
        message = (
            f"This model's maximum context length is {context} tokens. However, your messages resulted in "
            f"{prompt_tokens} tokens. Please reduce the length of the messages."
        )
    else:
        asked = 1 if max_tokens is None else max_tokens
        message = (
            f"This model's maximum context length is {context} tokens, however you requested {prompt_tokens + asked} "
            f"tokens ({prompt_tokens} in your prompt; {asked} for the completion). Please reduce your prompt; or "
            "completion length."
        )
    raise InvalidRequest(message, param=param, code="context_length_exceeded")


def for_choice(params: SamplingParams, index: int) -> SamplingParams:
    """The parameters of choice number `index`: its own seed, which is the request's for choice 0."""
    return msgspec.structs.replace(params, seed=(params.seed + index) % 2**63) if index else params


def _first(given: float | None, default: float | None, otherwise: float) -> float:
    if given is not None:
        return given
    return default if default is not None else otherwise
