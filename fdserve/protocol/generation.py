"""What chat and plain completions have in common: sampling fields, stream options, usage.

Every optional field of a request also takes null, which means the default. Unknown fields are ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, UnsetType

Count = Annotated[int, Meta(ge=0)]
Positive = Annotated[int, Meta(ge=1)]
Penalty = Annotated[float, Meta(ge=-2.0, le=2.0)]
Probability = Annotated[float, Meta(ge=0.0, le=1.0)]
TopLogprobs = Annotated[int, Meta(ge=0, le=20)]
StopString = Annotated[str, Meta(min_length=1)]
TokenIds = list[Count]
FinishReason = Literal["stop", "length", "tool_calls"]


class StreamOptions(msgspec.Struct, kw_only=True):
    include_usage: bool | None = None


class GenerationRequest(msgspec.Struct, kw_only=True):
    """The fields of both requests. Ranges follow FastDeploy where OpenAI has no such field."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Positive | None = None
    min_tokens: Count | None = None
    temperature: Annotated[float, Meta(ge=0.0)] | None = None
    top_p: Probability | None = None
    top_k: Annotated[int, Meta(ge=-1)] | None = None
    min_p: Probability | None = None
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] | None = None
    n: Annotated[int, Meta(ge=1, le=128)] | None = None
    stop: StopString | Annotated[list[StopString], Meta(max_length=16)] | None = None
    stop_token_ids: Annotated[TokenIds, Meta(max_length=128)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(ge=1e-3, le=1e3)] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    return_token_ids: bool | None = None
    priority: Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)] | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    extra_body: dict[str, Any] | None = None
    # Known and not supported: they would change the output, so a value is refused, not ignored.
    logit_bias: dict[str, float] | None = None
    response_format: dict[str, Any] | None = None
    bad_words: list[str] | None = None
    bad_words_token_ids: list[int] | None = None
    logits_processors_args: dict[str, Any] | None = None
    prompt_logprobs: int | None = None
    temp_scaled_logprobs: bool | None = None
    top_p_normalized_logprobs: bool | None = None
    guided_json: Any = None
    guided_regex: str | None = None
    guided_choice: list[Any] | None = None
    guided_grammar: str | None = None
    structural_tag: Any = None


class PromptTokensDetails(msgspec.Struct):
    cached_tokens: int


class CompletionTokensDetails(msgspec.Struct):
    reasoning_tokens: int


class Usage(msgspec.Struct, kw_only=True):
    """Token counts of one response: each prompt counts once, whatever its number of choices."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


OptionalUsage = Usage | None | UnsetType
OptionalIds = list[int] | UnsetType
