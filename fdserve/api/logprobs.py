"""Logprobs in the two shapes that OpenAI gives them."""

from __future__ import annotations

from collections.abc import Sequence

from fdserve.engine.request import TokenLogprobs
from fdserve.protocol.chat import ChatLogprobs, TokenLogprob, TopLogprob
from fdserve.protocol.completion import CompletionLogprobs
from fdserve.text.detokenizer import Detokenizer, token_text
from fdserve.text.tokenizer import Tokenizer

Entries = Sequence[tuple[int, TokenLogprobs]]


def chat_logprobs(tokenizer: Tokenizer, entries: Entries) -> ChatLogprobs:
    """Each token with its alternatives, exactly as many as were asked for, likeliest first."""
    content = []
    for token_id, values in entries:
        top = [
            TopLogprob(*_named(tokenizer, top_id, logprob))
            for top_id, logprob in zip(values.top_ids, values.top_logprobs, strict=True)
        ]
        content.append(TokenLogprob(*_named(tokenizer, token_id, values.logprob), top))
    return ChatLogprobs(content)


def _named(tokenizer: Tokenizer, token_id: int, logprob: float) -> tuple[str, float, list[int]]:
    text, data = token_text(tokenizer, token_id)
    return text, _finite(logprob), data


class CompletionLogprobsWriter:
    """Writes the parallel lists of plain completions; it keeps the offset from one call to the next."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._detokenizer = Detokenizer(tokenizer, skip_special_tokens)
        self._offset = 0

    def write(self, entries: Entries) -> CompletionLogprobs:
        """The entries' lists. Each `top_logprobs` holds the sampled token too, be it among the likeliest or not."""
        result = CompletionLogprobs([], [], [], [])
        for token_id, values in entries:
            token, logprob = self._key(token_id), _finite(values.logprob)
            top = {
                self._key(top_id): _finite(value)
                for top_id, value in zip(values.top_ids, values.top_logprobs, strict=True)
            }
            result.tokens.append(token)
            result.token_logprobs.append(logprob)
            result.top_logprobs.append({**top, token: logprob})
            result.text_offset.append(self._offset)
            self._offset += len(self._detokenizer.push((token_id,)))
        return result

    def _key(self, token_id: int) -> str:
        data = self._tokenizer.token_bytes(token_id)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _finite(logprob: float) -> float:
    """JSON has no infinity: a probability of zero is written as OpenAI does."""
    return max(logprob, -9999.0)
