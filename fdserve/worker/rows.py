"""Rows: what a rank keeps of each running sequence across steps, as NumPy arrays indexed by row."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fdserve.executor.wire import NewRow, Plan, SamplingParams
from fdserve.ops.sampling import NO_LOGPROBS, TEMPERATURE_SCALED, TOP_P_NORMALIZED
from fdserve.worker.limits import Limits

Ints = npt.NDArray[np.int32]


class Rows:
    """Token ids, block tables and sampling parameters of up to `max_num_seqs` sequences.

    The arrays are as wide as the longest sequence, but memory that is never written is never taken.
    """

    def __init__(self, max_num_seqs: int, max_model_len: int, block_size: int, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self.block_size = block_size
        self.tokens: Ints = np.zeros((max_num_seqs, max_model_len + 1), np.int32)
        self.num_tokens: Ints = np.zeros(max_num_seqs, np.int32)
        self.num_prompt: Ints = np.zeros(max_num_seqs, np.int32)
        self.num_computed: Ints = np.zeros(max_num_seqs, np.int32)
        self.num_drafts: Ints = np.zeros(max_num_seqs, np.int32)
        """Guessed tokens of this step, which stand behind the row's own in `tokens`."""
        self.blocks: Ints = np.zeros((max_num_seqs, -(-max_model_len // block_size)), np.int32)
        self.num_blocks: Ints = np.zeros(max_num_seqs, np.int32)
        self.float_params: npt.NDArray[np.float32] = np.zeros((max_num_seqs, 6), np.float32)
        """temperature, top_p, min_p, repetition, presence and frequency penalty"""
        self.int_params: npt.NDArray[np.int64] = np.zeros((max_num_seqs, 2), np.int64)
        """top_k, seed"""
        self.num_top: Ints = np.full(max_num_seqs, -1, np.int32)
        """Top logprobs wanted; -1 for no logprobs at all."""
        self.needs_history: npt.NDArray[np.bool_] = np.zeros(max_num_seqs, np.bool_)
        self.logprob_modes: Ints = np.zeros(max_num_seqs, np.int32)
        """As `ops.sample` takes them."""
        self.samples: npt.NDArray[np.bool_] = np.zeros(max_num_seqs, np.bool_)
        """Whether the row generates anything."""
        self.prompt_top: Ints = np.full(max_num_seqs, -1, np.int32)
        """Top logprobs wanted for the prompt's tokens; -1 for no logprobs of the prompt."""
        self.is_limited: npt.NDArray[np.bool_] = np.zeros(max_num_seqs, np.bool_)
        """Whether the row has `limits`."""
        self.limits: list[Limits | None] = [None] * max_num_seqs
        self.num_begun = 0
        """How often a sequence has entered a row: as long as this stays, so do all parameters."""

    def take_changes(self, plan: Plan) -> None:
        """Apply what a plan says of new rows, new blocks and drafts."""
        for new in plan.new_rows:
            self._begin(new)
        for row, block in plan.new_blocks:
            self.blocks[row, self.num_blocks[row]] = block
            self.num_blocks[row] += 1
        for row, draft in plan.drafts:
            known = self.num_tokens[row]
            self.tokens[row, known : known + len(draft)] = draft
            self.num_drafts[row] = len(draft)

    def append(self, rows: Ints, tokens: Ints) -> None:
        """Append one sampled token to each of `rows`; a negative one stands for a row that is about to end."""
        self.tokens[rows, self.num_tokens[rows]] = np.maximum(tokens, 0)
        self.num_tokens[rows] += 1

    def _begin(self, new: NewRow) -> None:
        row, params = new.row, new.params
        self.num_begun += 1
        tokens = np.frombuffer(new.token_ids, np.int32)
        self.tokens[row, : len(tokens)] = tokens
        self.num_tokens[row] = len(tokens)
        self.num_prompt[row] = new.num_prompt
        self.num_computed[row] = new.num_computed
        self.blocks[row, : len(new.blocks)] = new.blocks
        self.num_blocks[row] = len(new.blocks)
        self.float_params[row] = (
            params.temperature,
            params.top_p,
            params.min_p,
            params.repetition_penalty,
            params.presence_penalty,
            params.frequency_penalty,
        )
        self.int_params[row] = (params.top_k, params.seed)
        self.num_top[row] = -1 if params.logprobs is None else params.logprobs
        self.needs_history[row] = params.needs_history
        self.logprob_modes[row] = logprob_mode(params)
        self.samples[row] = params.max_tokens > 0
        self.prompt_top[row] = new.prompt_logprobs
        self.is_limited[row] = Limits.needed(params)
        self.limits[row] = Limits(params, self._vocab_size) if self.is_limited[row] else None


def logprob_mode(params: SamplingParams) -> int:
    """How `ops.sample` is to report the row's logprobs."""
    if params.logprobs is None:
        return NO_LOGPROBS
    return TEMPERATURE_SCALED * params.temp_scaled_logprobs + TOP_P_NORMALIZED * params.top_p_normalized_logprobs
