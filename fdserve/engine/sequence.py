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
        "answer_start", "arrival", "blocks", "cached_tokens", "constrained", "ending_ids", "expected", "finish_reason",
        "generates", "hashes", "longest", "ngrams", "num_advanced", "num_computed", "num_prompt", "num_registered",
        "prompt_logprobs", "request", "row", "slowest_turn", "started", "tokens",
    )  # fmt: skip

    def __init__(self, request: Request, arrival: int, max_model_len: int) -> None:
        self.request = request
        self.arrival = arrival
        self.tokens = list(request.prompt)
        self.num_prompt = len(request.prompt)
        self.longest = min(self.num_prompt + request.params.max_tokens, max_model_len)
        """The tokens, prompt and output, at which it ends."""
        self.num_computed = 0
        self.expected = 0
        """Tokens that steps in flight sample: they are computed like others before they are known."""
        self.blocks: list[int] = []
        self.hashes: list[BlockHash] = []
        self.num_registered = 0
        self.row = -1
        self.ending_ids = frozenset(request.params.ending_ids)
        self.finish_reason: FinishReason | None = None
        self.cached_tokens = 0
        self.started = False
        self.generates = request.params.max_tokens > 0
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
        """Tokens known or expected, but not computed: 1 while decoding."""
        return len(self.tokens) + self.expected - self.num_computed

    @property
    def num_generated(self) -> int:
        """Tokens sampled so far."""
        return len(self.tokens) - self.num_prompt

    @property
    def decodes(self) -> bool:
        """Whether one token is left to compute, and it does not end with those that are expected."""
        num_tokens = len(self.tokens) + self.expected
        return num_tokens - self.num_computed == 1 and not (self.expected and num_tokens >= self.longest)

    def find_prefix(self, pool: BlockPool, block_size: int) -> list[int]:
        """The cached blocks that the sequence can start with: at least one token is left to compute.

        None where logprobs of the prompt are due: they come of computing it.
        """
        if not pool.enable_caching or self.prompt_logprobs is not None:
            return []
        return pool.match_prefix(self._block_hashes(block_size)[: (len(self.tokens) - 1) // block_size])

    def name_blocks(self, pool: BlockPool, block_size: int) -> None:
        """Make the blocks findable that computed tokens fill, as far as these are known."""
        if not pool.enable_caching:
            return
        num_full = min(self.num_computed, len(self.tokens)) // block_size
        if num_full > self.num_registered:
            hashes = self._block_hashes(block_size)
            for index in range(self.num_registered, num_full):
                pool.register(self.blocks[index], hashes[index])
            self.num_registered = num_full

    def _block_hashes(self, block_size: int) -> list[BlockHash]:
        """Hashes of all full blocks of the tokens so far."""
        extend_hashes(self.hashes, self.tokens, block_size, self.request.cache_salt)
        return self.hashes

    def ends_with(self, token: int) -> FinishReason | None:
        """Append a sampled token; why the sequence ends with it, if it does."""
        self.tokens.append(token)
        if token in self.ending_ids:
            return "stop"
        if len(self.tokens) >= self.longest:
            return "length"
        params = self.request.params
        if params.answer_limit is None:
            return None
        if self.answer_start < 0 and token == params.think_end_id:
            self.answer_start = len(self.tokens)
        return "length" if 0 <= self.answer_start <= len(self.tokens) - params.answer_limit else None
