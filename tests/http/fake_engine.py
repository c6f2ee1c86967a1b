"""An engine that follows a script, a tokenizer whose tokens are bytes, and a server made of both."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import cache
from typing import Any, cast

import anyio

from fdserve.config import Config
from fdserve.engine.engine import Engine
from fdserve.engine.output import Generation
from fdserve.engine.request import Request, TokenDelta, TokenLogprobs
from fdserve.engine.stats import EngineStats
from fdserve.errors import InternalError, Overloaded, StartupError, Unavailable
from fdserve.models.config import GenerationDefaults, ModelConfig
from fdserve.server.metrics import Metrics
from fdserve.server.server import Server, accepted_names
from fdserve.server.tracing import tracing_of
from fdserve.text.reasoning import resolve_reasoning
from fdserve.text.template import ChatTemplate
from fdserve.text.tools import resolve_tools

Script = Callable[[Request], AsyncIterator[TokenDelta]]

EOS = 256
SPECIAL = ["</s>", "<think>", "</think>", "<response>", "</response>"]
VOCAB_SIZE = 256 + len(SPECIAL)
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if think %}<think>{% endif %}"


class ByteTokenizer:
    """Ids 0..255 are bytes, then come the special tokens."""

    vocab_size = VOCAB_SIZE
    special_ids = frozenset({EOS})
    special_tokens = {"eos_token": "</s>"}  # noqa: RUF012
    eos_token_id: int | None = EOS
    chat_template: str | None = TEMPLATE

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        while text:
            for offset, token in enumerate(SPECIAL):
                if text.startswith(token):
                    ids.append(256 + offset)
                    text = text[len(token) :]
                    break
            else:
                at = text.find("<", 1)
                at = len(text) if at < 0 else at
                ids += text[:at].encode("utf-8", "replace")
                text = text[at:]
        return ids

    def token_bytes(self, token_id: int) -> bytes:
        if token_id < 256:
            return bytes([token_id])
        return SPECIAL[token_id - 256].encode() if token_id < VOCAB_SIZE else b""

    def token_id(self, token: str) -> int | None:
        return 256 + SPECIAL.index(token) if token in SPECIAL else None


def ids(text: str) -> list[int]:
    return ByteTokenizer().encode(text)


def logprobs_of(token_id: int, k: int) -> TokenLogprobs:
    """Made up: the sampled token is likeliest, then come the ids after it."""
    top = tuple((token_id + i) % 256 for i in range(k))
    return TokenLogprobs(-0.25, top, tuple(-0.25 - i for i in range(k)))


def say(text: str, *, delay: float = 0.0, batch: int = 1, stop: bool = True) -> Script:
    """A script that generates a text's tokens, then eos; or up to max_tokens, whichever comes first."""
    return follow([*ids(text), EOS] if stop else ids(text), delay=delay, batch=batch)


def follow(token_ids: list[int], *, delay: float = 0.0, batch: int = 1) -> Script:
    async def script(request: Request) -> AsyncIterator[TokenDelta]:
        params = request.params
        tokens = token_ids[: params.max_tokens]
        if not tokens or params.prompt_logprobs is not None:
            yield _of_prompt(request)
        if not params.max_tokens:
            return
        for start in range(0, len(tokens), batch):
            if delay:
                await anyio.sleep(delay)
            part = tokens[start : start + batch]
            ending = next((i for i, t in enumerate(part) if t in params.ending_ids), None)
            part = part if ending is None else part[: ending + 1]
            delta = TokenDelta(part, cached_tokens=1)
            if params.logprobs is not None:
                delta.logprobs = [logprobs_of(token, params.logprobs) for token in part]
            if ending is not None:
                delta.finish_reason, delta.stop_token_id = "stop", part[-1]
            elif start + batch >= params.max_tokens:
                delta.finish_reason = "length"
            yield delta
            if delta.finish_reason is not None:
                return
        await anyio.sleep_forever()

    return script


def _of_prompt(request: Request) -> TokenDelta:
    delta = TokenDelta([], finish_reason=None if request.params.max_tokens else "length")
    if request.params.prompt_logprobs is not None:
        delta.prompt_logprobs = [logprobs_of(token, request.params.prompt_logprobs) for token in request.prompt[1:]]
    return delta


def endless(delay: float = 0.01, text: str = "x") -> Script:
    """A script that never ends, whatever max_tokens says."""

    async def script(request: Request) -> AsyncIterator[TokenDelta]:
        while True:
            await anyio.sleep(delay)
            yield TokenDelta(ids(text))

    return script


async def silent(request: Request) -> AsyncIterator[TokenDelta]:
    """A script that never gives a token."""
    await anyio.sleep_forever()
    yield TokenDelta([])


def broken(text: str, error: Exception | None = None) -> Script:
    """A script that fails after a text."""

    async def script(request: Request) -> AsyncIterator[TokenDelta]:
        yield TokenDelta(ids(text))
        await anyio.sleep(0.01)
        yield TokenDelta([], finish_reason="error", error=error or InternalError("the model's output was not a number"))

    return script


class FakeEngine:
    """The face of `Engine` over a script; it records the requests and which of them were cancelled."""

    def __init__(self, script: Script | None = None, *, max_model_len: int = 1024, max_requests: int = 64) -> None:
        self.script = script or say("Hello, world!")
        self.status = "loading"
        self.reason = "the model is loading"
        self.max_model_len = max_model_len
        self.max_requests = max_requests
        self.failure: StartupError | None = None
        self.hold_loading = False
        self.requests: list[Request] = []
        self.cancelled: list[str] = []
        self.active: dict[str, Generation] = {}
        self._ready = anyio.Event()
        self._submitted = anyio.Event()
        self._new: list[tuple[Request, Generation]] = []

    async def run(self) -> None:
        if self.hold_loading:
            await anyio.sleep_forever()
        if self.failure is not None:
            raise self.failure
        self.status, self.reason = "ready", ""
        self._ready.set()
        try:
            async with anyio.create_task_group() as tasks:
                while True:
                    for pair in self._new:
                        tasks.start_soon(self._feed, *pair)
                    self._new = []
                    self._submitted = anyio.Event()
                    await self._submitted.wait()
        finally:
            error = Unavailable("the server is shutting down")
            for generation in self.active.values():
                generation.end(TokenDelta([], finish_reason="error", error=error))
            self.active.clear()

    async def wait_ready(self) -> None:
        await self._ready.wait()

    def drain(self) -> None:
        self.status, self.reason = "draining", "the server is shutting down"

    def submit(self, request: Request) -> Generation:
        if self.status != "ready":
            raise Unavailable(self.reason)
        if len(self.active) >= self.max_requests:
            raise Overloaded("the queue is full", retry_after=7)
        generation = Generation(lambda: self._cancel(request.id), request.group)
        self.requests.append(request)
        self.active[request.id] = generation
        self._new.append((request, generation))
        self._submitted.set()
        return generation

    def stats(self) -> EngineStats:
        return EngineStats(running=len(self.active), prompt_tokens=sum(len(r.prompt) for r in self.requests))

    def _cancel(self, id: str) -> None:
        generation = self.active.pop(id, None)
        if generation is not None:
            self.cancelled.append(id)
            generation.end(TokenDelta([], finish_reason="cancelled"))

    async def _feed(self, request: Request, generation: Generation) -> None:
        generation.started = time.monotonic()
        async for delta in self.script(request):
            if request.id not in self.active:
                return
            if delta.finish_reason is not None:
                del self.active[request.id]
            if not generation.deliver(delta):
                self.active.pop(request.id, None)
                self.cancelled.append(request.id)
                return


MODEL = ModelConfig(
    model_type="ernie4_5",
    hidden_size=8,
    intermediate_size=8,
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    head_dim=8,
    vocab_size=VOCAB_SIZE,
    max_position_embeddings=4096,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    compression_ratio=1.0,
    tie_word_embeddings=True,
    eos_token_ids=(EOS,),
    bos_token_id=None,
    pad_token_id=None,
    dtype="float32",
    moe=None,
)


@cache
def compiled(template: str) -> ChatTemplate:
    """The template, for all servers: to compile it takes as long as most tests."""
    return ChatTemplate(template, ByteTokenizer.special_tokens)


def make_server(
    engine: FakeEngine, config: Config, defaults: GenerationDefaults | None = None, template: str = TEMPLATE
) -> Server:
    """A server over a fake engine; the parsers of `config` work, "" meaning none."""
    tokenizer = ByteTokenizer()
    name = config.served_model_name or "fake-model"
    return Server(
        config=config,
        engine=cast(Engine, engine),
        model=MODEL,
        tokenizer=tokenizer,
        template=compiled(template),
        reasoning=resolve_reasoning(config.reasoning_parser or "none", tokenizer, template),
        tools=resolve_tools(config.tool_call_parser or "none", tokenizer, template),
        defaults=defaults or GenerationDefaults(),
        metrics=Metrics(engine.stats),
        model_name=name,
        model_names=accepted_names(name, config.model or "owner/fake-model"),
        tracing=tracing_of(config, name),
    )


def builder(engine: FakeEngine, **options: Any) -> Callable[[Config], Awaitable[Server]]:
    """A `build` for `create_app`."""

    async def build(config: Config) -> Server:
        return make_server(engine, config, **options)

    return build
