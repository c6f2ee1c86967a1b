"""/tokenize, /detokenize, /tokenizer_info and /v1/chat/completions/render: prompts without an answer.

None of them needs the engine, so they work while the model loads, too.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from fdserve.api.chat import check_chat
from fdserve.api.fields import read_request
from fdserve.api.generation import off_loop_if_long
from fdserve.api.models import check_model
from fdserve.api.params import check_request
from fdserve.api.prompt import render_prompt, tokenized
from fdserve.api.token_rules import check_token_ids
from fdserve.errors import InvalidRequest
from fdserve.http.request import Request, decode
from fdserve.http.response import Reply
from fdserve.protocol.chat import ChatRequest
from fdserve.protocol.tokens import (
    Detokenization,
    DetokenizeRequest,
    RenderedChat,
    Tokenization,
    TokenizePrompt,
    TokenizerInfo,
)
from fdserve.server.server import Server
from fdserve.text.detokenizer import decode as detokenized
from fdserve.text.detokenizer import token_text
from fdserve.text.length import check_length

_NULL = msgspec.Raw(b"null")


class _Form(msgspec.Struct):
    """What tells the two forms of a request to tokenize apart, and what both may ask; the rest is decoded once only."""

    prompt: msgspec.Raw = _NULL
    messages: msgspec.Raw = _NULL
    return_token_strs: bool | None = None


_FORM = msgspec.json.Decoder(_Form)
_PROMPT = msgspec.json.Decoder(TokenizePrompt)
_DETOKENIZE = msgspec.json.Decoder(DetokenizeRequest)


async def tokenize(server: Server, http: Request, reply: Reply) -> None:
    """The token ids of a prompt, or of the prompt that messages lead to. Cancellation waits for a thread."""
    request, token_strs = _to_tokenize(server, http.take_body())

    def tokenization() -> Tokenization:
        if isinstance(request, ChatRequest):
            return _tokenization(server, render_prompt(request, server)[1], "messages", token_strs)
        return _tokenization(server, tokenized(request.prompt, server, "prompt"), "prompt", token_strs)

    await _answer(server, http, reply, tokenization, request)


async def detokenize(server: Server, http: Request, reply: Reply) -> None:
    """The text of token ids, control tokens included. Cancellation waits for a thread."""
    request = decode(http.take_body(), _DETOKENIZE)
    check_model(server, request.model)
    check_length(len(request.tokens), "tokens")
    check_token_ids(request.tokens, server, "tokens")

    def detokenization() -> Detokenization:
        return Detokenization(detokenized(server.tokenizer, request.tokens, skip_special_tokens=False))

    await _answer(server, http, reply, detokenization, request)


async def tokenizer_info(server: Server, http: Request, reply: Reply) -> None:
    """The special tokens and the chat template, as lm-evaluation-harness asks for them before it tokenizes here."""
    special = server.tokenizer.special_tokens
    await reply.json(
        TokenizerInfo(
            vocab_size=server.tokenizer.vocab_size,
            bos_token=special.get("bos_token"),
            eos_token=special.get("eos_token"),
            pad_token=special.get("pad_token"),
            chat_template=server.template.source,
        )
    )


async def render_chat(server: Server, http: Request, reply: Reply) -> None:
    """The prompt that a chat request leads to, as text and as token ids. Cancellation waits for a thread."""
    chat = _chat(server, http.take_body())

    def rendered_chat() -> RenderedChat:
        text, token_ids = render_prompt(chat, server)
        check_length(len(token_ids), "messages")
        return RenderedChat(
            prompt=text, prompt_token_ids=token_ids, count=len(token_ids), max_model_len=server.max_model_len
        )

    await _answer(server, http, reply, rendered_chat, chat)


def _to_tokenize(server: Server, body: bytes) -> tuple[TokenizePrompt | ChatRequest, bool]:
    """The checked request of either form, and whether it wants the tokens' texts."""
    form = decode(body, _FORM)
    token_strs = bool(form.return_token_strs)
    if form.messages != _NULL:
        if form.prompt != _NULL:
            raise InvalidRequest("A request to tokenize has either a prompt or messages.", param="prompt")
        return _chat(server, body), token_strs
    request = decode(body, _PROMPT)
    check_model(server, request.model)
    return request, token_strs


def _chat(server: Server, body: bytes) -> ChatRequest:
    request = read_request(body, ChatRequest)
    check_request(request, server)
    check_chat(request, server)
    return request


def _tokenization(server: Server, token_ids: list[int], param: str, token_strs: bool) -> Tokenization:
    check_length(len(token_ids), param)
    result = Tokenization(count=len(token_ids), max_model_len=server.max_model_len, tokens=token_ids)
    if token_strs:
        result.token_strs = [token_text(server.tokenizer, token_id)[0] for token_id in token_ids]
    return result


async def _answer(
    server: Server,
    http: Request,
    reply: Reply,
    work: Callable[[], Tokenization | Detokenization | RenderedChat],
    request: TokenizePrompt | DetokenizeRequest | ChatRequest,
) -> None:
    """Send what `work` comes to, which is worked out and encoded in a thread where that may take long."""

    def encoded() -> bytes:
        result = work()
        if not isinstance(result, Detokenization):
            http.prompt_tokens = result.count
        return msgspec.json.encode(result)

    # Whoever wrote a template may have written a slow one.
    slow = isinstance(request, ChatRequest) and request.chat_template is not None
    body = await off_loop_if_long(server.tokenizing, http.body_size, encoded, always=slow)
    await reply.text(body, "application/json")
