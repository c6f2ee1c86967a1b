"""Choosing tokens from logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fdserve.ops.collectives import SharedMemory, vocabulary_starts
from fdserve.ops.gathering import Gathering
from fdserve.ops.library import on_gpu, run
from fdserve.ops.sampling_gathered import SampledRows, sample_gathered

if TYPE_CHECKING:
    from paddle import Tensor

BROKEN = -1
NOTHING_ALLOWED = -2
GREEDY_TEMPERATURE = 1e-5
"""Below it nothing is drawn."""
NO_LOGPROBS = -1
TEMPERATURE_SCALED = 1
TOP_P_NORMALIZED = 2


def sample(
    logits: Tensor,
    float_params: Tensor,
    int_params: Tensor,
    history: Tensor,
    history_offsets: Tensor,
    prompt_lens: Tensor,
    bias_ids: Tensor,
    bias_values: Tensor,
    bias_offsets: Tensor,
    *,
    vocab_size: int,
    num_top: int,
    masks: Tensor | None = None,
    mask_rows: Tensor | None = None,
    logprob_modes: Tensor | None = None,
    shared: SharedMemory | Gathering | None = None,
    all_greedy: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Choose one token a row and report log-probabilities.

    In order: bias added; repetition penalty a over prompt and output tokens (l < 0 ? l * a : l / a); for each
    id c > 0 times in the output, l -= c * frequency + presence; -inf where the row's mask has no bit; division by
    the temperature (below 1e-5: the largest logit, lowest id on ties); min_p relative to the largest probability;
    top_k, renormalising; top_p, the smallest leading set of the candidates ordered by (logit descending, id
    ascending) that reaches it; one draw with the Philox4x32-10 number keyed by the seed at counter = position.
    `fdserve.ops.sampling_reference` says it in code.

    Rows are independent. A row whose logits hold a NaN, or none finite at the top, gets token `BROKEN` and NaN
    log-probabilities; one whose bans and mask leave nothing gets token `NOTHING_ALLOWED`.

    Args:
        logits: float32 [R, V]; never modified.
        float_params: float32 [R, 6]: temperature, top_p (>= 1 off), min_p (0 off), repetition (1 off), presence,
            frequency (0 off).
        int_params: int64 [R, 4]: top_k (<= 0 off), seed, position, forced_id (taken as it is when >= 0).
        history: int32, each row's prompt ids then its output ids; a row without penalties may leave its own empty.
        history_offsets: int32 [R + 1] into `history`.
        prompt_lens: int32 [R], how much of the row's history is prompt.
        bias_ids, bias_values: int32 and float32, added to the logits; -inf bans.
        bias_offsets: int32 [R + 1] into them.
        vocab_size: ids from here on are never chosen nor counted.
        num_top: K, how many of the most probable tokens to report; at most `vocab_size`.
        masks: int32 [M, W >= vocab_size / 32], bit i % 32 of word i // 32 for id i, or None.
        mask_rows: int32 [R], which of `masks` is the row's, -1 for none; None without `masks`.
        logprob_modes: int32 [R]: `NO_LOGPROBS`, which leaves them NaN and the top ids -1, or the sum of
            `TEMPERATURE_SCALED` (of the logits divided by the temperature, unless the row is greedy) and
            `TOP_P_NORMALIZED` (of the distribution cut to its top_p set and normalised; -inf outside); None: all 0.
        shared: the ranks among whom `vocabulary_starts` shares the ids out; each calls it with its own columns of the
            logits, float32 [R, part of V], and otherwise equal arguments. All get the same result, bit for bit that of
            the whole logits. RuntimeError if one of them is gone.
        all_greedy: that no row is drawn nor has log-probabilities, as is known without a look at the parameters: ranks
            on GPUs then gather once. Where it is not true the results are the same, but slow.

    Returns:
        (token int32 [R], its logprob float32 [R], top ids int32 [R, K], top logprobs float32 [R, K]):
        log-softmax of the logits as given, over ids below `vocab_size`, unless the mode says otherwise; the top K
        by (logit descending, id ascending).
    """
    rows = SampledRows(
        logits, float_params, int_params, history, history_offsets, prompt_lens,
        bias_ids, bias_values, bias_offsets, masks, mask_rows, logprob_modes,
    )  # fmt: skip
    if isinstance(shared, Gathering):
        return sample_gathered(rows, vocab_size, num_top, shared, all_greedy=all_greedy)
    ranks = () if on_gpu() and shared is None else _ranks(shared, vocab_size)
    tokens, logprobs, top_ids, top_logprobs = run("sample", *rows, vocab_size, num_top, *ranks)
    return tokens, logprobs, top_ids, top_logprobs


_ALONE: tuple[Any, ...] = (0, 0, 0, 1, [], 0, [])


def _ranks(shared: SharedMemory | None, vocab_size: int) -> tuple[Any, ...]:
    if shared is None:
        return _ALONE
    return *shared.attributes, vocabulary_starts(vocab_size, shared.world_size)
