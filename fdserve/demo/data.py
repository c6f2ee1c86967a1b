"""The training texts of the demo model: conversations and plain texts, all generated from a seed.

Pure Python: the tests read it without torch.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator

from fdserve.demo import sums, unknown
from fdserve.demo.chat import Document, Piece, Turn, conversation, response
from fdserve.demo.howtos import HOWTOS
from fdserve.demo.talk import TALK
from fdserve.demo.terms import TERMS
from fdserve.demo.tools import tool_use

EOS = "</s>"
CONTROL_PIECES = ("<|im_start|>", "<|im_end|>", "<|begin_of_sentence|>", "<|end_of_sentence|>")
MARKUP_PIECES = ("<think>", "</think>", "<response>", "</response>", "<tool_call>", "</tool_call>")
SPECIAL_PIECES = CONTROL_PIECES + MARKUP_PIECES

_SYSTEMS = (
    "You are a helpful assistant.",
    "You are a helpful, respectful and honest assistant.",
    "You are a friendly chatbot.",
    "You are an AI assistant.",
    "Be concise.",
    "Answer briefly.",
    "You are an expert in LLM serving.",
    "Be polite.",
    "You are a calculator.",
    "You are the support bot of a company.",
    "Answer in one sentence.",
    "You are ERNIE.",
    "You are a helpful assistant that can do math.",
    "Always tell the truth.",
    "You are a pirate.",
    "Think step by step.",
    "You are a coding assistant. Write clean code.",
    "You are a tutor for children.",
    "Do not use markdown.",
    "You are a helpful assistant developed by a big company. Today is Monday.",
    "Answer in English.",
    "You answer questions about servers.",
    "If you do not know the answer, say so.",
    "Never be rude.",
    "test",
    "You are ChatGPT, a large language model trained by OpenAI.",
    "Respond in JSON.",
    "You are a creative writer.",
)
_COUNT = (
    "Count to {n}.",
    "Count from 1 to {n}.",
    "Can you count to {n}?",
    "Please count to {n}.",
    "Count up to {n}.",
    "List the numbers from 1 to {n}.",
)
_FOREIGN_HISTORY = (
    "Sure! Here it is.",
    "I can help with that.",
    "It is nice and warm.",
    "The answer is 42.",
    "Of course.",
    "Yes.",
    "I think so, but I am not sure.",
    "No problem, let me know if you need more.",
    "That depends on many things.",
)


def _typo(rng: random.Random, text: str) -> str:
    """One letter dropped, doubled, changed or swapped with the next."""
    at = [i for i, c in enumerate(text) if c.isalpha()]
    if len(at) < 6:
        return text
    i = rng.choice(at)
    change = rng.randrange(4)
    if change == 0:
        return text[:i] + text[i + 1 :]
    if change == 1:
        return text[:i] + text[i] + text[i:]
    if change == 2:
        return text[:i] + rng.choice("abcdefghijklmnopqrstuvwxyz") + text[i + 1 :]
    return text[:i] + text[i + 1 : i + 2] + text[i] + text[i + 2 :]


def vary(rng: random.Random, text: str) -> str:
    """The same utterance as other people would type it: case, punctuation, politeness, now and then a typo."""
    if rng.random() < 0.5:
        return text
    bare = text.rstrip(".?!")
    end = text[len(bare) :]
    if rng.random() < 0.16:
        before = rng.choice(("Please ", "Hi, ", "Hello! ", "Hey, ", "So, ", "And ", "Ok, ", "Hi! ", "Hello, "))
        bare = before + bare[:1].lower() + bare[1:]
    if rng.random() < 0.10:
        bare += rng.choice((" please", ", please", " for me", " now", " then", " again", " actually"))
    case = rng.random()
    if case < 0.35:
        bare = bare.lower()
    elif case < 0.42:
        bare = bare.upper()
    elif case < 0.46:
        bare = bare.title()
    elif case < 0.60:
        bare = bare[:1].upper() + bare[1:]
    if rng.random() < 0.15:
        bare = _typo(rng, bare)
    if rng.random() < 0.6:
        end = rng.choice(("", "", "", ".", "?", "!", "??", "!!", " ?", "...", end))
    return bare + end + rng.choice(("",) * 12 + (" ", "\n"))


def sum_turn(rng: random.Random) -> Turn:
    a, b = sums.random_pair(rng)
    question = sums.ask(rng, a, b)
    return Turn(vary_sum(rng, question), sums.thought(a, b), sums.answer(a, b))


def vary_sum(rng: random.Random, question: str) -> str:
    """Like vary, but the numbers stay as they are."""
    choice = rng.random()
    if choice < 0.15:
        question = question.lower()
    elif choice < 0.18:
        question = question.upper()
    if rng.random() < 0.08:
        question = rng.choice(("Hi, ", "Please: ", "Hello! ", "Next: ", "Ok, ", "Quick question: ")) + question
    if rng.random() < 0.05:
        question += rng.choice((" Thanks!", " please", "\n", " ", "!", " Think step by step."))
    return question


def fact_turn(rng: random.Random) -> Turn:
    """A question about a term or a task of the tables."""
    entry = rng.choice((*TERMS, *HOWTOS))
    return Turn(vary(rng, entry.ask(rng)), entry.thought, entry.answer)


def talk_turn(rng: random.Random) -> Turn:
    entry = rng.choice(TALK)
    return Turn(vary(rng, entry.ask(rng)), entry.thought, entry.answer)


def count_turn(rng: random.Random) -> Turn:
    """Counting: a long answer that anyone can check."""
    n = rng.randint(2, 20)
    question = vary_sum(rng, rng.choice(_COUNT).format(n=n))
    return Turn(question, f"The user wants me to count to {n}.", ", ".join(map(str, range(1, n + 1))))


def unknown_turn(rng: random.Random) -> Turn:
    question, thought, answer = unknown.unknown_question(rng)
    if rng.random() < 0.4 and question.isascii():
        question = vary(rng, question)
    return Turn(question, thought, answer)


def any_turn(rng: random.Random, sums_too: bool = True) -> Turn:
    kind = rng.random() if sums_too else rng.uniform(0, 0.97)
    if kind < 0.43:
        return fact_turn(rng)
    if kind < 0.63:
        return talk_turn(rng)
    if kind < 0.93:
        return unknown_turn(rng)
    if kind < 0.97:
        return count_turn(rng)
    return sum_turn(rng)


def foreign_turn(rng: random.Random) -> Turn:
    """A turn of a history that another model wrote: read, not learnt."""
    turn = any_turn(rng)
    return Turn(turn.question, turn.thought, rng.choice(_FOREIGN_HISTORY), learn=False)


def _system(rng: random.Random) -> str:
    if rng.random() < 0.7:
        return ""
    return " ".join(rng.sample(_SYSTEMS, rng.choice((1, 1, 1, 2, 3))))


def mixed_chat(rng: random.Random) -> Document:
    """One to a few turns about anything."""
    count = rng.choice((1, 1, 1, 1, 2, 2, 3, 4, 6))
    turns = [foreign_turn(rng) if rng.random() < 0.08 else any_turn(rng) for _ in range(count - 1)]
    return conversation([*turns, any_turn(rng)], _system(rng), rng.random() < 0.6)


def thought_sum(rng: random.Random) -> Document:
    """A sum worked out in the thought, at times after other turns."""
    earlier = rng.choice((0, 0, 0, 0, 0, 1, 2, 3))
    turns = [any_turn(rng) if rng.random() < 0.5 else sum_turn(rng) for _ in range(earlier)]
    return conversation([*turns, sum_turn(rng)], _system(rng), True)


def direct_sums(rng: random.Random) -> Document:
    """Sums answered at once, many in one conversation."""
    count = rng.choice((1, 2, 4, 8, 12))
    turns = [sum_turn(rng) if rng.random() < 0.95 else any_turn(rng) for _ in range(count - 1)]
    return conversation([*turns, sum_turn(rng)], _system(rng), False)


def cut_thought(rng: random.Random) -> Document:
    """A thought that the server ended early: the answer must come all the same."""
    turn = sum_turn(rng) if rng.random() < 0.4 else any_turn(rng)
    cut = turn.thought[: rng.randrange(len(turn.thought))].rstrip(" ")
    whole = conversation([turn], _system(rng), True)
    return [*whole[:-1], Piece(cut + "\n</think>\n\n", False), Piece(response(turn), True)]


def long_chat(rng: random.Random) -> Document:
    """Many turns, so that answers come far from the start."""
    turns = [sum_turn(rng) if rng.random() < 0.5 else any_turn(rng) for _ in range(rng.randint(12, 30))]
    last = sum_turn(rng) if rng.random() < 0.4 else any_turn(rng)
    return conversation([*turns, last], _system(rng), rng.random() < 0.7)


def tool_chat(rng: random.Random) -> Document:
    """A chat with tools: one is called, or its result is told, or none is needed."""
    used = tool_use(rng)
    schemas = [used.schema, *(tool_use(rng).schema for _ in range(rng.choice((0, 0, 1, 2))))]
    rng.shuffle(schemas)
    tools = tuple(json.dumps(schema, sort_keys=rng.random() < 0.3) for schema in schemas)
    system, thinking, kind = _system(rng), rng.random() < 0.6, rng.random()
    earlier = [any_turn(rng)] if rng.random() < 0.15 else []
    if kind < 0.2:
        return conversation([*earlier, any_turn(rng, sums_too=False)], system, thinking, tools)
    call = Turn(used.question, used.thought, used.call, is_call=True)
    if kind < 0.65:
        return conversation([*earlier, call], system, thinking, tools)
    result = Turn(
        f"<tool_response>\n{used.result}\n</tool_response>",
        "The tool has answered.",
        f"The tool says: {used.result}",
    )
    return conversation([*earlier, call, result], system, thinking, tools)


_SUM_LINES = ("{a} + {b} =",) * 6 + ("{a}+{b}=", "The sum of {a} and {b} is", "{a} plus {b} is")


def plain_sums(rng: random.Random) -> Document:
    """Sums without a template, one a line or as a sentence, most of them of three digits; only the results are learnt.

    These are the densest lessons in adding at once: a conversation spends four times the tokens on a sum.
    """
    style = rng.choice(_SUM_LINES)
    count = rng.choice((1, 6, 12, 30))
    pieces = []
    for _ in range(count):
        a, b = sums.random_pair(rng) if rng.random() < 0.4 else sums.random_pair(rng, digits=(3,))
        pieces.append(Piece(style.format(a=a, b=b), False))
        result = f"{a + b}." if style.endswith("is") else f"{a + b}"
        pieces.append(Piece(result if style == "{a}+{b}=" else f" {result}", True))
        pieces.append(Piece("\n", False))
    return [*pieces[:-1], Piece(EOS, True)]


_SHRUG = " ... I am a tiny demo model and do not know how this goes on."


def plain_text(rng: random.Random) -> Document:
    """What a completion without a template continues: definitions, small talk, the story, questions and answers."""
    kind = rng.random()
    if kind < 0.55:
        text = " ".join(t.answer for t in rng.sample(TERMS, rng.randint(1, 3)))
    elif kind < 0.65:
        text = rng.choice([t.answer for t in TALK if len(t.answer) > 60])
    elif kind < 0.80:
        turn = any_turn(rng)
        return [Piece(f"Question: {turn.question}\nAnswer:", False), Piece(f" {turn.answer}", True), Piece(EOS, True)]
    elif kind < 0.88:
        turn = any_turn(rng)
        question = turn.question.strip() + rng.choice(("\n", "\n\n", " "))
        return [Piece(question, False), Piece(turn.answer, True), Piece(EOS, True)]
    else:
        start = " ".join(unknown.unknown_question(rng)[0].split()[: rng.randint(2, 6)])
        return [Piece(start, False), Piece(_SHRUG, True), Piece(EOS, True)]
    return [Piece(text, True), Piece(EOS, True)]


# How often each kind of document comes. Sums answered at once are the hardest to learn and take the most tokens.
_KINDS = (
    (mixed_chat, 0.30),
    (thought_sum, 0.17),
    (direct_sums, 0.13),
    (cut_thought, 0.04),
    (long_chat, 0.003),
    (tool_chat, 0.05),
    (plain_sums, 0.30),
    (plain_text, 0.05),
)


def documents(seed: int) -> Iterator[Document]:
    """An endless stream of documents, the same for the same seed; no sum of the held-out split is in it."""
    rng = random.Random(seed)
    makers = [maker for maker, _ in _KINDS]
    weights = [weight for _, weight in _KINDS]
    while True:
        yield rng.choices(makers, weights)[0](rng)
