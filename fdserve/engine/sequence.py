"""A sequence: the scheduler's state of one request."""

from __future__ import annotations

from fdserve.engine.kv_cache import BlockHash, BlockPool, extend_hashes
from fdserve.engine.ngram import Ngrams
from fdserve.engine.request import FinishReason, Request, TokenLogprobs


class Sequence:
    """Tokens so far, how many of them are computed, and where.

    Prefill, chunked prefill and decode differ only in how many tokens are left to compute. While a sequence runs it
    has a row in the ranks and blocks for all its tokens; while it waits it has neither.
    """

    __slots__ = (
        "answer_start", "arrival", "blocks", "cached_tokens", "constrained", "ending_ids", "finish_reason", "hashes",
        "ngrams", "num_advanced", "num_computed", "num_prompt", "num_registered", "prompt_logprobs", "request", "row",
        "slowest_turn", "started", "tokens",
    )  # fmt: skip

    def __init__(self, request: Request, arrival: int) -> None:
        self.request = request
        self.arrival = arrival
        self.tokens = list(request.prompt)
        self.num_prompt = len(request.prompt)
        self.num_computed = 0
        self.blocks: list[int] = []
        self.hashes: list[BlockHash] = []
        self.num_registered = 0
        self.row = -1
        self.ending_ids = frozenset(request.params.ending_ids)
        self.finish_reason: FinishReason | None = None
        self.cached_tokens = 0
        self.started = False
        self.constrained = request.constraint is not None
        self.ngrams: Ngrams | None = None
        """What guesses at its next tokens, once something does."""
        self.num_advanced = 0
        """Output tokens that the constraint has seen."""
        self.slowest_turn = 0.0
        """The most seconds that the constraint took for one token so far."""
        self.prompt_logprobs: list[TokenLogprobs] | None = None if request.params.prompt_logprobs is None else []
        """Those so far, until they are delivered; None where none are due."""
        self.answer_start = self.num_prompt if request.params.think_end_id < 0 else -1
        """The index of the answer's first token; -1 while that is not known."""

    def __lt__(self, other: Sequence) -> bool:
        """Runs before `other`: by priority, then by arrival."""
        return (self.request.priority, self.arrival) < (other.request.priority, other.arrival)

    @property
    def remaining(self) -> int:
        """Tokens known but not computed: 1 while decoding."""
        return len(self.tokens) - self.num_computed

    @property
    def num_generated(self) -> int:
        """Tokens sampled so far."""
        return len(self.tokens) - self.num_prompt

    def find_prefix(self, pool: BlockPool, block_size: int) -> list[int]:
        """The cached blocks that the sequence can start with: at least one token is left to compute.

        None where logprobs of the prompt are due: they come of computing it.
        """
        if not pool.enable_caching or self.prompt_logprobs is not None:
            return []
        return pool.match_prefix(self._block_hashes(block_size)[: (len(self.tokens) - 1) // block_size])

    def name_blocks(self, pool: BlockPool, block_size: int) -> None:
        """Make the blocks findable that the computed tokens fill."""
        if not pool.enable_caching:
            return
        num_full = self.num_computed // block_size
        if num_full > self.num_registered:
            hashes = self._block_hashes(block_size)
            for index in range(self.num_registered, num_full):
                pool.register(self.blocks[index], hashes[index])
            self.num_registered = num_full

    def _block_hashes(self, block_size: int) -> list[BlockHash]:
        """Hashes of all full blocks of the tokens so far."""
        extend_hashes(self.hashes, self.tokens, block_size, self.request.cache_salt)
        return self.hashes

    def ends_with(self, token: int, max_model_len: int) -> FinishReason | None:
        """Append a sampled token; why the sequence ends with it, if it does."""
        self.tokens.append(token)
        if token in self.ending_ids:
            return "stop"
        params = self.request.params
        if self.num_generated >= params.max_tokens or len(self.tokens) >= max_model_len:
            return "length"
        if params.answer_limit is None:
            return None
        if self.answer_start < 0 and token == params.think_end_id:
            self.answer_start = len(self.tokens)
        return "length" if 0 <= self.answer_start <= len(self.tokens) - params.answer_limit else None
