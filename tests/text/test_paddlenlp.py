"""Run where PaddleNLP is installed: its tokenizers behind the same interface."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fdserve.errors import StartupError
from fdserve.text.detokenizer import decode
from fdserve.text.tokenizer import Tokenizer, load_tokenizer

from .conftest import WORDS

pytest.importorskip("paddlenlp")
from tokenizers import Tokenizer as JsonTokenizer


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory, byte_level_dir: Path) -> Tokenizer:
    """A byte-level vocabulary in the form that only PaddleNLP reads: vocab.json and merges.txt."""
    directory = tmp_path_factory.mktemp("qwen")
    model = JsonTokenizer.from_file(str(byte_level_dir / "tokenizer.json"))
    model.model.save(str(directory))
    size = model.get_vocab_size(with_added_tokens=False)
    added = [("<|endoftext|>", True), ("<|im_start|>", True), ("<|im_end|>", True), ("<think>", False)]
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "chat_template": "{{ messages[0].content }}",
        "added_tokens_decoder": {
            str(size + at): {"content": text, "special": special} for at, (text, special) in enumerate(added)
        },
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer(directory)


class TestByteLevel:
    @settings(max_examples=60, deadline=None)
    @given(text=st.lists(st.sampled_from([*WORDS, " ", "\n", "😀", "<", "qux"]), max_size=20).map("".join))
    def test_round_trip(self, qwen: Tokenizer, text: str) -> None:
        assert decode(qwen, qwen.encode(text)) == text

    def test_tokens_spelled_out_become_their_ids(self, qwen: Tokenizer) -> None:
        think, im_end = qwen.token_id("<think>"), qwen.token_id("<|im_end|>")
        assert qwen.encode("hello<think> world<|im_end|>") == [
            *qwen.encode("hello"),
            think,
            *qwen.encode(" world"),
            im_end,
        ]

    def test_names(self, qwen: Tokenizer) -> None:
        assert qwen.eos_token_id == qwen.token_id("<|im_end|>")
        assert qwen.special_tokens["pad_token"] == "<|endoftext|>"
        assert qwen.special_ids >= {qwen.token_id("<|im_start|>"), qwen.eos_token_id}
        assert qwen.token_id("<think>") not in qwen.special_ids
        assert qwen.chat_template == "{{ messages[0].content }}"
        assert qwen.token_bytes(qwen.vocab_size) == b""

    @pytest.mark.parametrize("alphabet", ["a", " ", "abcdefgh", "<>|=!?", "😀", "世界"])
    def test_a_megabyte_does_not_hang(self, qwen: Tokenizer, alphabet: str) -> None:
        text = "".join(random.Random(0).choices(alphabet, k=1_000_000 // len(alphabet[0].encode())))
        started = time.process_time()
        ids = qwen.encode(text)
        assert time.process_time() - started < 20
        assert decode(qwen, ids) == text


def test_sentencepiece_vocabulary_on_request(tmp_path: Path, sentencepiece_dir: Path, ernie: Tokenizer) -> None:
    (tmp_path / "sentencepiece.bpe.model").write_bytes((sentencepiece_dir / "tokenizer.model").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    tokenizer = load_tokenizer(tmp_path, "paddlenlp")
    text = "hello world 😀\n世界"
    assert decode(tokenizer, tokenizer.encode(text)).strip(" ") == text
    for token_id in range(3, 300):
        assert tokenizer.token_bytes(token_id) == ernie.token_bytes(token_id)
    assert tokenizer.token_id("<|im_start|>") in tokenizer.special_ids
    assert tokenizer.eos_token_id == 2


def test_tokenizer_json_on_request(byte_level_dir: Path, tmp_path: Path) -> None:
    file = json.loads((byte_level_dir / "tokenizer.json").read_text(encoding="utf-8"))
    file["padding"] = file["truncation"] = None  # PaddleNLP would add a padding token of its own
    (tmp_path / "tokenizer.json").write_text(json.dumps(file), encoding="utf-8")
    config = {"tokenizer_class": "PretrainedTokenizerFast", "eos_token": "<|im_end|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer, native = load_tokenizer(tmp_path, "paddlenlp"), load_tokenizer(tmp_path, "native")
    text = "hello 世界 😀<think> the<|im_end|>"
    assert tokenizer.encode(text) == native.encode(text)
    assert tokenizer.special_ids == native.special_ids
    assert decode(tokenizer, tokenizer.encode(text)) == "hello 世界 😀<think> the"


def test_word_pieces(tmp_path: Path) -> None:
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "wor", "##ld", "你", "好"]
    (tmp_path / "vocab.txt").write_text("\n".join(pieces), encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer.encode("Hello world 你好 [SEP]")
    assert ids == [5, 6, 7, 8, 9, 3]
    assert decode(tokenizer, ids) == " hello world 你 好"
    assert tokenizer.special_ids == {0, 1, 2, 3, 4}
    assert tokenizer.special_tokens["sep_token"] == "[SEP]"


@pytest.mark.parametrize("kind", ["NoSuchTokenizer", "Ernie4_5_Tokenizer"])
def test_classes_that_it_does_not_know(tmp_path: Path, kind: str) -> None:
    (tmp_path / "vocab.txt").write_text("a\nb\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
    with pytest.raises(StartupError, match="PaddleNLP cannot read the tokenizer of"):
        load_tokenizer(tmp_path)


def test_no_code_of_the_directory_is_run(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("a\nb\n")
    (tmp_path / "evil.py").write_text("raise SystemExit('remote code ran')\n")
    config = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(StartupError):
        load_tokenizer(tmp_path)
