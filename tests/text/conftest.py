"""Tokenizers made on the spot: a SentencePiece model like ERNIE-4.5's, and the two styles of tokenizer.json."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from fdserve.text.tokenizer import Tokenizer as NativeTokenizer
from fdserve.text.tokenizer import load_tokenizer
from tests.text.grammar_model import Model

TAGS = ["<think>", "</think>", "<response>", "</response>", "<tool_call>", "</tool_call>"]
DIALOGUE = ["<|im_start|>", "<|im_end|>", "<|begin_of_sentence|>", "<|end_of_sentence|>"]
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "hello", "world", "server", "token"]
WORDS += ["你好", "世界", "模型", "été"]


def corpus() -> list[str]:
    rng = random.Random(0)
    return [" ".join(rng.choices(WORDS, k=12)) for _ in range(500)]


@pytest.fixture(scope="session")
def sentencepiece_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory as ERNIE-4.5 checkpoints have it: tokenizer.model and the JSON files beside it."""
    directory = tmp_path_factory.mktemp("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()),
        model_prefix=str(directory / "tokenizer"),
        model_type="bpe",
        vocab_size=400,
        hard_vocab_limit=False,
        byte_fallback=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        control_symbols=["<mask:0>"],
        user_defined_symbols=[*TAGS, *DIALOGUE, "<mask:1>", "<user word>"],
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    size = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model")).get_piece_size()
    added = {
        "<|IMAGE_PLACEHOLDER|>": size,
        "<|LOC_0|>": size + 1,
        "<|LOC_0|>tail": size + 2,
        "plain": size + 5,
    }
    (directory / "added_tokens.json").write_text(json.dumps(added))
    special = {
        "eos_token": "</s>",
        "pad_token": "<unk>",
        "additional_special_tokens": ["<|IMAGE_PLACEHOLDER|>"],
    }
    (directory / "special_tokens_map.json").write_text(json.dumps(special))
    config = {
        "tokenizer_class": "os.system",
        "auto_map": {"AutoTokenizer": ["evil.Evil", None]},
        "cls_token": "<|begin_of_sentence|>",
        "sep_token": {"content": "<|end_of_sentence|>", "lstrip": False},
        "mask_token": "<mask:1>",
        "chat_template": "{{ messages[0].content }}",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "evil.py").write_text("raise SystemExit('remote code ran')\n")
    return directory


@pytest.fixture(scope="session")
def llama_json_dir(tmp_path_factory: pytest.TempPathFactory, sentencepiece_dir: Path) -> Path:
    """The same vocabulary as a tokenizer.json in SentencePiece's manner."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_dir / "tokenizer.model"))
    vocabulary = {model.id_to_piece(i): i for i in range(model.get_piece_size())}
    normal = {
        piece: token_id
        for piece, token_id in vocabulary.items()
        if piece not in {*TAGS, *DIALOGUE, "<mask:0>", "<mask:1>", "<user word>"} and not model.is_byte(token_id)
    }
    merges = [
        (piece[:cut], piece[cut:])
        for piece in sorted(normal, key=lambda piece: -model.get_score(normal[piece]))
        for cut in range(1, len(piece))
        if piece[:cut] in normal and piece[cut:] in normal
    ]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>", *TAGS, *DIALOGUE, "<mask:0>", "<mask:1>"])
    tokenizer.add_tokens([AddedToken("<user word>", normalized=False)])
    directory = tmp_path_factory.mktemp("llama_json")
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "bos_token": "<s>"}))
    return directory


@pytest.fixture(scope="session")
def byte_level_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer.json, which asks for truncation, padding and a bos: none of it may happen."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.add_tokens([AddedToken(tag, normalized=False) for tag in ["<think>", "</think>", "<工具>"]])
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=8)
    directory = tmp_path_factory.mktemp("byte_level")
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<|im_end|>", "add_bos_token": True, "bos_token": "<|endoftext|>"})
    )
    return directory


@pytest.fixture(scope="session")
def ernie(sentencepiece_dir: Path) -> NativeTokenizer:
    return load_tokenizer(sentencepiece_dir)


@pytest.fixture(scope="session", params=["sentencepiece_dir", "llama_json_dir", "byte_level_dir"])
def tokenizer(request: pytest.FixtureRequest) -> NativeTokenizer:
    """Each native tokenizer in turn."""
    return load_tokenizer(request.getfixturevalue(request.param))


@pytest.fixture
def model(ernie: NativeTokenizer) -> Model:
    """One that does not think, with ERNIE's kind of tokenizer."""
    return Model(ernie)
