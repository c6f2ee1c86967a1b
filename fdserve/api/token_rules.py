"""Which tokens may come at all, and which more or less readily: biases, bans and lists of ids."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from fdserve.errors import InvalidRequest
from fdserve.protocol.generation import GenerationRequest
from fdserve.server import Server

_BAN, _ONLY = -100.0, 100.0


class TokenRules(NamedTuple):
    """See the fields of SamplingParams."""

    logit_bias: tuple[tuple[int, float], ...]
    allowed_token_ids: tuple[int, ...]
    bad_words: tuple[tuple[int, ...], ...]


def token_rules(request: GenerationRequest, server: Server) -> TokenRules:
    """What the request says of single tokens and words.

    A bias of -100 bans the token, and where some have 100 there are no others, as OpenAI promises; in between it is
    added to the logit. Raises InvalidRequest for an id that is none of the model's, and where no token is left.
    """
    bias = request.logit_bias or {}
    check_token_ids(bias, server, "logit_bias")
    banned = [*(request.bad_words_token_ids or ()), *(token for token, value in bias.items() if value == _BAN)]
    check_token_ids(banned, server, "bad_words_token_ids")
    spelled = [_spellings(word, server) for word in request.bad_words or ()]
    words = [(token,) for token in banned] + [ids for spellings in spelled for ids in spellings]
    return TokenRules(
        logit_bias=tuple((token, value) for token, value in bias.items() if value not in (_BAN, 0.0, _ONLY)),
        allowed_token_ids=_allowed(request, server),
        bad_words=tuple(dict.fromkeys(words)),
    )


def check_token_ids(token_ids: Iterable[int], server: Server, param: str) -> None:
    """Raise InvalidRequest if an id is none of the model's."""
    size = server.model.vocab_size
    largest = max(token_ids, default=0)
    if largest >= size:
        message = f"Token id {largest} is out of range: the model has ids from 0 to {size - 1}."
        raise InvalidRequest(message, param=param)


def _allowed(request: GenerationRequest, server: Server) -> tuple[int, ...]:
    allowed = dict.fromkeys(request.allowed_token_ids or ())
    check_token_ids(allowed, server, "allowed_token_ids")
    only = [token for token, value in (request.logit_bias or {}).items() if value == _ONLY]
    if not only or not allowed:
        return tuple(only or allowed)
    both = tuple(token for token in only if token in allowed)
    if not both:
        raise InvalidRequest("logit_bias and allowed_token_ids leave no token.", param="logit_bias")
    return both


def _spellings(word: str, server: Server) -> list[tuple[int, ...]]:
    """A word's ids as they stand at the start of a text and after another word."""
    encode = server.tokenizer.encode
    return [ids for text in (word, " " + word) if (ids := tuple(encode(text)))]
