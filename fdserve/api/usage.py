"""How many tokens a response has used: at its end, and in every event of a stream that asks for it."""

from __future__ import annotations

from collections.abc import Sequence

from fdserve.api.choice import Choice
from fdserve.http.request import Request
from fdserve.protocol.generation import CompletionTokensDetails, GenerationRequest, PromptTokensDetails, Usage


def wants_usage(request: GenerationRequest) -> bool:
    """Whether the last event of a stream is to carry the usage."""
    options = request.stream_options
    return options is not None and bool(options.include_usage or options.continuous_usage_stats)


def usage(choices: Sequence[Choice], per_prompt: int, http: Request) -> Usage:
    """The counts of a response in which `per_prompt` choices at a time share a prompt; the access log gets them too."""
    running = RunningUsage(choices, per_prompt)
    for choice in choices:
        running.count(choice)
    total = running.so_far()
    http.prompt_tokens, http.completion_tokens = total.prompt_tokens, total.completion_tokens
    return total


class RunningUsage:
    """The usage so far, kept by adding what is new: to sum it up for every event of a thousand choices takes longer
    than to send them."""

    def __init__(self, choices: Sequence[Choice], per_prompt: int) -> None:
        self._per_prompt = per_prompt
        self._prompt = sum(len(choice.prompt) for choice in choices[::per_prompt])
        self._counted = [(0, 0, 0)] * len(choices)
        self._generated = self._reasoning = self._cached = 0

    def count(self, choice: Choice) -> None:
        """Add what a choice has come to since it was last counted."""
        # A prompt is counted once, with its first choice.
        cached = 0 if choice.index % self._per_prompt else choice.cached_tokens
        now = (choice.generated, choice.reasoning_tokens, cached)
        before, self._counted[choice.index] = self._counted[choice.index], now
        self._generated += now[0] - before[0]
        self._reasoning += now[1] - before[1]
        self._cached += now[2] - before[2]

    def so_far(self) -> Usage:
        """The prompts, and what was counted."""
        return Usage(
            prompt_tokens=self._prompt,
            completion_tokens=self._generated,
            total_tokens=self._prompt + self._generated,
            prompt_tokens_details=PromptTokensDetails(self._cached),
            completion_tokens_details=CompletionTokensDetails(self._reasoning),
        )
