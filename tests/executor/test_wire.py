from __future__ import annotations

import pytest

from fdserve.executor.wire import (
    HEADER,
    Failed,
    Load,
    Masks,
    NewRow,
    Plan,
    SamplingParams,
    StepResult,
    decode_from_rank,
    decode_to_rank,
    encode_frame,
)

PARAMS = SamplingParams(
    max_tokens=3,
    seed=2**59,
    stop_token_ids=(7,),
    logprobs=0,
    thinking_budget=4,
    logit_bias=((3, 1.5),),
    allowed_ids=b"\x07\x00\x00\x00",
    banned_ids=b"\x01\x00\x00\x00",
    bad_words=((1, 2),),
)


@pytest.mark.parametrize(
    "message",
    [
        Load("dir", "cpu", 0, 1, "auto", 64, 0, 1 << 40, 1 << 30, 256, 0, 2, 1),
        Plan(7, [NewRow(3, b"\x01\x00\x00\x00", 1, 0, (5, 6), PARAMS, 4)], [(1, 9)], [3, 1], [1, 1], [3]),
        Plan(8, [], [], [3], [3], drafts=[(3, [7, 8])]),
        Masks(7, [3], [b"\xff\x00\x00\x00"]),
        Masks(7, [3], [b"\xff\x00\x00\x00"], more=True),
    ],
)
def test_frames_to_a_rank_round_trip(message: Load | Plan | Masks) -> None:
    frame = encode_frame(message)
    assert HEADER.unpack_from(frame) == (len(frame) - HEADER.size,)
    assert decode_to_rank(frame[HEADER.size :]) == message


@pytest.mark.parametrize(
    "message",
    [Failed("why"), StepResult(1, b"\xff\xff\xff\xff", 1, b"abcd", b"efgh", b"ijkl", 2, b"mnop", b"", b"", 0.5)],
)
def test_frames_from_a_rank_round_trip(message: Failed | StepResult) -> None:
    assert decode_from_rank(encode_frame(message)[HEADER.size :]) == message


def test_a_step_of_256_decodes_is_a_small_frame() -> None:
    assert len(encode_frame(Plan(1000, [], [], list(range(256)), [1] * 256))) < 1024


def test_ending_ids_and_history() -> None:
    assert SamplingParams(max_tokens=1, seed=0, eos_token_ids=(2,), stop_token_ids=(7, 8)).ending_ids == (2, 7, 8)
    assert not SamplingParams(max_tokens=1, seed=0).needs_history
    assert SamplingParams(max_tokens=1, seed=0, repetition_penalty=1.1).needs_history
    assert SamplingParams(max_tokens=1, seed=0, presence_penalty=-0.5).needs_history
