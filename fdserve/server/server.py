"""What the handlers share: the settings, the engine, and all that turns text into token ids and back."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import anyio
from anyio import to_thread

from fdserve.config import Config
from fdserve.engine.create import create_engine
from fdserve.engine.engine import Engine
from fdserve.errors import Unavailable
from fdserve.hub import resolve_model
from fdserve.models.checkpoint import check_checkpoint
from fdserve.models.config import GenerationDefaults, ModelConfig, read_generation_config
from fdserve.server.metrics import Metrics
from fdserve.server.response_store import ResponseStore
from fdserve.server.running_requests import RunningRequests
from fdserve.server.tracing import Tracing, tracing_of
from fdserve.text.grammar import GrammarCompiler
from fdserve.text.reasoning import ReasoningFormat, resolve_reasoning
from fdserve.text.template import ChatTemplate, load_template
from fdserve.text.tokenizer import Tokenizer, load_tokenizer
from fdserve.text.tools import ToolFormat, resolve_tools

log = logging.getLogger("fdserve")

DEMO_NAME = "fdserve-demo"
TOKENIZING_THREADS = 2
ENCODING_THREADS = 2


@dataclass
class Server:
    """One loaded model and its engine.

    `model_name` is what responses call the model; `model_names` all that requests may call it. `created` is in
    seconds since the epoch. `tokenizing` bounds the threads that long prompts are tokenized in, `encoding` those that
    large answers are made in: these wait for no prompts. `running` has what POST /v1/requests/{id}/cancel can end,
    `responses` what /v1/responses has stored.
    """

    config: Config
    engine: Engine
    model: ModelConfig
    tokenizer: Tokenizer
    template: ChatTemplate
    reasoning: ReasoningFormat | None
    tools: ToolFormat | None
    defaults: GenerationDefaults
    metrics: Metrics
    model_name: str
    model_names: frozenset[str]
    tracing: Tracing | None = None
    created: int = field(default_factory=lambda: int(time.time()))
    tokenizing: anyio.CapacityLimiter = field(default_factory=lambda: anyio.CapacityLimiter(TOKENIZING_THREADS))
    encoding: anyio.CapacityLimiter = field(default_factory=lambda: anyio.CapacityLimiter(ENCODING_THREADS))
    running: RunningRequests = field(default_factory=RunningRequests)
    responses: ResponseStore = field(default_factory=ResponseStore)

    @cached_property
    def grammars(self) -> GrammarCompiler:
        """What compiles structured output; made when it is first needed."""
        return GrammarCompiler(self.tokenizer, self.eos_token_ids, self.reasoning, self.model.vocab_size)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The ids that end a sequence: the checkpoint's, else the tokenizer's."""
        if self.model.eos_token_ids or self.tokenizer.eos_token_id is None:
            return self.model.eos_token_ids
        return (self.tokenizer.eos_token_id,)

    @property
    def max_model_len(self) -> int:
        """The longest sequence in tokens, prompt and completion: the checkpoint's own limit until the engine knows."""
        return self.engine.max_model_len or self.model.max_position_embeddings

    def check_ready(self) -> None:
        """Raise Unavailable, with the reason, unless the engine takes requests."""
        if self.engine.status != "ready":
            reason = self.engine.reason or self.engine.status
            raise Unavailable(f"The server is not ready: {reason.rstrip('.')}.")


async def build(config: Config) -> Server:
    """Find and check everything that needs no rank, and create the engine, which is not running yet.

    Raises StartupError with one sentence. When cancelled, a download that has begun still ends first.
    """
    directory = await to_thread.run_sync(resolve_model, config.model)
    model = await to_thread.run_sync(check_checkpoint, directory)
    tokenizer = await to_thread.run_sync(load_tokenizer, directory, config.tokenizer_backend)
    template = load_template(tokenizer, config.chat_template or None)
    reasoning = resolve_reasoning(config.reasoning_parser or None, tokenizer, template.source)
    tools = resolve_tools(config.tool_call_parser or None, tokenizer, template.source)
    engine = create_engine(config, directory, model)
    name = config.served_model_name or _default_name(config, directory)
    log.info(
        "model %s from %s, reasoning %s, tool calls %s",
        name,
        directory,
        reasoning.name if reasoning else "off",
        tools.name if tools else "off",
    )
    return Server(
        config=config,
        engine=engine,
        model=model,
        tokenizer=tokenizer,
        template=template,
        reasoning=reasoning,
        tools=tools,
        defaults=read_generation_config(directory),
        metrics=Metrics(engine.stats),
        model_name=name,
        model_names=accepted_names(name, config.model),
        tracing=tracing_of(config, name),
    )


def accepted_names(name: str, model: str) -> frozenset[str]:
    """What clients may call the model: its name, what it was loaded as, and what FastDeploy's examples send."""
    return frozenset({name, model, "", "default", "null"})


def _default_name(config: Config, directory: Path) -> str:
    if not config.model:
        return DEMO_NAME
    # A snapshot in the hub's cache is named by its commit, so a repository's name is better taken as given.
    is_directory = Path(config.model).expanduser().is_dir()
    return directory.resolve().name if is_directory else config.model.rsplit("/", 1)[-1]
