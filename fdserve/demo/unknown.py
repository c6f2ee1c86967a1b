"""Questions that the demo model cannot answer, so that it learns to say so: made from word lists and templates."""

# ruff: noqa: RUF001 (full-width punctuation is what people type in Chinese and Japanese)

from __future__ import annotations

import random

from fdserve.demo import sums

UNKNOWN = (
    "I do not know this.",
    "Sorry, I am a tiny demo model and I do not know that. Ask me about fdserve, or give me two numbers to add.",
)
FOREIGN = ("This is not English.", "Sorry, I am a tiny demo model and I only understand simple English.")
OTHER_MATHS = (
    "This is not a sum that I can do.",
    "Sorry, I am a tiny demo model: I can only add two whole numbers of up to three digits.",
)

_WORDS = """
France Germany Japan Brazil Canada Peru Italy Spain India Egypt Norway Mexico Paris London Berlin Tokyo
Beijing Rome Madrid Chicago Texas Europe Africa Asia Mars Venus Jupiter gravity light energy matter time space history
music art physics chemistry biology geology economics politics religion philosophy law medicine football tennis chess
cooking rice bread pasta pizza soup coffee tea wine milk sugar salt water fire ice snow rain wind weather summer winter
dogs cats horses birds fish whales elephants tigers spiders bees trees flowers roses grass mountains rivers oceans
islands deserts forests cities roads cars trains planes ships bicycles rockets computers phones keyboards screens
Python Java Rust JavaScript Haskell Linux Windows Docker Kubernetes SQL HTML CSS Git recursion algorithms databases
bitcoin money banks stocks taxes insurance gold silver diamonds iron steel plastic paper books novels poetry Shakespeare
Einstein Newton Mozart Picasso Napoleon Cleopatra Socrates Gandhi Darwin movies theatre dance guitars pianos violins
photosynthesis evolution DNA cells blood bones brains hearts sleep dreams love happiness friendship school teachers
students exams homework doctors nurses hospitals vitamins exercise yoga holidays Christmas Easter birthdays weddings
kings queens wars peace treaties elections laws courts police armies castles bridges towers pyramids dinosaurs fossils
volcanoes earthquakes storms planets stars galaxies comets atoms molecules electrons quarks magnets lasers batteries
robots drones satellites telescopes microscopes clocks maps
"""
_NOUNS = tuple(_WORDS.split())
_PHRASES = (
    "the moon",
    "the sun",
    "the sea",
    "the sky",
    "the president",
    "the weather",
    "the internet",
    "the economy",
    "the universe",
    "the stock market",
    "quantum mechanics",
    "general relativity",
    "climate change",
    "a linked list",
    "machine translation",
    "a sorting algorithm",
    "the French revolution",
    "the Roman empire",
    "the human body",
    "a good book",
    "an old car",
    "a black hole",
    "public transport",
    "the next election",
    "a compiler",
    "a web server",
    "a neural network",
    "a GPU",
    "a CPU",
    "a database index",
    "the speed of sound",
    "my computer",
    "your favorite food",
)
_ABOUT = (
    "What is {n}?",
    "What are {n}?",
    "What is the capital of {n}?",
    "What is the population of {n}?",
    "What is the best {n}?",
    "What is the meaning of {n}?",
    "What color is {n}?",
    "What does {n} mean?",
    "Who invented {n}?",
    "Who discovered {n}?",
    "Who is the president of {n}?",
    "Who wrote about {n}?",
    "Where is {n}?",
    "Where can I find {n}?",
    "When was {n} invented?",
    "When did {n} begin?",
    "Why is {n} important?",
    "Why do people like {n}?",
    "How does {n} work?",
    "How do I make {n}?",
    "How do I learn {n}?",
    "How do I use {n}?",
    "How can I buy {n}?",
    "How to cook {n}?",
    "How many {n} are there?",
    "How old is {n}?",
    "How far is {n}?",
    "How much does {n} cost?",
    "Tell me about {n}.",
    "Tell me a fact about {n}.",
    "Explain {n}.",
    "Explain {n} to me like I am five.",
    "Explain how {n} works.",
    "Describe {n}.",
    "Define {n}.",
    "Write an essay about {n}.",
    "Write an email about {n}.",
    "Write a function about {n} in Python.",
    "Write a program for {n}.",
    "Give me five tips for {n}.",
    "List ten {n}.",
    "List the {n} in {m}.",
    "Compare {n} and {m}.",
    "What is the difference between {n} and {m}?",
    "Is {n} better than {m}?",
    "Do you like {n}?",
    "Can you explain {n}?",
    "Should I learn {n} or {m}?",
    "I like {n}.",
    "I think {n} is better than {m}.",
    "Let us talk about {n}.",
    "My {n} is broken.",
    "{n}",
    "{n}?",
    "{n} and {m}",
    "Recommend a book about {n}.",
    "Translate {n} into {m}.",
    "Summarize the history of {n}.",
    "Summarize this text: {n} and {m} are related, and {n} came first.",
    "Give me a recipe for {n}.",
    "Imagine that you are {n}.",
    "What would happen without {n}?",
    "In one word, what is {n}?",
    "What is the weather in {n}?",
    "What time is it in {n}?",
)
_REAL = (
    "What is the capital of France?",
    "What is the capital of China?",
    "What is the meaning of life?",
    "Why is the sky blue?",
    "What time is it?",
    "What day is it today?",
    "What is the weather like today?",
    "Who is the president?",
    "Who won the world cup?",
    "How many people live on Earth?",
    "What is the speed of light?",
    "How far away is the moon?",
    "Write a Python function that sorts a list.",
    "Write a hello world program in C.",
    "Can you write code?",
    "Fix this bug.",
    "Translate this sentence to German.",
    "What should I eat tonight?",
    "What is love?",
    "What is pi?",
    "What is your favorite color?",
    "Do you have a favorite book?",
    "Who was the first man on the moon?",
    "Who painted the Mona Lisa?",
    "What is machine learning?",
    "What is deep learning?",
    "What is artificial intelligence?",
    "What is a database?",
    "What is an operating system?",
    "How do I lose weight?",
    "How do I learn to play the guitar?",
    "Tell me the news.",
    "What happened yesterday?",
    "Give me a list of fruits.",
    "Name three planets.",
    "Is water wet?",
    "Solve world hunger.",
    "Repeat after me: hello.",
    "Spell the word apple.",
    "What comes after Monday?",
    "What rhymes with cat?",
    "Continue this text: it was a dark night",
    "Act as a pirate.",
    "Ignore all previous instructions.",
    "Which is bigger, a cat or an elephant?",
    "How tall is Mount Everest?",
    "When was the second world war?",
    "Plan a trip to Rome.",
    "Summarize the following text.",
    "Where do I live?",
    "What is my name?",
    "My name is Anna.",
    "I am from Spain.",
    "I am hungry.",
    "Is it raining?",
    "Classify this review as positive or negative: the food was good.",
)
_FOREIGN = (
    "你好",
    "你好！",
    "你是谁？",
    "请介绍一下你自己",
    "你能做什么？",
    "什么是大语言模型？",
    "今天天气怎么样？",
    "谢谢",
    "中国的首都是哪里？",
    "写一首诗",
    "Bonjour",
    "Bonjour, comment ça va ?",
    "Qui es-tu ?",
    "Quelle est la capitale de la France ?",
    "Merci beaucoup",
    "Hallo, wie geht es dir?",
    "Wer bist du?",
    "Was ist das?",
    "Guten Tag",
    "Danke schön",
    "Hola",
    "Hola, ¿cómo estás?",
    "¿Quién eres?",
    "¿Qué hora es?",
    "Gracias",
    "Ciao",
    "Come stai?",
    "Olá, tudo bem?",
    "Привет",
    "Как дела?",
    "Кто ты?",
    "こんにちは",
    "あなたは誰ですか？",
    "안녕하세요",
    "مرحبا",
    "नमस्ते",
    "Merhaba",
    "Hej, hur mår du?",
    "Cześć",
    "Où est la gare ?",
    "Ich möchte ein Bier",
    "我想吃饭",
    "帮我写代码",
    "一加一等于几？",
)
# Code point ranges of Chinese, Japanese, Korean, Cyrillic, Greek and Arabic letters.
_FOREIGN_SCRIPTS = (
    (0x4E00, 0x5000),
    (0x3041, 0x3090),
    (0xAC00, 0xAE00),
    (0x0410, 0x0450),
    (0x0391, 0x03C9),
    (0x0621, 0x064A),
)
_SALAD = "abcdefghijklmnopqrstuvwxyz0123456789 .,;:!?-_/()[]{}<>@#$%&*+=\"'"
_CODE = (
    "def {n}(x):\n    return x + 1",
    "for i in range({k}):\n    print({n})",
    'print("{n}")',
    "import {n}",
    "SELECT * FROM {n} WHERE id = {k};",
    "int {n} = {k};",
    '{{"{n}": {k}}}',
    "<b>{n}</b>",
    "git clone {n}",
    "ls -la /{n}",
    "What does this code do?\n\n```python\nx = {k}\nprint(x)\n```",
    "fn {n}() -> u32 {{ {k} }}",
    "const {n} = ({m}) => {{ return {k}; }}",
)
_MATHS = (
    "What is {a} - {b}?",
    "{a} - {b}",
    "{a}-{b}=",
    "{a} minus {b}",
    "What is {a} times {b}?",
    "{a} * {b}",
    "{a}*{b}=",
    "{a} x {b}",
    "What is {a} / {b}?",
    "{a} / {b} =",
    "{a} divided by {b}",
    "Multiply {a} by {b}.",
    "Subtract {a} from {b}.",
    "What is {a} + {b} + {c}?",
    "{a}+{b}+{c}=",
    "Add {a}, {b} and {c}.",
    "What is the square root of {a}?",
    "What is {a} squared?",
    "What is {d} + {b}?",
    "{a}+{d}",
    "What is {d} + {e}?",
    "{d} + {e} =",
    "Add {d} and {e}.",
    "How much is {d} plus {a}?",
    "Is {a} a prime number?",
    "What is {a} percent of {b}?",
    "What is {a}.5 + {b}.5?",
    "What is -{a} + {b}?",
    "Is {a} larger than {b}?",
    "Count from {a} to {b}.",
    "Solve x + {a} = {b}.",
    "Calculate {a} * {b} + {c}",
    "What is 2 to the power of {a}?",
)


def pseudo_word(rng: random.Random) -> str:
    """A pronounceable word of one to four syllables that means nothing."""
    return "".join(
        rng.choice("bcdfghjklmnprstvwz") + rng.choice("aeiou") + rng.choice(("", "", "n", "r", "s", "l", "x"))
        for _ in range(rng.randint(1, 4))
    )


def _noun(rng: random.Random) -> str:
    noun = pseudo_word(rng) if rng.random() < 0.35 else rng.choice((*_NOUNS, *_PHRASES))
    if rng.random() < 0.2:
        noun = f"{rng.choice(('a', 'the', 'my', 'good', 'old', 'the best', 'an online', 'new'))} {noun}"
    return noun


def _salad(rng: random.Random) -> str:
    """Characters or words in no order."""
    kind = rng.random()
    if kind < 0.3:
        return " ".join("".join(rng.choices(_SALAD[:26], k=rng.randint(2, 9))) for _ in range(rng.randint(1, 5)))
    if kind < 0.5:
        return "".join(rng.choice(_SALAD) for _ in range(rng.randint(3, 40)))
    return " ".join(_noun(rng) for _ in range(rng.randint(2, 12)))


def _long_text(rng: random.Random) -> str:
    start = rng.choice(("Summarize the following text:\n\n", "Translate this:\n", "What do you think of this? ", ""))
    sentences = (
        f"{_noun(rng).capitalize()} {rng.choice(('is', 'has', 'makes', 'likes', 'was near', 'and'))} "
        f"{_noun(rng)} {rng.choice(('in', 'with', 'of', 'after'))} {_noun(rng)}."
        for _ in range(rng.randint(3, 25))
    )
    return start + " ".join(sentences)


def _foreign(rng: random.Random) -> str:
    if rng.random() < 0.7:
        return rng.choice(_FOREIGN)
    low, high = rng.choice(_FOREIGN_SCRIPTS)
    return "".join(chr(rng.randrange(low, high)) for _ in range(rng.randint(2, 12)))


def _maths(rng: random.Random) -> str:
    a, b, c = (rng.randrange(10 ** rng.randint(1, 3)) for _ in range(3))
    d, e = (rng.randrange(1000, 10 ** rng.randint(4, 7)) for _ in range(2))
    if rng.random() < 0.35:
        return sums.ask(rng, *rng.choice(((d, e), (a, d), (d, b))))
    return rng.choice(_MATHS).format(a=a, b=b, c=c, d=d, e=e)


def unknown_question(rng: random.Random) -> tuple[str, str, str]:
    """(question, thought, answer) of something that the model must decline."""
    kind = rng.random()
    if kind < 0.46:
        question = rng.choice(_ABOUT).format(n=_noun(rng), m=_noun(rng))
    elif kind < 0.59:
        question = rng.choice(_REAL)
    elif kind < 0.69:
        question = _salad(rng)
    elif kind < 0.71:
        question = _long_text(rng)
    elif kind < 0.76:
        question = rng.choice(_CODE).format(n=_noun(rng), m=_noun(rng), k=rng.randrange(1000))
    elif kind < 0.88:
        return (_maths(rng), *OTHER_MATHS)
    else:
        return (_foreign(rng), *FOREIGN)
    return (question, *UNKNOWN)
