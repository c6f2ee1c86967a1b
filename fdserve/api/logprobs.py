"""Logprobs in the shapes that OpenAI and vLLM give them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fdserve.engine.request import TokenLogprobs
from fdserve.http.response import encoded_apart
from fdserve.protocol.chat import ChatLogprobs, TokenLogprob, TopLogprob
from fdserve.protocol.completion import CompletionLogprobs
from fdserve.protocol.generation import PromptLogprob, PromptLogprobs
from fdserve.text.detokenizer import Detokenizer, token_text
from fdserve.text.tokenizer import Tokenizer

Entries = Sequence[tuple[int, TokenLogprobs]]

_CONTINUATION = frozenset([b"", *(bytes([byte]) for byte in range(0x80, 0xC0))])  # what can go on with a character


def token_logprobs(tokenizer: Tokenizer, entries: Entries) -> Iterator[TokenLogprob]:
    """Each token with its alternatives, exactly as many as were asked for, likeliest first."""
    for token_id, values in entries:
        top = [
            TopLogprob(*_named(tokenizer, top_id, logprob))
            for top_id, logprob in zip(values.top_ids, values.top_logprobs, strict=True)
        ]
        yield TokenLogprob(*_named(tokenizer, token_id, values.logprob), top)


def chat_logprobs(tokenizer: Tokenizer, entries: Entries) -> ChatLogprobs:
    """The same to be sent: tokens are encoded one by one."""
    return ChatLogprobs(encoded_apart(token_logprobs(tokenizer, entries)))


def _named(tokenizer: Tokenizer, token_id: int, logprob: float) -> tuple[str, float, list[int]]:
    text, data = token_text(tokenizer, token_id)
    return text, _finite(logprob), data


def prompt_logprobs(tokenizer: Tokenizer, prompt: Sequence[int], values: Sequence[TokenLogprobs]) -> PromptLogprobs:
    """For each token of the prompt but the first: itself, then the likeliest ones, by their ids (vLLM's shape)."""
    return encoded_apart(_prompt_entries(tokenizer, prompt, values))


def _prompt_entries(
    tokenizer: Tokenizer, prompt: Sequence[int], values: Sequence[TokenLogprobs]
) -> Iterator[dict[str, PromptLogprob] | None]:
    yield None
    for token_id, entry in zip(prompt[1:], values, strict=True):
        top = list(zip(entry.top_ids, entry.top_logprobs, strict=True))
        rank = entry.top_ids.index(token_id) + 1 if token_id in entry.top_ids else None
        places = [(token_id, entry.logprob, rank), *((id, value, at) for at, (id, value) in enumerate(top, 1))]
        candidates: dict[str, PromptLogprob] = {}
        for id, value, place in places:
            text, _ = token_text(tokenizer, id)
            candidates.setdefault(str(id), PromptLogprob(_finite(value), place, text))
        yield candidates


class CompletionLogprobsWriter:
    """Writes the parallel lists of plain completions; it keeps the `offset` from one call to the next."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool, offset: int = 0) -> None:
        self._tokenizer = tokenizer
        self._hidden = tokenizer.special_ids if skip_special_tokens else frozenset[int]()
        self._detokenizer = Detokenizer(tokenizer, skip_special_tokens)
        self.offset = offset

    def write_prompt(self, prompt: Sequence[int], values: Sequence[TokenLogprobs]) -> CompletionLogprobs:
        """The lists of an echoed prompt, all of whose tokens show. Comes before any `write`."""
        result = CompletionLogprobs([], [], [], [])
        text = Detokenizer(self._tokenizer, skip_special_tokens=False)
        for token_id, entry in zip(prompt, [None, *values], strict=True):
            self._give_up(text, token_id)
            self._append(result, token_id, self._key(token_id), entry)
            self.offset += len(text.push_one(token_id))
        self.offset += len(text.flush())
        return result

    def write(self, entries: Entries, ending: tuple[int, TokenLogprobs] | None = None) -> CompletionLogprobs:
        """The entries' lists, and at their end the entry of the token that ended the choice, which is no text."""
        result = CompletionLogprobs([], [], [], [])
        for token_id, values in entries:
            if token_id not in self._hidden:
                self._give_up(self._detokenizer, token_id)
            self._append(result, token_id, "" if token_id in self._hidden else self._key(token_id), values)
            self.offset += len(self._detokenizer.push_one(token_id))
        if ending is not None:
            self.offset += len(self._detokenizer.flush())
            self._append(result, ending[0], "", ending[1])
        return result

    def _give_up(self, text: Detokenizer, token_id: int) -> None:
        """Count an unfinished character that the token does not go on with: its U+FFFD stands before the token."""
        if self._tokenizer.token_bytes(token_id)[:1] not in _CONTINUATION:
            self.offset += len(text.flush())

    def _append(self, lists: CompletionLogprobs, token_id: int, token: str, values: TokenLogprobs | None) -> None:
        """Each `top_logprobs` holds the sampled token too, be it among the likeliest or not."""
        lists.tokens.append(token)
        lists.text_offset.append(self.offset)
        if values is None:
            lists.token_logprobs.append(None)
            lists.top_logprobs.append(None)
            return
        lists.token_logprobs.append(_finite(values.logprob))
        top: dict[str, float] = {}
        for top_id, value in zip(values.top_ids, values.top_logprobs, strict=True):
            top.setdefault(self._key(top_id), _finite(value))  # of two tokens with one text, the likelier
        lists.top_logprobs += encoded_apart([{**top, self._key(token_id): _finite(values.logprob)}])

    def _key(self, token_id: int) -> str:
        data = self._tokenizer.token_bytes(token_id)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def extend(lists: CompletionLogprobs, others: CompletionLogprobs) -> CompletionLogprobs:
    """The lists with the others after them."""
    return CompletionLogprobs(
        lists.tokens + others.tokens,
        lists.token_logprobs + others.token_logprobs,
        lists.top_logprobs + others.top_logprobs,
        lists.text_offset + others.text_offset,
    )


def _finite(logprob: float) -> float:
    """JSON has no infinity: a probability of zero is written as OpenAI does."""
    return max(logprob, -9999.0)
