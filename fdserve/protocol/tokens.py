"""POST /tokenize, POST /detokenize and POST /v1/chat/completions/render."""

from __future__ import annotations

import msgspec

from fdserve.protocol.chat import ChatRequest
from fdserve.protocol.generation import TokenIds


class TokenizePrompt(msgspec.Struct, kw_only=True):
    """A text to tokenize as /v1/completions does. `add_special_tokens` is ignored: none is ever added."""

    prompt: str
    model: str | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class TokenizeMessages(ChatRequest, kw_only=True):
    """A conversation to tokenize as /v1/chat/completions does."""

    return_token_strs: bool | None = None


class Tokenization(msgspec.Struct, kw_only=True):
    """`max_model_len` bounds prompt plus completion, in tokens; `token_strs` is null unless asked for."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    tokens: TokenIds
    model: str | None = None


class Detokenization(msgspec.Struct):
    prompt: str


class RenderedChat(msgspec.Struct, kw_only=True):
    """The prompt that a chat request leads to; `max_model_len` as in `Tokenization`."""

    prompt: str
    prompt_token_ids: list[int]
    count: int
    max_model_len: int


class TokenizerInfo(msgspec.Struct, kw_only=True):
    """What clients that render prompts themselves ask for; `chat_template` is the one that the server uses."""

    tokenizer_class: str = "fdserve"
    vocab_size: int
    bos_token: str | None = None
    eos_token: str | None = None
    pad_token: str | None = None
    chat_template: str
