"""What travels between the API process and a rank: length-prefixed msgpack frames, nothing pickled.

A frame is a 4-byte little-endian length and that many bytes of msgpack. This module is the seam between the two
processes, so both sides import it, and it imports nothing of either.
"""

from __future__ import annotations

import struct

import msgspec

MAX_FRAME_BYTES = 256 << 20
"""No request makes one so long: the scheduler bounds what a plan's new rows weigh, `MASKS_PER_FRAME` the masks."""
MASKS_PER_FRAME = 1024
HEADER = struct.Struct("<I")
PROMPT_SLICE = 64
"""The logits of so many prompt tokens are computed at a time."""


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How to choose tokens, and when to stop. Travels to the ranks as it is.

    `seed` is always set (the API draws one where the client gave none): with the position of a token it alone
    decides the random number for that token.
    """

    max_tokens: int
    """0 computes the prompt and generates nothing."""
    seed: int
    min_tokens: int = 0
    temperature: float = 1.0
    """Below 1e-5 the likeliest token is taken, the lowest id on ties."""
    top_p: float = 1.0
    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    eos_token_ids: tuple[int, ...] = ()
    """Ids that end the sequence: the model's own."""
    stop_token_ids: tuple[int, ...] = ()
    """Further ids that end the sequence, as the client asked."""
    logprobs: int | None = None
    """None: no logprobs. k >= 0: the sampled token's and the k likeliest tokens' at every position."""
    thinking_budget: int | None = None
    """If none of the first `thinking_budget` tokens ends the thinking, the ids of `think_end_ids` are forced next."""
    think_end_ids: tuple[int, ...] = ()
    """What is forced; `think_end_id` is among them."""
    think_end_id: int = -1
    answer_limit: int | None = None
    """The most tokens after `think_end_id`; None for no such limit. Counts from the first token where that is -1."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(id, what is added to its logit); an id outside the vocabulary has no effect."""
    allowed_ids: bytes = b""
    """No other ids can be chosen, as `engine.request.Constraint.mask` tells them; empty for all."""
    banned_ids: bytes = b""
    """None of these ids can be chosen, told in the same way; empty for no bans."""
    bad_words: tuple[tuple[int, ...], ...] = ()
    """Sequences of two and more ids that never come out: the last id of one has no chance after the others."""
    prompt_logprobs: int | None = None
    """As `logprobs`, for every token of the prompt but the first; always of the model's logits."""
    temp_scaled_logprobs: bool = False
    """Logprobs are of the logits divided by the temperature."""
    top_p_normalized_logprobs: bool = False
    """Logprobs are of the distribution cut to the top_p set and normalized again."""

    @property
    def needs_history(self) -> bool:
        """Whether the sampler must see the tokens so far."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    @property
    def ending_ids(self) -> tuple[int, ...]:
        """Every id that ends the sequence; banned until `min_tokens` were generated."""
        return self.eos_token_ids + self.stop_token_ids

    @property
    def weight(self) -> int:
        """No fewer bytes than it takes in a frame, as clients can make it."""
        ids = len(self.ending_ids) + len(self.think_end_ids) + sum([1 + len(word) for word in self.bad_words])
        return 1024 + 5 * ids + 15 * len(self.logit_bias) + len(self.allowed_ids) + len(self.banned_ids)


class Load(msgspec.Struct, frozen=True, tag="load"):
    """The first frame to a rank: what to load, and how large."""

    directory: str
    device: str
    """"auto", "cpu" or "gpu"."""
    rank: int
    world_size: int
    dtype: str
    """"bfloat16", "float32", "float16" or "auto"."""
    block_size: int
    num_blocks: int
    """0: as many as `kv_cache_bytes` hold."""
    kv_cache_bytes: int
    """0: what is left of a GPU's memory, or `host_cache_bytes` on a CPU."""
    host_cache_bytes: int
    """Unless the weights leave less."""
    max_num_seqs: int
    max_model_len: int
    num_threads: int
    """0: as many as the process may run on cores."""
    parent: int
    """The API process: a rank whose parent is another one has lost it already."""
    quantization: str = "none"
    """How weights are stored: "wint8", "wint4", "w8a8" or "none"."""
    kv_cache_dtype: str = "auto"
    """"bfloat16", "int8", or "auto" for what is computed in."""
    host_bytes: int = 0
    """What a rank on a CPU can have of the memory that was available when the server started; 0: not known."""
    peers: tuple[int, ...] = ()
    """Descriptors of the socket pairs between the ranks: to each other rank on rank 0, to rank 0 on the others."""
    shared_memory: int = -1
    """Descriptor of the memory that the ranks share, with slots of `slot_bytes` each: see `ops.SharedMemory`."""
    slot_bytes: int = 0
    rendezvous: str = ""
    """Where ranks of one host that share no memory meet, "host:port"; empty where a launcher's variables say it."""


class NewRow(msgspec.Struct, frozen=True, array_like=True):
    """A sequence enters a row, for the first time or after a preemption."""

    row: int
    token_ids: bytes
    """All tokens so far, int32."""
    num_prompt: int
    num_computed: int
    blocks: tuple[int, ...]
    params: SamplingParams
    prompt_logprobs: int = -1
    """How many of the likeliest tokens to report with each prompt token's logprob; -1 for no report."""

    @property
    def weight(self) -> int:
        """No fewer bytes than it takes in a frame."""
        return 64 + len(self.token_ids) + 5 * len(self.blocks) + self.params.weight


class Plan(msgspec.Struct, frozen=True, tag="plan", omit_defaults=True):
    """One step. Carries only what changed: the ranks keep every row's tokens, blocks and sampling state."""

    step: int
    new_rows: list[NewRow]
    new_blocks: list[tuple[int, int]]
    """(row, block) to append to the row's block table, in order."""
    rows: list[int]
    """The rows of this step."""
    num_tokens: list[int]
    """How many tokens each of `rows` computes. A row whose tokens are then all computed samples one more, unless its
    `max_tokens` is 0."""
    masked_rows: list[int] = []
    """The rows that sample and have a constraint. If there are any, `Masks` follow, and the ranks wait for them before
    they sample."""
    drafts: list[tuple[int, list[int]]] = []
    """(row, guesses at its next tokens), which `num_tokens` counts. Such a row computes its last token and the guesses,
    samples after each of them, and keeps what it samples as far as the guesses before were right."""


class Masks(msgspec.Struct, frozen=True, tag="masks", omit_defaults=True):
    """What the constrained rows of a step may sample, or `MASKS_PER_FRAME` of them."""

    step: int
    rows: list[int]
    """Those of the plan's `masked_rows` that have a mask; the others may sample anything."""
    masks: list[bytes]
    """See `engine.request.Constraint.mask`."""
    more: bool = False
    """Whether another frame of the same step follows."""


class Loading(msgspec.Struct, frozen=True, tag="loading"):
    """Progress of a rank's start."""

    what: str
    done: int
    total: int


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """A rank has loaded its shard and allocated its blocks."""

    num_blocks: int
    dtype: str
    kv_cache_bytes: int


class StepResult(msgspec.Struct, frozen=True, tag="result", omit_defaults=True):
    """What a step sampled: R tokens, one of each row that sampled, or as many as `counts` says, in the plan's order."""

    step: int
    token_ids: bytes
    """int32 [R]; `ops.sampling.BROKEN` or `NOTHING_ALLOWED` where there is none."""
    num_top: int = 0
    logprobs: bytes = b""
    """float32 [R]; empty if no row of the step asked."""
    top_ids: bytes = b""
    """int32 [R, num_top]"""
    top_logprobs: bytes = b""
    """float32 [R, num_top]"""
    prompt_num_top: int = 0
    prompt_logprobs: bytes = b""
    """float32 [P]: of the prompt tokens that follow a token of this step, row by row in the plan's order, for the rows
    that report them."""
    prompt_top_ids: bytes = b""
    """int32 [P, prompt_num_top]"""
    prompt_top_logprobs: bytes = b""
    """float32 [P, prompt_num_top]"""
    seconds: float = 0.0
    """What the step took inside the rank, less what it waited for masks."""
    counts: bytes = b""
    """int32, tokens of each row that sampled; empty if the plan had no drafts: one each."""


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The rank cannot go on; it exits after this frame."""

    message: str
    lost_peer: bool = False
    """Another rank is gone: why, that one may say."""


ToRank = Load | Plan | Masks
FromRank = Loading | Ready | StepResult | Failed

_encoder = msgspec.msgpack.Encoder()
_to_rank: msgspec.msgpack.Decoder[ToRank] = msgspec.msgpack.Decoder(Load | Plan | Masks)
_from_rank: msgspec.msgpack.Decoder[FromRank] = msgspec.msgpack.Decoder(Loading | Ready | StepResult | Failed)


def encode_frame(message: ToRank | FromRank) -> bytes:
    """The message as one frame, header included."""
    body = _encoder.encode(message)
    return HEADER.pack(len(body)) + body


def decode_to_rank(body: bytes) -> ToRank:
    """A frame's body as the rank reads it. Raises msgspec.DecodeError."""
    return _to_rank.decode(body)


def decode_from_rank(body: bytes) -> FromRank:
    """A frame's body as the API process reads it. Raises msgspec.DecodeError."""
    return _from_rank.decode(body)
