"""Choosing tokens from logits."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fdserve.ops.library import run

if TYPE_CHECKING:
    from paddle import Tensor


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Choose one token a row and report raw log-probabilities.

    In order: bias added; repetition penalty a over prompt and output tokens (l < 0 ? l * a : l / a); for each
    id c > 0 times in the output, l -= c * frequency + presence; division by the temperature (below 1e-5: the
    largest logit, lowest id on ties); min_p relative to the largest probability; top_k, renormalising; top_p,
    the smallest leading set of the candidates ordered by (logit descending, id ascending) that reaches it;
    one draw with the Philox4x32-10 number keyed by the seed at counter = position.
    `fdserve.ops.reference.candidates` says it in code.

    Rows are independent. A row whose logits hold a NaN, or none finite at the top, gets token -1 and NaN
    log-probabilities.

    Args:
        logits: float32 [R, V]; never modified.
        float_params: float32 [R, 6]: temperature, top_p (>= 1 off), min_p (0 off), repetition (1 off),
        presence,
            frequency (0 off).
        int_params: int64 [R, 4]: top_k (<= 0 off), seed, position, forced_id (taken as it is when >= 0).
        history: int32, each row's prompt ids then its output ids; a row without penalties may leave its own
        empty.
        history_offsets: int32 [R + 1] into `history`.
        prompt_lens: int32 [R], how much of the row's history is prompt.
        bias_ids, bias_values: int32 and float32, added to the logits; -inf bans.
        bias_offsets: int32 [R + 1] into them.
        vocab_size: ids from here on are never chosen nor counted.
        num_top: K, how many of the most probable tokens to report; at most `vocab_size`.

    Returns:
        (token int32 [R], its logprob float32 [R], top ids int32 [R, K], top logprobs float32 [R, K]):
        log-softmax of the logits as given, over ids below `vocab_size`; the top K by (logprob descending, id
        ascending).
    """
    tokens, logprobs, top_ids, top_logprobs = run(
        "sample",
        logits, float_params, int_params, history, history_offsets, prompt_lens,
        bias_ids, bias_values, bias_offsets,
        vocab_size, num_top,
    )  # fmt: skip
    return tokens, logprobs, top_ids, top_logprobs
