"""Trains the demo checkpoint from scratch on a CPU: `python -m fdserve.demo.train --out DIR`.

Needs torch and transformers (the `train` extra); nothing else in fdserve does. It trains the tokenizer and the model on
the generated texts of data.py, writes a checkpoint in the usual files, then evaluates what it wrote (evaluate.py).
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from transformers import Ernie4_5Config, Ernie4_5ForCausalLM

from fdserve.demo import CHECKPOINT, evaluate
from fdserve.demo.chat import Document
from fdserve.demo.data import EOS, MARKUP_PIECES, documents
from fdserve.demo.tokens import Encoder, train_tokenizer

SEED = 45
VOCAB_SIZE = 1536
ROW = 512  # tokens of a packed training row
LONG_ROW = 2048  # every LONG_EVERY-th step has fewer, longer rows
LONG_EVERY = 16
STEP_TOKENS = 6144
PEAK_RATE = 3e-3
IGNORED = -100  # the label of tokens that are read but not learnt

CONFIG: dict[str, Any] = {
    "architectures": ["Ernie4_5ForCausalLM"],
    "model_type": "ernie4_5",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 192,
    "intermediate_size": 576,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "use_bias": False,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}


def build_model() -> Any:
    fields = {k: v for k, v in CONFIG.items() if k not in ("architectures", "model_type", "torch_dtype", "rope_theta")}
    rope = {"rope_theta": CONFIG["rope_theta"], "rope_type": "default"}
    return Ernie4_5ForCausalLM(Ernie4_5Config(**fields, rope_parameters=rope))


def encode_document(encoder: Encoder, document: Document) -> tuple[list[int], list[int]]:
    """(ids, labels): the labels are the ids where the model is to write them, else IGNORED."""
    ids: list[int] = []
    labels: list[int] = []
    for piece in document:
        part = encoder.encode(piece.text)
        ids.extend(part)
        labels.extend(part if piece.learn else [IGNORED] * len(part))
    return ids, labels


def packed_rows(encoder: Encoder, stream: Iterator[Document], length: int) -> Iterator[tuple[list[int], list[int]]]:
    """Rows of exactly `length`, whole documents one after the other; the last one of a row is cut."""
    while True:
        ids: list[int] = []
        labels: list[int] = []
        while len(ids) < length:
            more_ids, more_labels = encode_document(encoder, next(stream))
            ids.extend(more_ids)
            labels.extend(more_labels)
        yield ids[:length], labels[:length]


def batch(rows: Iterator[tuple[list[int], list[int]]], count: int) -> tuple[Any, Any]:
    chosen = list(itertools.islice(rows, count))
    return torch.tensor([ids for ids, _ in chosen]), torch.tensor([labels for _, labels in chosen])


def rate_factor(step: int, steps: int) -> float:
    """Linear warm-up, then a flat stretch, then a linear way down to zero over the last half."""
    warm = min(1.0, (step + 1) / 60)
    return warm * min(1.0, 2 * (steps - step) / steps)


def optimizers(model: Any) -> list[Any]:
    """Muon for the matrices inside the layers, AdamW for the embedding and the norms."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and ".layers." in n]
    others = [p for n, p in model.named_parameters() if not (p.ndim == 2 and ".layers." in n)]
    muon = torch.optim.Muon(matrices, lr=PEAK_RATE, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(others, lr=PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.0)]


def fit(model: Any, encoder: Encoder, steps: int) -> None:
    short = packed_rows(encoder, documents(SEED), ROW)
    long = packed_rows(encoder, documents(SEED + 1), LONG_ROW)
    tools = optimizers(model)
    model.train()
    start, mean = time.monotonic(), 0.0
    for step in range(steps):
        is_long = step % LONG_EVERY == LONG_EVERY - 1
        ids, labels = batch(long, STEP_TOKENS // LONG_ROW) if is_long else batch(short, STEP_TOKENS // ROW)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for tool in tools:
            for group in tool.param_groups:
                group["lr"] = PEAK_RATE * rate_factor(step, steps)
            tool.step()
            tool.zero_grad(set_to_none=True)
        mean = loss.item() if math.isclose(mean, 0.0) else 0.98 * mean + 0.02 * loss.item()
        if step % 50 == 0 or step == steps - 1:
            speed = (step + 1) * STEP_TOKENS / (time.monotonic() - start)
            print(f"step {step}: loss {mean:.4f}, {speed:.0f} tokens/s", flush=True)


def write_checkpoint(model: Any, tokenizer: bytes, out: Path) -> None:
    """The checkpoint: weights in bf16 under their Hugging Face names, and the files around them."""
    out.mkdir(parents=True, exist_ok=True)
    weights = {
        name: value.detach().to(torch.bfloat16).contiguous()
        for name, value in model.state_dict().items()
        if name != "lm_head.weight"
    }
    (out / "model.safetensors").write_bytes(save(weights, metadata={"format": "pt"}))
    (out / "tokenizer.model").write_bytes(tokenizer)
    encoder = Encoder(tokenizer)
    special = {
        "bos_token": "<s>",
        "eos_token": EOS,
        "unk_token": "<unk>",
        "pad_token": "<unk>",
        "cls_token": "<|begin_of_sentence|>",
        "sep_token": "<|end_of_sentence|>",
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
    }
    names = {"<unk>": 0, "<s>": 1, **encoder.ids}
    added = {
        str(index): {
            "content": name,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": name not in MARKUP_PIECES,
        }
        for name, index in sorted(names.items(), key=lambda item: item[1])
    }
    tokenizer_config = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": False,
        "add_eos_token": False,
        "add_prefix_space": False,
        "legacy": True,
        "clean_up_tokenization_spaces": False,
        "spaces_between_special_tokens": False,
        "model_max_length": CONFIG["max_position_embeddings"],
        **special,
        "added_tokens_decoder": added,
    }
    generation = {
        "bos_token_id": 1,
        "eos_token_id": [encoder.ids[EOS], encoder.ids["<|im_end|>"]],
        "pad_token_id": 0,
        "do_sample": True,
        "temperature": 0.2,
        "top_p": 0.8,
    }
    for name, value in (
        ("config.json", CONFIG),
        ("generation_config.json", generation),
        ("special_tokens_map.json", special),
        ("tokenizer_config.json", tokenizer_config),
    ):
        (out / name).write_text(json.dumps(value, indent=2) + "\n")
    template = (CHECKPOINT / "chat_template.jinja").read_text()  # written by hand, kept there alone
    (out / "chat_template.jinja").write_text(template)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the folder to write the checkpoint to")
    parser.add_argument("--steps", type=int, default=1800, help="training steps")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    args = parser.parse_args()
    torch.manual_seed(SEED)
    torch.set_num_threads(args.threads)
    texts = ("".join(piece.text for piece in d) for d in itertools.islice(documents(SEED + 2), 12000))
    tokenizer = train_tokenizer(texts, VOCAB_SIZE)
    model = build_model()
    print(f"{sum(p.numel() for p in model.parameters())} parameters", flush=True)
    fit(model, Encoder(tokenizer), args.steps)
    write_checkpoint(model, tokenizer, args.out)
    evaluate.report(args.out)


if __name__ == "__main__":
    main()
