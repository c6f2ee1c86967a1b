"""Sums of two numbers of up to three digits: the ways to ask, the thought, the answer, and the held-out split."""

from __future__ import annotations

import random
import zlib

LIMIT = 1000
HELD_OUT_PART = 8  # one unordered pair out of this many is never trained on

PHRASES = (
    "What is {a} + {b}?",
    "{a}+{b}=",
    "{a} + {b} =",
    "{a}+{b}",
    "{a} + {b}",
    "{a} + {b}?",
    "{a}+{b}=?",
    "{a} + {b} = ?",
    "What's {a}+{b}?",
    "Add {a} and {b}",
    "Add {a} and {b}.",
    "Add {a} to {b}.",
    "How much is {a} plus {b}?",
    "How much is {a} + {b}?",
    "How much is {a} and {b}?",
    "What is {a} plus {b}?",
    "{a} plus {b}",
    "{a} plus {b}?",
    "What does {a} + {b} equal?",
    "What does {a} plus {b} make?",
    "Calculate {a} + {b}.",
    "Compute {a}+{b}",
    "Compute the sum of {a} and {b}.",
    "What is the sum of {a} and {b}?",
    "The sum of {a} and {b}",
    "Sum {a} and {b}",
    "Can you add {a} and {b}?",
    "Could you add {a} and {b} for me?",
    "Please add {a} and {b}.",
    "Tell me {a} + {b}.",
    "Give me the sum of {a} and {b}.",
    "What do you get if you add {a} and {b}?",
    "What is the total of {a} and {b}?",
    "I have {a} apples and get {b} more. How many apples do I have?",
    "There are {a} blocks and {b} more come. How many blocks are there?",
    "Solve {a} + {b}",
    "Evaluate {a} + {b}",
    "Do you know what {a} + {b} is?",
    "And {a} + {b}?",
    "Now {a} + {b}",
)
PLACES = ("Ones", "Tens", "Hundreds")


def is_held_out(a: int, b: int) -> bool:
    """Whether the pair, in either order, is kept out of training.

    Pairs of two digits under ten are never held out: there are only 55 of them, and everything else builds on them.
    """
    low, high = sorted((a, b))
    return high >= 10 and zlib.crc32(f"{low}+{high}".encode()) % HELD_OUT_PART == 0


def random_pair(
    rng: random.Random, held_out: bool = False, digits: tuple[int, ...] = (1, 2, 2, 3, 3, 3)
) -> tuple[int, int]:
    """Two numbers from the given side of the split, their lengths drawn from `digits`."""
    while True:
        a, b = (_number(rng, rng.choice(digits)) for _ in range(2))
        if is_held_out(a, b) == held_out:
            return a, b


def _number(rng: random.Random, digits: int) -> int:
    return rng.randrange(0 if digits == 1 else 10 ** (digits - 1), 10**digits)


def ask(rng: random.Random, a: int, b: int) -> str:
    return rng.choice(PHRASES).format(a=a, b=b)


def answer(a: int, b: int) -> str:
    return f"{a} + {b} = {a + b}"


def thought(a: int, b: int) -> str:
    """The sum worked out digit by digit from the right, one place a line, ending with the answer."""
    lines = [f"The user wants the sum of {a} and {b}."]
    carry, x, y = 0, a, b
    for place in PLACES:
        if not (x or y) and place != "Ones":
            break
        total = x % 10 + y % 10 + carry
        term = f"{x % 10}+{y % 10}" if place == "Ones" else f"{x % 10}+{y % 10}+{carry}"
        carry, written = divmod(total, 10)
        lines.append(f"{place}: {term}={total}, write {written}, carry {carry}.")
        x, y = x // 10, y // 10
    lines.append(f"So {answer(a, b)}")
    return "\n".join(lines)


def held_out_sums(n: int, seed: int) -> list[tuple[str, int, int]]:
    """n different held-out sums as (question, a, b); the same ones for the same seed.

    Raises ValueError where n asks for more than there are to be found.
    """
    if n > 10_000:
        raise ValueError(f"at most 10000 held-out sums, not {n}")
    rng = random.Random(seed)
    found: dict[tuple[int, int], str] = {}
    while len(found) < n:
        a, b = random_pair(rng, held_out=True)
        if (a, b) not in found:
            found[a, b] = ask(rng, a, b)
    return [(question, a, b) for (a, b), question in found.items()]
