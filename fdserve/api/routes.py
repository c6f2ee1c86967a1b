"""Every endpoint: its path, its handler, and the types of what goes in and out."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial

from fdserve.api.cancel import cancel_request
from fdserve.api.chat import chat_completions
from fdserve.api.completion import completions
from fdserve.api.health import health, load, metrics, version
from fdserve.api.messages import count_tokens, create_message
from fdserve.api.models import list_models, retrieve_model
from fdserve.api.openapi import Description
from fdserve.api.responses import create_response, delete_response, retrieve_response
from fdserve.api.tokens import detokenize, render_chat, tokenize, tokenizer_info
from fdserve.http.error_forms import ANTHROPIC
from fdserve.http.request import Request
from fdserve.http.response import Reply
from fdserve.http.router import Handler, Route
from fdserve.protocol.chat import ChatChunk, ChatCompletion, ChatRequest
from fdserve.protocol.completion import Completion, CompletionRequest
from fdserve.protocol.message_events import MessageStreamEvent
from fdserve.protocol.messages import CountTokensRequest, Message, MessagesRequest, TokenCount
from fdserve.protocol.models import Model, ModelList
from fdserve.protocol.response_events import ResponseStreamEvent
from fdserve.protocol.responses import DeletedResponse, Response, ResponsesRequest
from fdserve.protocol.status import CancelledRequest, Load, Status, Version
from fdserve.protocol.tokens import (
    Detokenization,
    DetokenizeRequest,
    RenderedChat,
    Tokenization,
    TokenizeMessages,
    TokenizePrompt,
    TokenizerInfo,
)
from fdserve.server.server import Server


def routes(server: Server) -> list[Route]:
    """The server's routes, their description at /openapi.json among them."""

    def to(handler: Callable[[Server, Request, Reply], Awaitable[None]]) -> Handler:
        return partial(handler, server)

    tokenizing = TokenizePrompt | TokenizeMessages
    table = [
        Route(
            "POST",
            "/v1/chat/completions",
            to(chat_completions),
            counted=True,
            admit=server.check_ready,
            body=ChatRequest,
            answer=ChatCompletion,
            events=ChatChunk,
        ),
        Route(
            "POST",
            "/v1/chat/completions/render",
            to(render_chat),
            counted=True,
            body=ChatRequest,
            answer=RenderedChat,
        ),
        Route(
            "POST",
            "/v1/completions",
            to(completions),
            counted=True,
            admit=server.check_ready,
            body=CompletionRequest,
            answer=Completion,
            events=Completion,
        ),
        Route(
            "POST",
            "/v1/responses",
            to(create_response),
            counted=True,
            admit=server.check_ready,
            body=ResponsesRequest,
            answer=Response,
            events=ResponseStreamEvent,
        ),
        Route("GET", "/v1/responses/{id}", to(retrieve_response), answer=Response, checked=True),
        Route("DELETE", "/v1/responses/{id}", to(delete_response), answer=DeletedResponse),
        Route(
            "POST",
            "/v1/messages",
            to(create_message),
            counted=True,
            admit=server.check_ready,
            body=MessagesRequest,
            answer=Message,
            events=MessageStreamEvent,
            errors=ANTHROPIC,
        ),
        Route(
            "POST",
            "/v1/messages/count_tokens",
            to(count_tokens),
            counted=True,
            body=CountTokensRequest,
            answer=TokenCount,
            errors=ANTHROPIC,
        ),
        Route("POST", "/v1/requests/{id}/cancel", to(cancel_request), answer=CancelledRequest),
        Route("POST", "/tokenize", to(tokenize), counted=True, body=tokenizing, answer=Tokenization),
        Route("POST", "/v1/tokenize", to(tokenize), counted=True, body=tokenizing, answer=Tokenization),
        Route("POST", "/detokenize", to(detokenize), counted=True, body=DetokenizeRequest, answer=Detokenization),
        Route("POST", "/v1/detokenize", to(detokenize), counted=True, body=DetokenizeRequest, answer=Detokenization),
        Route("GET", "/tokenizer_info", to(tokenizer_info), answer=TokenizerInfo),
        Route("GET", "/v1/models", to(list_models), answer=ModelList),
        Route("GET", "/v1/models/{model:path}", to(retrieve_model), answer=Model),
        # Probes and scrapers come without keys; no answer holds anything of a request.
        Route("GET", "/health", to(health), public=True, answer=Status),
        Route("GET", "/ready", to(health), public=True, answer=Status),
        Route("GET", "/ping", to(health), public=True, answer=Status),
        Route("GET", "/version", to(version), public=True, answer=Version),
        Route("GET", "/load", to(load), public=True, answer=Load),
        Route("GET", "/metrics", to(metrics), public=True),
    ]
    return [*table, Description(table, keys=bool(server.config.api_keys)).route()]
