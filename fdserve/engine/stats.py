"""The engine's gauges and totals."""

from __future__ import annotations

import msgspec

from fdserve.engine.scheduler import Scheduler


class EngineStats(msgspec.Struct, frozen=True):
    """Gauges and totals."""

    running: int = 0
    waiting: int = 0
    kv_blocks_total: int = 0
    kv_blocks_used: int = 0
    kv_blocks_cached: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    preemptions: int = 0
    steps: int = 0
    rank_restarts: int = 0
    step_seconds: float = 0.0
    """Time that the ranks spent computing."""


def stats_of(scheduler: Scheduler, *, rank_restarts: int, step_seconds: float) -> EngineStats:
    """The state of a scheduler now, with what only its engine knows."""
    totals, pool = scheduler.stats, scheduler.pool
    return EngineStats(
        running=len(scheduler.running),
        waiting=scheduler.num_waiting,
        kv_blocks_total=pool.num_blocks,
        kv_blocks_used=pool.num_blocks - pool.num_free,
        kv_blocks_cached=pool.num_cached,
        prompt_tokens=totals.prompt_tokens,
        cached_tokens=totals.cached_tokens,
        generated_tokens=totals.generated_tokens,
        drafted_tokens=totals.drafted_tokens,
        accepted_tokens=totals.accepted_tokens,
        preemptions=totals.preemptions,
        steps=totals.steps,
        rank_restarts=rank_restarts,
        step_seconds=step_seconds,
    )
