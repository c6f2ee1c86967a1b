"""The bundled checkpoint: its files agree with each other and with what the code around them expects."""

from __future__ import annotations

import itertools
import json
import struct
from typing import Any

import jinja2.sandbox
import pytest

from fdserve.demo import CHECKPOINT
from fdserve.demo.chat import Turn, prompt
from fdserve.demo.data import CONTROL_PIECES, SPECIAL_PIECES, documents
from fdserve.demo.tokens import Encoder


def read_json(name: str) -> Any:
    return json.loads((CHECKPOINT / name).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder((CHECKPOINT / "tokenizer.model").read_bytes())


@pytest.fixture(scope="module")
def header() -> dict[str, Any]:
    with (CHECKPOINT / "model.safetensors").open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        return dict(json.loads(file.read(size)))


def test_the_checkpoint_is_small() -> None:
    assert sum(path.stat().st_size for path in CHECKPOINT.iterdir()) < 10_000_000


def test_the_tensors_are_those_that_the_config_calls_for(header: dict[str, Any]) -> None:
    config = read_json("config.json")
    assert config["model_type"] == "ernie4_5"
    assert config["architectures"] == ["Ernie4_5ForCausalLM"]
    assert config["tie_word_embeddings"] is True
    hidden, inner, width = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    expected = {"model.embed_tokens.weight": [config["vocab_size"], hidden], "model.norm.weight": [hidden]}
    for layer in range(config["num_hidden_layers"]):
        shapes = {
            "input_layernorm": [hidden],
            "post_attention_layernorm": [hidden],
            "self_attn.q_proj": [heads * width, hidden],
            "self_attn.k_proj": [kv_heads * width, hidden],
            "self_attn.v_proj": [kv_heads * width, hidden],
            "self_attn.o_proj": [hidden, heads * width],
            "mlp.gate_proj": [inner, hidden],
            "mlp.up_proj": [inner, hidden],
            "mlp.down_proj": [hidden, inner],
        }
        expected.update({f"model.layers.{layer}.{name}.weight": shape for name, shape in shapes.items()})
    assert header.pop("__metadata__") == {"format": "pt"}
    assert {name: tensor["shape"] for name, tensor in header.items()} == expected
    assert {tensor["dtype"] for tensor in header.values()} == {"BF16"}


def test_the_special_pieces_are_known_by_name(encoder: Encoder) -> None:
    config, generation = read_json("config.json"), read_json("generation_config.json")
    added = {
        value["content"]: (int(key), value["special"])
        for key, value in read_json("tokenizer_config.json")["added_tokens_decoder"].items()
    }
    assert added["<unk>"] == (0, True)
    assert added["<s>"] == (config["bos_token_id"], True)
    assert added["</s>"] == (config["eos_token_id"], True)
    for piece in SPECIAL_PIECES:
        assert 0 < encoder.ids[piece] < config["vocab_size"], piece
        assert encoder.encode(piece) == [encoder.ids[piece]]
        assert added[piece] == (encoder.ids[piece], piece in CONTROL_PIECES)
    assert generation["eos_token_id"] == [encoder.ids["</s>"], encoder.ids["<|im_end|>"]]


def test_the_files_name_the_same_special_tokens() -> None:
    tokenizer, special = read_json("tokenizer_config.json"), read_json("special_tokens_map.json")
    assert {key: tokenizer[key] for key in special} == special
    assert tokenizer["add_bos_token"] is False


def test_digits_and_newlines_are_single_tokens(encoder: Encoder) -> None:
    assert len(encoder.encode("0123456789")) == 10
    assert len(encoder.encode("\n\n")) == 2
    assert encoder.decode(encoder.encode("  two  spaces\n\tand a tab ")) == "  two  spaces\n\tand a tab "


def test_every_training_text_comes_back_from_its_ids(encoder: Encoder) -> None:
    vocab_size = read_json("config.json")["vocab_size"]
    for document in itertools.islice(documents(1), 1500):
        for piece in document:
            ids = encoder.encode(piece.text)
            assert max(ids) < vocab_size
            text = piece.text
            for control in (*CONTROL_PIECES, "</s>"):  # decoding leaves control pieces out
                text = text.replace(control, "")
            assert encoder.decode(ids) == text


TURNS = [Turn("Hello!", "", "Hello to you!"), Turn("2 + 2\n", "", "2 + 2 = 4")]


def render(**context: Any) -> str:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment()
    return environment.from_string((CHECKPOINT / "chat_template.jinja").read_text("utf-8")).render(**context)


def messages(system: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    for turn in TURNS:
        found += [{"role": "user", "content": turn.question}, {"role": "assistant", "content": turn.answer}]
    return [*found, {"role": "user", "content": "What is a <b>block</b>?"}]


@pytest.mark.parametrize("system", ["", "Be <brief> & polite."])
@pytest.mark.parametrize("thinking", [True, False])
def test_the_template_renders_what_the_model_was_trained_on(system: str, thinking: bool) -> None:
    expected = prompt(TURNS, "What is a <b>block</b>?", system, thinking)
    assert render(messages=messages(system), enable_thinking=thinking) == expected


def test_thinking_is_on_by_default_and_ends_the_prompt_open() -> None:
    text = render(messages=messages(""))
    assert text == render(messages=messages(""), enable_thinking=None)
    assert "think_mode=True" in text
    assert text.endswith("<|im_start|>assistant\n<think>\n")
    off = render(messages=messages(""), enable_thinking=False)
    assert "think_mode=False" in off
    assert off.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


def test_no_generation_prompt_where_none_is_asked_for() -> None:
    assert render(messages=messages(""), add_generation_prompt=False).endswith("</b>?<|im_end|>\n\n")


def test_old_thoughts_and_tags_are_left_out_of_the_history() -> None:
    raw = "The user greets me.\n</think>\n\n<response>\nHello to you!\n</response>\n"
    sent = messages("")
    sent[1] = {"role": "assistant", "content": raw}
    assert render(messages=sent) == render(messages=messages(""))


def test_tools_calls_and_results_render_as_the_model_knows_them() -> None:
    schema = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}
    call = '{"name": "get_weather", "arguments": {"city": "Rome"}}'
    turns = [Turn("Weather in Rome?", "", call, is_call=True)]
    result = "<tool_response>\nsunny\n</tool_response>"
    tool_json = json.dumps(schema, sort_keys=True)
    for arguments in ('{"city": "Rome"}', {"city": "Rome"}):
        text = render(
            messages=[
                {"role": "user", "content": "Weather in Rome?"},
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"function": {"name": "get_weather", "arguments": arguments}}],
                },
                {"role": "tool", "content": "sunny"},
            ],
            tools=[schema],
        )
        assert text == prompt(turns, result, tools=(tool_json,))


def test_the_evaluation_kept_its_promise() -> None:
    figures = read_json("EVALUATION.json")
    assert figures["held_out_sums"] >= 500
    assert figures["greedy_thinking"] >= 0.95
    assert figures["greedy_direct"] >= 0.9
