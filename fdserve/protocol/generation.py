"""What chat and plain completions have in common: sampling fields, stream options, usage.

Every optional field of a request also takes null, which means the default. Unknown fields are ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, UnsetType

from fdserve.protocol.structured import Options, ResponseFormat, Schema, Source, StructuredOutputs, Tags

Count = Annotated[int, Meta(ge=0)]
Positive = Annotated[int, Meta(ge=1)]
Penalty = Annotated[float, Meta(ge=-2.0, le=2.0)]
Probability = Annotated[float, Meta(ge=0.0, le=1.0)]
Bias = Annotated[float, Meta(ge=-100.0, le=100.0)]
TopLogprobs = Annotated[int, Meta(ge=0, le=20)]
Text = Annotated[str, Meta(min_length=1)]
# No model has ids beyond it. Integers of any size could be chosen to have one hash, and a set of them takes for ever.
TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
TokenIds = list[TokenId]
# "$" alone also matches before a line break at the end; JSON schemas, which the pattern goes into, know no \Z.
RequestId = Annotated[str, Meta(pattern=r"^[A-Za-z0-9._:-]{1,128}$(?!\n)")]
FinishReason = Literal["stop", "length", "tool_calls"]


class StreamOptions(msgspec.Struct, kw_only=True):
    """`include_obfuscation` is OpenAI's and ignored: these streams have none."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


class GenerationRequest(msgspec.Struct, kw_only=True):
    """The fields of both requests. Ranges follow FastDeploy where OpenAI has no such field."""

    model: str | None = None
    prompt_token_ids: TokenIds | None = None
    truncate_prompt_tokens: Annotated[int, Meta(ge=-1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_streaming_response_tokens: Positive | None = None
    min_tokens: Count | None = None
    n: Annotated[int, Meta(ge=1, le=128)] | None = None
    # How to choose tokens.
    temperature: Annotated[float, Meta(ge=0.0)] | None = None
    top_p: Probability | None = None
    top_k: Annotated[int, Meta(ge=-1)] | None = None
    min_p: Probability | None = None
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(ge=1e-3, le=1e3)] | None = None
    logit_bias: Annotated[dict[TokenId, Bias], Meta(max_length=4096)] | None = None
    bad_words: Annotated[list[Text], Meta(max_length=1024)] | None = None
    bad_words_token_ids: TokenIds | None = None
    allowed_token_ids: Annotated[TokenIds, Meta(min_length=1)] | None = None
    # When to stop, and what of it to show.
    stop: Text | list[Text] | None = None
    stop_token_ids: Annotated[TokenIds, Meta(max_length=128)] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    # What the output must look like; at most one of these, and of a response_format other than text.
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | None = None
    guided_regex: Source | None = None
    guided_choice: Options | None = None
    guided_grammar: Source | None = None
    structural_tag: Tags | None = None
    # What else to tell.
    prompt_logprobs: TopLogprobs | None = None
    temp_scaled_logprobs: bool | None = None
    top_p_normalized_logprobs: bool | None = None
    return_token_ids: bool | None = None
    # How to serve the request.
    priority: Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)] | None = None
    cache_salt: Text | None = None
    request_id: RequestId | None = None
    extra_body: dict[str, Any] | None = None
    # Known, and without effect here.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None
    # Known and not supported: it would change the output, so a value is refused, not ignored.
    logits_processors_args: dict[str, Any] | None = None


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


class PromptLogprob(msgspec.Struct):
    """One candidate for a place in the prompt. `rank` is 1 for the likeliest; null beyond those asked for."""

    logprob: float
    rank: int | None
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]
"""For each token of the prompt, the token itself and the likeliest ones by their ids; null for the first."""

OptionalUsage = Usage | None | UnsetType
OptionalIds = list[int] | UnsetType
OptionalPromptLogprobs = PromptLogprobs | UnsetType
