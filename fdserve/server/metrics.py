"""What Prometheus reads. Each server has a registry of its own, so that several can live in one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from fdserve.engine.stats import EngineStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_FIRST_TOKEN = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60)
_INTER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_WHOLE = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300, 600)

# Field of EngineStats -> (name after the prefix, help).
_GAUGES = {
    "running": ("requests_running", "Sequences that are being computed."),
    "waiting": ("requests_waiting", "Sequences that wait for a row or for blocks."),
    "kv_blocks_total": ("kv_blocks", "Blocks in the KV cache."),
    "kv_blocks_used": ("kv_blocks_used", "Blocks that running sequences hold."),
    "kv_blocks_cached": ("kv_blocks_cached", "Blocks whose content can be found by its prefix."),
}
_COUNTERS = {
    "prompt_tokens": ("prompt_tokens", "Tokens of the prompts taken up."),
    "cached_tokens": ("cached_tokens", "Prompt tokens that the prefix cache held."),
    "generated_tokens": ("generated_tokens", "Tokens sampled."),
    "drafted_tokens": ("drafted_tokens", "Guesses at next tokens that were computed."),
    "accepted_tokens": ("accepted_tokens", "Guesses at next tokens that were right."),
    "preemptions": ("preemptions", "Sequences put back to wait for want of blocks."),
    "steps": ("steps", "Steps of the engine."),
    "rank_restarts": ("rank_restarts", "Restarts after a lost rank."),
    "step_seconds": ("step_seconds", "Seconds that the ranks spent computing."),
}


class _EngineCollector(Collector):
    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        for field, (name, help) in _GAUGES.items():
            yield GaugeMetricFamily(f"fdserve_{name}", help, value=getattr(stats, field))
        for field, (name, help) in _COUNTERS.items():
            yield CounterMetricFamily(f"fdserve_{name}", help, value=getattr(stats, field))


class Metrics:
    """The server's histograms and counters, and the engine's state at the time of reading."""

    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(stats))
        self._requests = Counter(
            "fdserve_http_requests", "HTTP requests answered.", ["endpoint", "status"], registry=self._registry
        )
        self.first_token = self._histogram("time_to_first_token", "From the request to its first token.", _FIRST_TOKEN)
        self.inter_token = self._histogram("inter_token_latency", "From one token to the next.", _INTER_TOKEN)
        self.whole = self._histogram("request_latency", "From the request to its last token.", _WHOLE)

    def observe_request(self, endpoint: str, status: int) -> None:
        """Count an HTTP request."""
        self._requests.labels(endpoint, str(status)).inc()

    def render(self) -> bytes:
        """Everything in Prometheus' text format, whose media type is `CONTENT_TYPE`."""
        return generate_latest(self._registry)

    def _histogram(self, name: str, help: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"fdserve_{name}_seconds", f"{help} In seconds.", buckets=buckets, registry=self._registry)
