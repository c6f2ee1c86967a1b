"""Make the golden models and numbers beside this file with Hugging Face transformers.

    python tests/golden/make_golden.py

needs torch and transformers 5.23 (`pip install fdserve[train]`); nothing else in the tests does. For `dense` and
`moe` it writes a checkpoint of random bfloat16 weights, as transformers saves it, and an .npz with what
transformers computes from it:

- prompts [sum] and prompt_starts [P + 1]: the prompts' token ids;
- float32 and bfloat16 [sum, vocab]: the logits at every prompt token, computed in that dtype;
- greedy [P, 40] and greedy_logprobs [P, 40]: the greedy continuations in float32 and their log-probabilities.

rope.npz holds the cosines and sines of the published models' RoPE at a few positions.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import (
    Ernie4_5_MoeConfig,
    Ernie4_5_MoeForCausalLM,
    Ernie4_5Config,
    Ernie4_5ForCausalLM,
    PreTrainedModel,
)
from transformers.models.ernie4_5.modeling_ernie4_5 import Ernie4_5RotaryEmbedding

HERE = Path(__file__).parent
PROMPT_LENGTHS = (1, 7, 19, 70)
CONTINUATION = 40
SMALLEST_MARGIN = 1e-3  # between the two best logits: rounding in float32 must not decide a greedy token

SHAPE = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 384,
    "max_position_embeddings": 1024,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "dtype": torch.bfloat16,
}
MODELS = {
    # Heads are wider than hidden_size / num_attention_heads, as in the 0.3B model.
    "dense": (Ernie4_5ForCausalLM, Ernie4_5Config(head_dim=32, **SHAPE)),
    "moe": (
        Ernie4_5_MoeForCausalLM,
        Ernie4_5_MoeConfig(
            moe_num_experts=8,
            moe_k=3,
            moe_intermediate_size=24,
            moe_num_shared_experts=2,
            moe_layer_start_index=1,
            **SHAPE,
        ),
    ),
}


def randomise(model: PreTrainedModel) -> None:
    """Weights with which every part of the model decides over the answer, unlike those of a fresh model."""
    generator = torch.Generator().manual_seed(20)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if name.endswith("norm.weight"):
            values = 1 + 0.2 * noise
        elif "e_score_correction_bias" in name:
            values = 0.05 * noise
        elif "embed_tokens" in name:
            values = 0.3 * noise
        else:
            values = 1.5 * noise / weight.shape[-1] ** 0.5
        # The published models keep the router in float32 and all else in bfloat16.
        weight.data = values if ".gate." in name else values.to(torch.bfloat16)


def logits(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids]), use_cache=False).logits[0].float()


def continuation(model: PreTrainedModel, prompt: list[int]) -> tuple[list[int], list[float]]:
    ids, logprobs = list(prompt), []
    for _ in range(CONTINUATION):
        last = logits(model, ids)[-1]
        best, second = last.topk(2).values
        if best - second < SMALLEST_MARGIN:
            raise SystemExit(f"a greedy token leads by only {best - second:.1e}: choose another seed")
        token = int(last.argmax())
        logprobs.append(float(last.log_softmax(-1)[token]))
        ids.append(token)
    return ids[len(prompt) :], logprobs


def make(name: str) -> None:
    model_class, config = MODELS[name]
    config._attn_implementation = "eager"
    model = model_class(config).eval()
    randomise(model)
    model.save_pretrained(HERE / name)
    (HERE / name / "model.safetensors").chmod(0o644)
    in_bf16 = model_class.from_pretrained(HERE / name, attn_implementation="eager").eval()
    in_fp32 = model_class.from_pretrained(HERE / name, dtype=torch.float32, attn_implementation="eager").eval()

    generator = np.random.default_rng(0)
    prompts = [generator.integers(3, SHAPE["vocab_size"], size).tolist() for size in PROMPT_LENGTHS]
    continuations = [continuation(in_fp32, prompt) for prompt in prompts]
    np.savez_compressed(
        HERE / f"{name}.npz",
        prompts=np.concatenate(prompts).astype(np.int32),
        prompt_starts=np.cumsum([0, *PROMPT_LENGTHS]).astype(np.int32),
        float32=torch.cat([logits(in_fp32, prompt) for prompt in prompts]).numpy(),
        bfloat16=torch.cat([logits(in_bf16, prompt) for prompt in prompts]).numpy(),
        greedy=np.array([ids for ids, _ in continuations], np.int32),
        greedy_logprobs=np.array([logprobs for _, logprobs in continuations], np.float32),
    )


def make_rope() -> None:
    config = Ernie4_5Config()
    positions = np.array([0, 1, 2, 63, 1000, 4097, 65535, 131071], np.int32)
    cos, sin = Ernie4_5RotaryEmbedding(config)(torch.zeros(1), torch.from_numpy(positions)[None])
    half = config.head_dim // 2
    np.savez_compressed(
        HERE / "rope.npz",
        positions=positions,
        theta=config.rope_parameters["rope_theta"],
        cos=cos[0, :, :half].numpy(),
        sin=sin[0, :, :half].numpy(),
    )


if __name__ == "__main__":
    torch.set_num_threads(2)
    make_rope()
    for model_name in MODELS:
        make(model_name)
