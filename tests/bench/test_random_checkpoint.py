from __future__ import annotations

import shutil
from pathlib import Path

from bench.random_checkpoint import DEMO, fill_vocabulary
from fdserve.text.tokenizer import load_tokenizer


def test_a_filled_vocabulary_has_text_for_every_id(tmp_path: Path) -> None:
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(DEMO / name, tmp_path)
    before = load_tokenizer(tmp_path)
    fill_vocabulary(tmp_path / "tokenizer.model", 5000)
    after = load_tokenizer(tmp_path)
    assert after.vocab_size == 5000
    old = range(before.vocab_size)
    assert [after.token_bytes(id) for id in old] == [before.token_bytes(id) for id in old]
    made_up = [after.token_bytes(id) for id in range(before.vocab_size, 5000)]
    assert len(set(made_up)) == len(made_up)
    assert all(text.startswith(b" ") and len(text) == 5 for text in made_up)
    text = "What is chunked prefill?"
    assert after.encode(text) == before.encode(text)


def test_a_vocabulary_that_is_large_enough_stays(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    shutil.copy(DEMO / "tokenizer.model", path)
    fill_vocabulary(path, 100)
    assert path.read_bytes() == (DEMO / "tokenizer.model").read_bytes()
