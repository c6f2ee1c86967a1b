"""The layout of a conversation, exactly as checkpoint/chat_template.jinja renders it, in pieces to learn or not.

The layout is that of ERNIE-4.5-21B-A3B-Thinking: one system block that holds the global setting, turns between
<|im_start|> and <|im_end|>, answers between <response> and </response>, and thoughts of earlier turns left out.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Piece:
    """A stretch of text; `learn` says whether the model is trained to write it."""

    text: str
    learn: bool


@dataclass(frozen=True)
class Turn:
    """One question with its thought and answer.

    `learn` is False where the answer is not one of the model's own; `is_call` says that it is the JSON of a tool call.
    """

    question: str
    thought: str
    answer: str
    learn: bool = True
    is_call: bool = False


Document = list[Piece]


def system_block(system: str, thinking: bool, tools: tuple[str, ...] = ()) -> str:
    """The first block; `tools` are JSON schemas."""
    setting = f"<global_setting>\nthink_mode={thinking}\n</global_setting>"
    if system:
        setting = f"<system_setting>\n{system}\n</system_setting>\n\n{setting}"
    if tools:
        setting += f"\n\n<tool_list>\n[{', '.join(tools)}]\n</tool_list>"
    return f"<|im_start|>system\n{setting}<|im_end|>\n\n"


def user_block(question: str) -> str:
    return f"<|im_start|>user\n{question}<|im_end|>\n\n"


def response(turn: Turn) -> str:
    """The answer as the model writes it after its thought, with the end of its turn."""
    if turn.is_call:
        return f"\n<tool_call>\n{turn.answer}\n</tool_call>\n<|im_end|>"
    return f"<response>\n{turn.answer}\n</response>\n<|im_end|>"


def prompt(
    turns: list[Turn], question: str, system: str = "", thinking: bool = True, tools: tuple[str, ...] = ()
) -> str:
    """What the model reads before it answers `question` after `turns`."""
    earlier = "".join(user_block(turn.question) + f"<|im_start|>assistant\n{response(turn)}\n\n" for turn in turns)
    opening = "<think>\n" if thinking else "<think>\n\n</think>\n\n"
    start = system_block(system, thinking, tools)
    return start + earlier + user_block(question) + f"<|im_start|>assistant\n{opening}"


def conversation(turns: list[Turn], system: str = "", thinking: bool = True, tools: tuple[str, ...] = ()) -> Document:
    """A conversation up to the answer of its last turn.

    The model's own answers of earlier turns are learnt too, but for their first tag: no prompt ends before it.
    """
    pieces = [Piece(system_block(system, thinking, tools), False)]
    for turn in turns[:-1]:
        written = response(turn)
        tag = written.index(">\n") + 2
        pieces.append(Piece(user_block(turn.question) + "<|im_start|>assistant\n" + written[:tag], False))
        pieces.append(Piece(written[tag:], turn.learn))
        pieces.append(Piece("\n\n", False))
    last = turns[-1]
    opening = "<|im_start|>assistant\n<think>\n"
    if thinking:
        pieces.append(Piece(user_block(last.question) + opening, False))
        pieces.append(Piece(f"{last.thought}\n</think>\n\n{response(last)}", True))
    else:
        pieces.append(Piece(user_block(last.question) + opening + "\n</think>\n\n", False))
        pieces.append(Piece(response(last), True))
    return pieces
