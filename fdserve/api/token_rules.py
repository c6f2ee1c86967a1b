"""Which tokens may come at all, and which more or less readily: biases, bans and lists of ids."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import NamedTuple

import numpy as np

from fdserve.errors import InvalidRequest
from fdserve.protocol.generation import GenerationRequest
from fdserve.server.server import Server

_BAN, _ONLY = -100.0, 100.0


class TokenRules(NamedTuple):
    """See the fields of SamplingParams."""

    logit_bias: tuple[tuple[int, float], ...]
    allowed_ids: bytes
    banned_ids: bytes
    bad_words: tuple[tuple[int, ...], ...]


def token_rules(request: GenerationRequest, server: Server) -> TokenRules:
    """What the request says of single tokens and words.

    A bias of -100 bans the token, and where some have 100 there are no others, as OpenAI promises; in between it is
    added to the logit. Raises InvalidRequest for an id that is none of the model's, for more ids than the model has,
    and where no token is left.
    """
    bias = request.logit_bias or {}
    check_token_ids(bias, server, "logit_bias")
    banned = [*_listed(request.bad_words_token_ids, server, "bad_words_token_ids")]
    banned += [token for token, value in bias.items() if value == _BAN]
    words = [ids for word in request.bad_words or () for ids in _spellings(word, server)]
    banned += [ids[0] for ids in words if len(ids) == 1]
    return TokenRules(
        logit_bias=tuple((token, value) for token, value in bias.items() if value not in (_BAN, 0.0, _ONLY)),
        allowed_ids=_bits(_allowed(request, server), server),
        banned_ids=_bits(banned, server),
        bad_words=tuple(dict.fromkeys(ids for ids in words if len(ids) > 1)),
    )


def check_token_ids(token_ids: Iterable[int], server: Server, param: str) -> None:
    """Raise InvalidRequest if an id is none of the model's."""
    size = server.model.vocab_size
    largest = max(token_ids, default=0)
    if largest >= size:
        message = f"Token id {largest} is out of range: the model has ids from 0 to {size - 1}."
        raise InvalidRequest(message, param=param)


def _listed(token_ids: list[int] | None, server: Server, param: str) -> list[int]:
    """The ids of a list that no other field bounds: a longer one than the vocabulary only holds up other requests."""
    token_ids, size = token_ids or [], server.model.vocab_size
    if len(token_ids) > size:
        raise InvalidRequest(f"{param} has {len(token_ids)} ids, and the model only {size}.", param=param)
    check_token_ids(token_ids, server, param)
    return token_ids


def _allowed(request: GenerationRequest, server: Server) -> Collection[int]:
    allowed = frozenset(_listed(request.allowed_token_ids, server, "allowed_token_ids"))
    only = frozenset(token for token, value in (request.logit_bias or {}).items() if value == _ONLY)
    if not only or not allowed:
        return only or allowed
    if not only & allowed:
        raise InvalidRequest("logit_bias and allowed_token_ids leave no token.", param="logit_bias")
    return only & allowed


def _bits(token_ids: Collection[int], server: Server) -> bytes:
    """The ids as a mask, which is small however many they are, without those that only the tokenizer knows."""
    size = server.model.vocab_size
    known = [token for token in token_ids if token < size]
    if not known:
        return b""
    bits = np.zeros(-(-size // 32) * 32, np.uint8)
    bits[known] = 1
    return np.packbits(bits, bitorder="little").tobytes()


def _spellings(word: str, server: Server) -> list[tuple[int, ...]]:
    """A word's ids as they stand at the start of a text and after another word."""
    encode = server.tokenizer.encode
    return [ids for text in (word, " " + word) if (ids := tuple(encode(text)))]
