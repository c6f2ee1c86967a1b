from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from fdserve.errors import InvalidRequest, StartupError
from fdserve.text import length, sentencepiece_tokenizer
from fdserve.text.splitter import TokenSplitter
from fdserve.text.tokenizer import Tokenizer, load_tokenizer

from .conftest import TAGS, WORDS


def joined(tokenizer: Tokenizer, ids: list[int]) -> bytes:
    return b"".join(map(tokenizer.token_bytes, ids))


# U+2581 is how SentencePiece writes a space: it is one of the few characters that cannot come back.
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=40)
WORDY = st.lists(st.sampled_from([*WORDS, " ", "  ", "\n", "😀", "<", "qux"]), max_size=20).map("".join)


class TestEveryTokenizer:
    @pytest.mark.parametrize(
        "text",
        [
            "hello world",
            "  two  spaces ",
            "\n\tx\n",
            "你好。世界",
            "😀 é ü",
            "a\x00b",
            "",
            " ",
            "<0x0A>",
            "ﬁ①Ａ",
        ],
    )
    def test_bytes_of_the_ids_are_the_text(self, tokenizer: Tokenizer, text: str) -> None:
        assert joined(tokenizer, tokenizer.encode(text)) == text.encode()

    def test_long_texts_have_the_same_ids_up_to_a_number(
        self, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        text = "hello <think>world 你好" * 5
        ids = tokenizer.encode(text)
        monkeypatch.setattr(sentencepiece_tokenizer, "LONG_PART", 0)
        monkeypatch.setattr(length, "MAX_TOKENS", len(ids))
        assert tokenizer.encode(text) == ids
        assert all(type(token_id) is int for token_id in tokenizer.encode(text))
        monkeypatch.setattr(length, "MAX_TOKENS", len(ids) - 1)
        with pytest.raises(InvalidRequest, match=f"There are {len(ids)} tokens"):
            tokenizer.encode(text)

    @settings(max_examples=60, deadline=None)
    @given(text=TEXTS | WORDY)
    def test_round_trip(self, tokenizer: Tokenizer, text: str) -> None:
        assert joined(tokenizer, tokenizer.encode(text)) == text.encode()

    def test_adds_no_bos_no_eos_no_padding_and_cuts_nothing(self, tokenizer: Tokenizer) -> None:
        ids = tokenizer.encode("hello world " * 20)
        assert len(ids) >= 40
        assert tokenizer.special_ids.isdisjoint(ids)
        assert len(tokenizer.encode("hello")) < 8

    def test_tokens_spelled_out_become_their_ids(self, tokenizer: Tokenizer) -> None:
        think, im_end = tokenizer.token_id("<think>"), tokenizer.token_id("<|im_end|>")
        ids = tokenizer.encode("hello<think> world<|im_end|><think>")
        assert ids == [*tokenizer.encode("hello"), think, *tokenizer.encode(" world"), im_end, think]

    def test_control_tokens_are_special_and_tags_are_text(self, tokenizer: Tokenizer) -> None:
        special = tokenizer.special_ids
        assert {tokenizer.token_id("<|im_start|>"), tokenizer.token_id("<|im_end|>")} <= special
        assert tokenizer.eos_token_id in special
        assert special.isdisjoint({tokenizer.token_id(tag) for tag in TAGS})
        assert tokenizer.token_bytes(tokenizer.token_id("<|im_end|>") or -1) == b"<|im_end|>"

    def test_ids_outside_the_vocabulary_are_empty(self, tokenizer: Tokenizer) -> None:
        for token_id in (-1, tokenizer.vocab_size, 10**9):
            assert tokenizer.token_bytes(token_id) == b""
        assert all(isinstance(tokenizer.token_bytes(i), bytes) for i in range(tokenizer.vocab_size))
        assert tokenizer.token_id("no such token") is None

    def test_lone_surrogates_become_replacement_characters(self, tokenizer: Tokenizer) -> None:
        ids = tokenizer.encode("a\ud800b\ud83d\ude00")
        assert joined(tokenizer, ids).decode() == "a\ufffdb😀"

    @pytest.mark.parametrize("unit", ["hello world ", "a", " ", "\n", "<", "<think>", "😀", "你好"])
    def test_a_long_text_takes_linear_time(self, tokenizer: Tokenizer, unit: str) -> None:
        text = unit * (300_000 // len(unit.encode()))
        started = time.process_time()
        ids = tokenizer.encode(text)
        # Native code does it in under a second; anything quadratic would take many minutes.
        assert time.process_time() - started < 5
        assert joined(tokenizer, ids) == text.encode()


class TestSentencePiece:
    def test_same_ids_as_sentencepiece(self, sentencepiece_dir: Path, ernie: Tokenizer) -> None:
        model = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_dir / "tokenizer.model"))
        text = "the quick 你好 <user word> fox\n"
        assert ernie.encode(text) == model.encode(text)
        assert ernie.token_id("<0x0A>") in ernie.encode(text)

    def test_ids_and_names(self, ernie: Tokenizer) -> None:
        assert [ernie.token_id(token) for token in ("<unk>", "<s>", "</s>")] == [0, 1, 2]
        assert ernie.eos_token_id == 2
        assert ernie.special_tokens == {
            "unk_token": "<unk>",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "pad_token": "<unk>",
            "cls_token": "<|begin_of_sentence|>",
            "sep_token": "<|end_of_sentence|>",
            "mask_token": "<mask:1>",
        }
        assert ernie.chat_template == "{{ messages[0].content }}"

    def test_special_ids(self, ernie: Tokenizer) -> None:
        special = {"<unk>", "<s>", "</s>", "<mask:0>", "<mask:1>", "<|IMAGE_PLACEHOLDER|>"}
        special |= {"<|im_start|>", "<|im_end|>", "<|begin_of_sentence|>", "<|end_of_sentence|>"}
        assert ernie.special_ids == {ernie.token_id(token) for token in special}

    def test_added_tokens_are_found_first_and_longest(self, ernie: Tokenizer) -> None:
        image, loc, tail, plain = (
            ernie.token_id(token) for token in ("<|IMAGE_PLACEHOLDER|>", "<|LOC_0|>", "<|LOC_0|>tail", "plain")
        )
        ids = ernie.encode("<|LOC_0|>tail<|LOC_0|>ta<|IMAGE_PLACEHOLDER|>plain </s>")
        assert ids == [tail, loc, *ernie.encode("ta"), image, plain, *ernie.encode(" "), 2]
        assert joined(ernie, ids) == b"<|LOC_0|>tail<|LOC_0|>ta<|IMAGE_PLACEHOLDER|>plain </s>"

    def test_gaps_between_added_ids_are_empty(self, ernie: Tokenizer) -> None:
        plain = ernie.token_id("plain")
        assert plain == ernie.vocab_size - 1
        assert ernie.token_bytes(plain - 1) == b""

    def test_a_dummy_prefix_stays_as_the_model_has_it(self, tmp_path: Path) -> None:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["hello world"] * 9),
            model_prefix=str(tmp_path / "spm"),
            model_type="bpe",
            vocab_size=30,
            hard_vocab_limit=False,
            minloglevel=2,
        )
        tokenizer = load_tokenizer(tmp_path)
        assert joined(tokenizer, tokenizer.encode("hello")) == b" hello"

    def test_no_code_of_the_directory_is_run(self, sentencepiece_dir: Path) -> None:
        load_tokenizer(sentencepiece_dir, "native")
        assert "evil" not in sys.modules


class TestJson:
    def test_agrees_with_sentencepiece(self, llama_json_dir: Path, ernie: Tokenizer) -> None:
        tokenizer = load_tokenizer(llama_json_dir)

        @settings(max_examples=200, deadline=None)
        @given(text=WORDY)
        def agree(text: str) -> None:
            assert tokenizer.encode(text) == ernie.encode(text)

        agree()

    def test_added_tokens_outside_the_byte_alphabet_are_their_text(self, byte_level_dir: Path) -> None:
        tokenizer = load_tokenizer(byte_level_dir)
        (token_id,) = tokenizer.encode("<工具>")
        assert tokenizer.token_bytes(token_id) == "<工具>".encode()
        assert token_id not in tokenizer.special_ids

    def test_user_words_are_not_special(self, llama_json_dir: Path) -> None:
        tokenizer = load_tokenizer(llama_json_dir)
        assert tokenizer.token_id("<user word>") not in tokenizer.special_ids
        assert tokenizer.token_id("<s>") in tokenizer.special_ids

    def test_metaspace_decoder(self, llama_json_dir: Path, tmp_path: Path) -> None:
        file = json.loads((llama_json_dir / "tokenizer.json").read_text())
        file["decoder"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": False}
        (tmp_path / "tokenizer.json").write_text(json.dumps(file))
        tokenizer = load_tokenizer(tmp_path)
        assert joined(tokenizer, tokenizer.encode("hello 😀")) == "hello 😀".encode()
        assert tokenizer.eos_token_id is None
        assert tokenizer.special_tokens == {}

    @pytest.mark.parametrize("decoder", [None, {"type": "WordPiece", "prefix": "##", "cleanup": True}])
    def test_other_decoders_are_refused(self, llama_json_dir: Path, tmp_path: Path, decoder: object) -> None:
        file = json.loads((llama_json_dir / "tokenizer.json").read_text())
        file["decoder"] = decoder
        (tmp_path / "tokenizer.json").write_text(json.dumps(file))
        with pytest.raises(StartupError, match=r"decoder (none|WordPiece)"):
            load_tokenizer(tmp_path)


class TestLoading:
    def test_tokenizer_json_goes_first(self, sentencepiece_dir: Path, byte_level_dir: Path, tmp_path: Path) -> None:
        (tmp_path / "tokenizer.model").write_bytes((sentencepiece_dir / "tokenizer.model").read_bytes())
        assert load_tokenizer(tmp_path).token_id("<response>") is not None
        (tmp_path / "tokenizer.json").write_bytes((byte_level_dir / "tokenizer.json").read_bytes())
        assert load_tokenizer(tmp_path).token_id("<response>") is None

    @pytest.mark.parametrize("name", ["spm.model", "ernie_token_100k.model"])
    def test_other_names_of_the_model(self, sentencepiece_dir: Path, tmp_path: Path, name: str) -> None:
        (tmp_path / name).write_bytes((sentencepiece_dir / "tokenizer.model").read_bytes())
        assert load_tokenizer(tmp_path).eos_token_id == 2

    @pytest.mark.parametrize(("name", "content"), [("tokenizer.json", b"{"), ("tokenizer.model", b"nonsense")])
    def test_broken_file(self, tmp_path: Path, name: str, content: bytes) -> None:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(StartupError, match=f"cannot read .*{name}"):
            load_tokenizer(tmp_path)

    def test_nothing_there(self, tmp_path: Path) -> None:
        with pytest.raises(StartupError, match=r"no tokenizer in .*expected one of tokenizer\.json"):
            load_tokenizer(tmp_path)
        with pytest.raises(StartupError, match="no such tokenizer directory"):
            load_tokenizer(tmp_path / "absent")
        with pytest.raises(StartupError, match="unknown tokenizer backend 'fast'"):
            load_tokenizer(tmp_path, "fast")

    def test_native_does_not_fall_back_to_paddlenlp(self, tmp_path: Path) -> None:
        (tmp_path / "vocab.txt").write_text("a\nb\n")
        with pytest.raises(StartupError, match="no tokenizer in"):
            load_tokenizer(tmp_path, "native")

    @pytest.mark.parametrize("backend", ["auto", "paddlenlp"])
    def test_paddlenlp_missing(self, tmp_path: Path, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "vocab.txt").write_text("a\nb\n")
        monkeypatch.setitem(sys.modules, "paddlenlp", None)
        monkeypatch.setitem(sys.modules, "paddlenlp.transformers", None)
        with pytest.raises(StartupError, match=r"pip install 'fdserve\[paddlenlp\]'"):
            load_tokenizer(tmp_path, backend)


class TestTokenSplitter:
    @given(
        text=st.text("<>ab|", max_size=30),
        tokens=st.lists(st.text("<>ab", min_size=1, max_size=4), max_size=5),
    )
    def test_parts_make_up_the_text(self, text: str, tokens: list[str]) -> None:
        parts = list(TokenSplitter(tokens).split(text))
        assert "".join(part for part, _ in parts) == text
        for part, is_token in parts:
            assert part
            assert (part in tokens) if is_token else not any(token in part for token in tokens)

    def test_characters_with_a_meaning_in_patterns(self) -> None:
        splitter = TokenSplitter(["]", "^", "-x", "\\"])
        assert list(splitter.split("a]^-x\\-")) == [
            ("a", False),
            ("]", True),
            ("^", True),
            ("-x", True),
            ("\\", True),
            ("-", False),
        ]

    def test_thousands_of_tokens_in_a_text_full_of_beginnings(self) -> None:
        splitter = TokenSplitter([f"<|LOC_{i}|>" for i in range(3000)])
        started = time.process_time()
        parts = list(splitter.split("<|LOC_" * 150_000 + "<|LOC_2999|>"))
        assert parts[-1] == ("<|LOC_2999|>", True)
        assert time.process_time() - started < 5
