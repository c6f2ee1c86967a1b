"""Write a checkpoint of random weights in the shape of a published model, to measure with.

    python -m bench.random_checkpoint --shape 0.3B --layout torch --out /tmp/random-0.3b

Weights are bfloat16 (the router's float32), normal with standard deviation 0.02, norms 1, drawn from one pool that
is repeated: their values say nothing, their number and shapes do. Streamed to disk, so that memory stays small
whatever the shape. The bundled demo model's tokenizer and chat template are copied beside them, and its vocabulary is
filled up with made-up words, so that every id the model can sample is text.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import shutil
import string
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from fdserve.models.checkpoint import INDEX, SINGLE
from fdserve.models.config import read_config
from fdserve.models.layout import Expected, Layout, expected_tensors

COMMON: dict[str, Any] = {
    "head_dim": 128,
    "vocab_size": 103424,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "use_bias": False,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "torch_dtype": "bfloat16",
}
DENSE = COMMON | {"architectures": ["Ernie4_5ForCausalLM"], "model_type": "ernie4_5"}
MOE = COMMON | {
    "architectures": ["Ernie4_5_MoeForCausalLM"],
    "model_type": "ernie4_5_moe",
    "moe_layer_end_index": -1,
    "moe_layer_interval": 1,
}


def sizes(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }


def experts(count: int, top_k: int, width: int, shared: int, start: int) -> dict[str, int]:
    return {
        "moe_num_experts": count,
        "moe_k": top_k,
        "moe_intermediate_size": width,
        "moe_num_shared_experts": shared,
        "moe_layer_start_index": start,
    }


SHAPES = {
    "tiny": DENSE | sizes(256, 512, 4, 4, 2),
    "0.3B": DENSE | sizes(1024, 3072, 18, 16, 2),
    "moe-small": MOE | sizes(768, 2304, 8, 6, 2) | experts(32, 4, 384, 2, 1),
    "21B-A3B": MOE | sizes(2560, 12288, 28, 20, 4) | experts(64, 6, 1536, 2, 1),
    "300B-A47B": MOE | sizes(8192, 28672, 54, 64, 8) | experts(64, 8, 3584, 0, 3),
}
LAYOUTS = {"torch": Layout("model.", in_out=False), "paddle": Layout("ernie.", in_out=True)}
SHARD_BYTES = 4 << 30
POOL = (1 << 22) + 129  # odd: tensors of even sizes start all over it
DEMO = Path(__file__).parent.parent / "fdserve" / "demo" / "checkpoint"
TOKENIZER_FILES = (
    "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja",
)  # fmt: skip


class Pool:
    """An endless stream of random bytes of one dtype."""

    def __init__(self, values: npt.NDArray[Any]) -> None:
        self._bytes = memoryview(values.tobytes())
        self._at = 0

    def write(self, file: BinaryIO, count: int) -> None:
        while count:
            piece = self._bytes[self._at : self._at + count]
            file.write(piece)
            count -= len(piece)
            self._at = (self._at + len(piece)) % len(self._bytes)


def is_router(name: str) -> bool:
    return name.endswith((".gate.weight", "e_score_correction_bias"))


def shards(tensors: list[Expected]) -> Iterator[list[Expected]]:
    """The tensors in runs of at most SHARD_BYTES, or one tensor."""
    shard: list[Expected] = []
    left = SHARD_BYTES
    for tensor in tensors:
        left -= byte_count(tensor)
        if shard and left < 0:
            yield shard
            shard, left = [], SHARD_BYTES - byte_count(tensor)
        shard.append(tensor)
    yield shard


def byte_count(tensor: Expected) -> int:
    return math.prod(tensor.shape) * (4 if is_router(tensor.name) else 2)


def write_shard(path: Path, tensors: list[Expected], bfloat16: Pool, float32: Pool) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "np"}}
    offset = 0
    for tensor in tensors:
        end = offset + byte_count(tensor)
        dtype = "F32" if is_router(tensor.name) else "BF16"
        header[tensor.name] = {"dtype": dtype, "shape": tensor.shape, "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in tensors:
            if tensor.name.endswith("norm.weight"):
                file.write(np.full(tensor.shape, 0x3F80, np.uint16).tobytes())  # 1.0
            else:
                (float32 if is_router(tensor.name) else bfloat16).write(file, byte_count(tensor))


def write_checkpoint(shape: str, layout: str, out: Path, seed: int = 0) -> None:
    """The whole directory; existing files of the same names are overwritten."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(SHAPES[shape], indent=2))
    (out / "generation_config.json").write_text(json.dumps({"eos_token_id": 2}))
    random = 0.02 * np.random.default_rng(seed).standard_normal(POOL, np.float32)
    float32 = Pool(random)
    bfloat16 = Pool((random.view(np.uint32) >> 16).astype(np.uint16))
    runs = list(shards(list(expected_tensors(read_config(out), LAYOUTS[layout]))))
    if len(runs) == 1:
        write_shard(out / SINGLE, runs[0], bfloat16, float32)
    else:
        weight_map: dict[str, str] = {}
        for number, tensors in enumerate(runs, 1):
            name = f"model-{number:05}-of-{len(runs):05}.safetensors"
            write_shard(out / name, tensors, bfloat16, float32)
            weight_map |= {tensor.name: name for tensor in tensors}
        (out / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for file in TOKENIZER_FILES:
        if (DEMO / file).is_file():
            shutil.copy(DEMO / file, out)
    fill_vocabulary(out / "tokenizer.model", SHAPES[shape]["vocab_size"])


def fill_vocabulary(path: Path, size: int) -> None:
    """Append made-up words to a SentencePiece model until it has `size` pieces.

    The file is a protocol buffer whose first field is the list of pieces, and such lists go on wherever more of their
    entries follow: sentencepiece_model.proto says that a piece has its text in field 1 and its score in field 2.
    """
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    taken = {processor.id_to_piece(id) for id in range(processor.get_piece_size())}
    words = ("\u2581" + "".join(letters) for letters in itertools.product(string.ascii_lowercase, repeat=4))
    new = itertools.islice((word for word in words if word not in taken), max(size - len(taken), 0))
    entries = []
    for number, word in enumerate(new, len(taken)):
        text = word.encode()
        piece = b"\x0a" + bytes([len(text)]) + text + b"\x15" + struct.pack("<f", -float(number))
        entries.append(b"\x0a" + bytes([len(piece)]) + piece)
    with path.open("ab") as file:
        file.write(b"".join(entries))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench random_checkpoint", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--layout", choices=LAYOUTS, default="torch")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    write_checkpoint(options.shape, options.layout, options.out, options.seed)
    print(options.out)


if __name__ == "__main__":
    main()
