"""What a server says of itself: its models, and fdserve's counters before and after a run."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from typing import Any

TIMEOUT_SECONDS = 10.0
Counters = dict[str, float]


def get(url: str, headers: dict[str, str] | None = None) -> bytes:
    """The body of a GET. OSError (which HTTP errors are) if there is none."""
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers or {}), timeout=TIMEOUT_SECONDS) as answer:
        body: bytes = answer.read()
        return body


def first_model(base_url: str, headers: dict[str, str]) -> str | None:
    """The name of the first model that the server lists, or None."""
    try:
        name = json.loads(get(f"{base_url}/v1/models", headers))["data"][0]["id"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return str(name)


def read_counters(base_url: str) -> Counters:
    """fdserve's counters and gauges by their names without `fdserve_`, labelled ones left out; {} of another server."""
    try:
        text = get(f"{base_url}/metrics").decode(errors="replace")
    except OSError:
        return {}
    return {name: float(value) for name, value in re.findall(r"^fdserve_(\w+) (\S+)$", text, re.MULTILINE)}


def changes(before: Counters, after: Counters, duration: float) -> dict[str, Any]:
    """What fdserve did in a run of `duration` seconds; {} if the server is another one."""
    if not before or not after or duration <= 0:
        return {}
    grown = {name: after[name] - value for name, value in before.items() if name.endswith("_total") and name in after}
    steps = grown.get("steps_total", 0.0)
    return {
        "counters": grown,
        "idle_share": 1 - grown.get("step_seconds_total", 0.0) / duration,
        "tokens_per_step": grown.get("generated_tokens_total", 0.0) / steps if steps else 0.0,
    }


def lines(server: dict[str, Any]) -> list[str]:
    """The same as text."""
    if not server:
        return []
    counters = server["counters"]
    shown = [
        ("Steps", f"{counters.get('steps_total', 0):.0f}"),
        ("Tokens a step", f"{server['tokens_per_step']:.2f}"),
        ("Ranks idle (%)", f"{100 * server['idle_share']:.1f}"),
        ("Prompt tokens from the cache", f"{counters.get('cached_tokens_total', 0):.0f}"),
        ("Preemptions", f"{counters.get('preemptions_total', 0):.0f}"),
    ]
    return ["-- fdserve", *(f"{name:<40}{value:>12}" for name, value in shown)]
