"""The generated training texts: the same for a seed, right in their sums, and free of held-out ones."""

from __future__ import annotations

import itertools
import random
import re

import pytest

from fdserve.demo import sums
from fdserve.demo.chat import Document, Turn, conversation, prompt
from fdserve.demo.data import documents
from fdserve.demo.howtos import HOWTOS
from fdserve.demo.sums import held_out_sums
from fdserve.demo.talk import TALK
from fdserve.demo.terms import TERMS
from fdserve.demo.unknown import unknown_question

SUM = re.compile(r"(?<![\d.+*/-])(\d{1,3}) ?(?:\+|plus) ?(\d{1,3})(?: ?=| is) ?(\d+)(?!\d|\n</think>)")

ASKED = re.compile(r"(?:what(?:'s| is) )?(\d{1,3}) ?(?:\+|plus) ?(\d{1,3}) ?[=?]*", re.IGNORECASE)


def sample(seed: int, count: int) -> list[Document]:
    return list(itertools.islice(documents(seed), count))


def text_of(document: Document) -> str:
    return "".join(piece.text for piece in document)


def test_the_same_seed_gives_the_same_documents() -> None:
    assert sample(5, 300) == sample(5, 300)
    assert sample(5, 300) != sample(6, 300)


def test_every_document_has_something_to_learn_and_ends_where_the_model_stops() -> None:
    for document in sample(1, 500):
        assert any(piece.learn for piece in document)
        assert document[-1].learn
        assert document[-1].text.endswith(("<|im_end|>", "</s>"))


def test_sums_in_the_texts_are_right_and_not_held_out() -> None:
    seen = 0
    for document in sample(2, 3000):
        for a, b, total in SUM.findall(text_of(document)):
            assert int(a) + int(b) == int(total)
            seen += 1
            if len(a) > 1 or len(b) > 1:  # the lines of a worked sum add single digits
                assert not sums.is_held_out(int(a), int(b))
    assert seen > 5000


def test_questions_for_sums_are_not_held_out() -> None:
    for document in sample(3, 2000):
        for question in re.findall(r"user\n(.*?)<\|im_end\|>", text_of(document), re.DOTALL):
            match = ASKED.fullmatch(question)
            if match:
                assert not sums.is_held_out(int(match[1]), int(match[2])), question


@pytest.mark.parametrize(("a", "b"), [(0, 0), (7, 88), (123, 456), (999, 999), (5, 995), (40, 60)])
def test_the_thought_works_the_sum_out_digit_by_digit(a: int, b: int) -> None:
    lines = sums.thought(a, b).split("\n")
    places = lines[1:-1]
    assert len(places) == max(len(str(a)), len(str(b)))
    written = "".join(re.findall(r"write (\d)", "".join(reversed(places))))
    carry = places[-1].rsplit("carry ", 1)[1].rstrip(".")
    assert int(carry + written) == a + b
    assert lines[-1] == f"So {a} + {b} = {a + b}"


def test_held_out_sums_are_distinct_repeatable_and_cover_three_digits() -> None:
    problems = held_out_sums(500, seed=11)
    assert problems == held_out_sums(500, seed=11)
    assert problems != held_out_sums(500, seed=12)
    assert len({(a, b) for _, a, b in problems}) == 500
    assert all(sums.is_held_out(a, b) and a < 1000 and b < 1000 for _, a, b in problems)
    assert all(re.search(rf"\b{a}\b.*\b{b}\b", question) for question, a, b in problems)
    assert sum(a >= 100 and b >= 100 for _, a, b in problems) > 100


def test_too_many_held_out_sums_are_refused() -> None:
    with pytest.raises(ValueError, match="at most"):
        held_out_sums(10_001, seed=1)


def test_the_split_ignores_order_and_keeps_single_digits_in_training() -> None:
    rng = random.Random(4)
    for _ in range(1000):
        a, b = rng.randrange(1000), rng.randrange(1000)
        assert sums.is_held_out(a, b) == sums.is_held_out(b, a)
    assert not any(sums.is_held_out(a, b) for a in range(10) for b in range(10))
    held_out = sum(sums.is_held_out(a, b) for a in range(100, 300) for b in range(300, 500))
    assert 0.8 / sums.HELD_OUT_PART < held_out / 40_000 < 1.2 / sums.HELD_OUT_PART


def test_no_question_of_the_tables_has_two_answers() -> None:
    answers: dict[str, str] = {}
    for entry in (*TERMS, *HOWTOS, *TALK):
        fields = (getattr(entry, field, "") for field in ("said", "asked", "names", "tasks"))
        keys = {key for field in fields for key in field.split(" | ") if key}
        for key in keys:
            assert answers.setdefault(key.lower(), entry.answer) == entry.answer, key


def test_unknown_questions_are_declined_with_one_of_few_answers() -> None:
    rng = random.Random(0)
    seen = [unknown_question(rng) for _ in range(500)]
    assert len({answer for _, _, answer in seen}) == 3
    assert len({question for question, _, _ in seen}) > 400
    assert any(not question.isascii() for question, _, _ in seen)


def test_a_conversation_begins_with_its_prompt() -> None:
    turns = [Turn("Hi", "t1", "Hello!"), Turn("1+1", "t2", "1 + 1 = 2")]
    for thinking in (True, False):
        text = text_of(conversation(turns, "Be brief.", thinking))
        assert text.startswith(prompt(turns[:1], "1+1", "Be brief.", thinking))
        assert "t1" not in text
        assert ("t2" in text) == thinking
