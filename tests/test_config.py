from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

import fdserve
from fdserve.config import Config
from fdserve.config_sources import parse_bytes
from fdserve.errors import StartupError


def test_defaults() -> None:
    assert Config.load(None, {}) == Config.load([], {}) == Config()
    assert (Config().host, Config().port) == ("127.0.0.1", 8188)


def test_flags_win_over_variables_over_the_file_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("port: 1\nmax-num-seqs: 2\nblock_size: 32\nenable_logprob: true\n")
    environ = {"FDSERVE_PORT": "10", "FDSERVE_MAX_NUM_SEQS": "20", "OTHER": "x"}
    config = Config.load(["--config", str(file), "--port", "100"], environ)
    assert (config.port, config.max_num_seqs, config.block_size) == (100, 20, 32)
    assert config.enable_logprob is True
    assert config.max_concurrency == Config().max_concurrency


def test_the_file_may_be_named_by_a_variable_and_the_flag_wins(tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("port: 1")
    second.write_text("port: 2")
    environ = {"FDSERVE_CONFIG": str(first)}
    assert Config.load(None, environ).port == 1
    assert Config.load(["--config", str(second)], environ).port == 2


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--enable-prefix-caching"], True),
        (["--enable-prefix-caching", "false"], False),
        (["--enable-prefix-caching=True"], True),
        (["--no-enable-prefix-caching"], False),
        (["--no-enable-prefix-caching", "--enable-prefix-caching"], True),
    ],
)
def test_booleans_on_the_command_line(argv: list[str], expected: bool) -> None:
    assert Config.load(argv, {}).enable_prefix_caching is expected


@pytest.mark.parametrize(("text", "expected"), [("1", True), ("on", True), ("FALSE", False), ("no", False)])
def test_booleans_in_variables(text: str, expected: bool) -> None:
    assert Config.load(None, {"FDSERVE_ENABLE_LOGPROB": text}).enable_logprob is expected


def test_what_kubernetes_sets_for_services_is_no_setting() -> None:
    address = {"PORT": "tcp://10.0.0.7:80", "SERVICE_HOST": "10.0.0.7", "SERVICE_PORT": "80", "SERVICE_PORT_HTTP": "80"}
    address |= {f"PORT_80_TCP{end}": "x" for end in ("", "_PROTO", "_PORT", "_ADDR")}
    for service in ("FDSERVE_", "FDSERVE_CHAT_"):
        assert Config.load(None, {f"{service}{name}": value for name, value in address.items()}) == Config()


def test_an_empty_variable_is_not_set() -> None:
    assert Config.load(None, {"FDSERVE_PORT": "", "FDSERVE_MODEL": ""}) == Config()


def test_every_setting_has_a_flag_a_variable_a_key_and_help(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        Config.load(["--help"], {})
    assert exit.value.code == 0
    help = capsys.readouterr().out
    samples = {"int": "8", "float": "8", "bool": "true", "str": "8"}
    special = {
        **{
            "device": "cpu",
            "dtype": "float32",
            "quantization": "wint4",
            "kv_cache_dtype": "int8",
            "tokenizer_backend": "native",
            "log_level": "debug",
        },
        **{"max_request_bytes": "4096", "block_size": "16"},
        "otlp_traces_endpoint": "http://127.0.0.1:4318/v1/traces",
        "speculative_config": '{"method": "ngram", "num_speculative_tokens": 4}',
    }
    for field in dataclasses.fields(Config):
        flag = "--" + field.name.replace("_", "-")
        assert f"  {flag} " in help
        text = special.get(field.name, samples[str(field.type)])
        file = tmp_path / "one.yaml"
        file.write_text(f"{field.name}: {text}\n")
        by_flag = Config.load([flag, text], {})
        assert by_flag == Config.load(None, {"FDSERVE_" + field.name.upper(): text})
        assert by_flag == Config.load(["--config", str(file)], {})
        assert type(getattr(by_flag, field.name)).__name__ == field.type


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        Config.load(["--version"], {})
    assert capsys.readouterr().out == f"fdserve {fdserve.__version__}\n"


@pytest.mark.parametrize(
    ("argv", "environ", "message"),
    [
        (["--prot", "1"], {}, "the flag --prot is unknown: did you mean --port?"),
        (["--enable-prefix-cachin"], {}, "did you mean --enable-prefix-caching?"),
        (["-p", "1"], {}, "the flag -p is unknown."),
        (["-port", "1"], {}, "the flag -port is unknown: did you mean --port?"),
        (["--max-model", "5"], {}, "the flag --max-model is unknown"),  # no abbreviations
        (["model"], {}, "'model' belongs to no flag"),
        (["--port 1"], {}, "--port and its value must be two words, or joined by =."),
        (["--port"], {}, "argument --port: expected one argument."),
        (["--port", "http"], {}, "--port is 'http': expected an integer."),
        (["--port", "1.5"], {}, "--port is '1.5': expected an integer."),
        (["--port", "70000"], {}, "port is 70000: it must be at most 65535."),
        (["--step-timeout", "nan"], {}, "step_timeout is nan: it must be at least"),
        (["--dtype", "int4"], {}, "dtype is 'int4': choose one of auto, bfloat16, float32, float16."),
        (["--enable-logprob", "maybe"], {}, "--enable-logprob is 'maybe': expected true or false."),
        (["--kv-cache-memory", "lots"], {}, "kv_cache_memory is 'lots': expected a number of bytes"),
        (["--kv-cache-memory", "9" * 400], {}, "9: expected a number of bytes"),
        (["--kv-cache-memory", "99999999999G"], {}, "kv_cache_memory is '99999999999G': expected a number of bytes"),
        (["--max-request-bytes", "9" * 400], {}, "9: expected a number of bytes"),
        (
            ["--num-gpu-blocks-override", "9" * 400],
            {},
            f"num_gpu_blocks_override is too large: it must be at most {2**63 - 1}.",
        ),
        (["--max-model-len", "9" * 5000], {}, "9: expected an integer."),
        (["--block-size", "40"], {}, "block_size is 40: it must be a multiple of 16."),
        (["--host", ""], {}, "host is empty"),
        (["--api-key", ""], {}, "--api-key is empty: leave it out where none is wanted."),
        (["--model", "a\udcff"], {}, "model is not text in the encoding of the environment."),
        ([], {"FDSERVE_API_KEY": "\udcff"}, "api_key is not text in the encoding of the environment."),
        (["--cluster-secret="], {}, "--cluster-secret is empty: leave it out where none is wanted."),
        (["--speculative-config", "ngram"], {}, "speculative_config is 'ngram': expected a JSON object"),
        (["--speculative-config", "[]"], {}, "speculative_config: Expected `object`, got `array`."),
        (
            ["--speculative-config", '{"method": "eagle", "num_speculative_tokens": 4}'],
            {},
            "speculative_config has the method 'eagle': only ngram is supported.",
        ),
        (
            ["--speculative-config", '{"method": "ngram"}'],
            {},
            "speculative_config: Object missing required field `num_speculative_tokens`.",
        ),
        (
            ["--speculative-config", '{"method": "ngram", "num_speculative_tokens": 4, "model": "x"}'],
            {},
            "speculative_config: Object contains unknown field `model`.",
        ),
        (
            ["--speculative-config", '{"method": "ngram", "num_speculative_tokens": 99}'],
            {},
            "speculative_config: Expected `int` <= 32 - at `$.num_speculative_tokens`.",
        ),
        (
            [
                "--speculative-config",
                '{"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_min": 5, "prompt_lookup_max": 3}',
            ],
            {},
            "speculative_config has a prompt_lookup_min that is more than its prompt_lookup_max.",
        ),
        (["--api-key", "a,,b"], {}, "api_key holds an empty key"),
        (["--config", "/nowhere.yaml"], {}, "/nowhere.yaml cannot be read"),
        ([], {"FDSERVE_PORTS": "1"}, "FDSERVE_PORTS is unknown: did you mean FDSERVE_PORT?"),
        ([], {"FDSERVE_ZZZ": "1"}, "the environment variable FDSERVE_ZZZ is unknown."),
        ([], {"FDSERVE_PORT": "x"}, "FDSERVE_PORT is 'x': expected an integer."),
        ([], {"FDSERVE_PORT": "1", "FDSERVE_port": "2"}, "FDSERVE_port stands for the second time"),
        (
            ["--kv-cache-memory", "1G", "--num-gpu-blocks-override", "5"],
            {},
            "kv_cache_memory and num_gpu_blocks_override both size the KV cache",
        ),
        (
            ["--no-enable-chunked-prefill", "--max-model-len", "4096"],
            {},
            "enable_chunked_prefill is off, so max_num_batched_tokens (512) must be at least max_model_len (4096)",
        ),
    ],
)
def test_bad_settings_stop_the_start(argv: list[str], environ: dict[str, str], message: str) -> None:
    with pytest.raises(StartupError) as error:
        Config.load(argv, environ)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("ports: 1", "the setting ports is unknown: did you mean port?"),
        ("port: [1]", "is [1]: expected an integer."),
        ("port: true", "is True: expected an integer."),
        ("port: 1.5", "is 1.5: expected an integer."),
        ("enable_logprob: 2", "is 2: expected true or false."),
        ("model: {a: b}", "expected text."),
        ("kv_cache_memory: 0.5", "is 0.5: expected a number of bytes such as 4096, 512M or 4G."),
        ("- port", "must hold settings"),
        ("port: [", "is not valid YAML"),
        ("config: other.yaml", "the setting config is unknown"),
        ("speculative_config: {method: ngram, num_speculative_tokens: 2024-01-01}", "speculative_config in"),
        ("speculative_config: {method: ngram, 2024-01-01: 1}", "is not JSON: keys must be str"),
        ("speculative_config: &a {method: *a}", "is not JSON: Circular reference"),
        ("max-num-seqs: 1\nport: 1\nmax_num_seqs: 2", "line 3, the setting max_num_seqs stands for the second time."),
        ("port: 1\n\nport: 1", "line 3, the setting port stands for the second time."),
        ("port:\nport: 1", "line 2, the setting port stands for the second time."),
        ("speculative_config: {method: ngram, method: x}", "line 1, a key stands for the second time."),
        ("port: 2024-13-45", "is not valid YAML: month must be in 1..12."),
        ("port: " + "9" * 5000, "is not valid YAML: Exceeds the limit"),
        ("api_key: [k1, k2]", 'is no text: write it in quotes, several keys as "k1,k2".'),
        ("cluster_secret: [k1]", "is no text: write it in quotes."),
        ("a: b: c", "is not valid YAML: mapping values are not allowed here (line 1, column 5)."),
        ("port: @x", "found character '@' that cannot start any token (line 1, column 7)."),
        ("port: [1", "expected ',' or ']', but got '<stream end>' (line 1, column 9)."),
        ("enable_logprob: !!bool maybe", "is not valid YAML: a value is not what its tag says."),
        ("{port:1}", "port must be followed by a colon and a space."),
        ("[" * 3000, "is not valid YAML: maximum recursion depth exceeded"),
    ],
)
def test_bad_files_stop_the_start(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(content)
    with pytest.raises(StartupError) as error:
        Config.load(["--config", str(file)], {})
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_an_empty_file_says_nothing(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("# port: 1\nport:\n")
    assert Config.load(["--config", str(file)], {}) == Config()


@pytest.mark.parametrize("text", ["0123", "0x1F", "1_000", "12:30:45", "1234", "0b1", "+5", "-5", "0"])
def test_text_in_a_file_that_reads_like_a_number_stays_as_it_is(tmp_path: Path, text: str) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(f"api_key: {text}\n")
    assert Config.load(["--config", str(file)], {}).api_key == text


@pytest.mark.parametrize(
    ("text", "size"), [("1", 1), ("2k", 2048), ("1.5M", 3 << 19), ("4GiB", 4 << 30), ("4 GB", 4 << 30)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes("kv_cache_memory", text) == size
    assert Config(kv_cache_memory=text).kv_cache_bytes == size


def test_the_request_limit_takes_a_unit() -> None:
    assert Config.load(["--max-request-bytes", "2M"], {}).max_request_bytes == 2 << 20


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ({}, (2, 4)),
        ({"prompt_lookup_max": 1}, (1, 1)),
        ({"prompt_lookup_max": 3}, (2, 3)),
        ({"prompt_lookup_min": 6}, (6, 6)),
        ({"prompt_lookup_min": 3, "prompt_lookup_max": 8}, (3, 8)),
    ],
)
def test_one_lookup_length_moves_the_other(lengths: dict[str, int], expected: tuple[int, int]) -> None:
    text = json.dumps({"method": "ngram", "num_speculative_tokens": 4, **lengths})
    speculation = Config(speculative_config=text).speculation
    assert speculation is not None
    assert (speculation.prompt_lookup_min, speculation.prompt_lookup_max) == expected
    assert Config().speculation is None


def test_keys_are_split_and_never_shown() -> None:
    config = Config(api_key="alpha, beta")
    assert config.api_keys == ("alpha", "beta")
    assert "alpha" not in repr(config)
    assert Config().api_keys == ()


@pytest.mark.parametrize("name", ["api_key", "cluster_secret"])
@pytest.mark.parametrize(
    "value",
    [
        " [sk-hidden, sk-other]",
        " {sk-hidden: 1}",
        " {sk-hidden: 1, sk-hidden: 2}",
        " [{sk-hidden: 1, sk-hidden: 2}]",
        " @sk-hidden",
        " *sk-hidden",
        " !sk-hidden x",
        " !sk-hidden!x x",
        " !!int sk-hidden",
        " !!float sk-hidden",
        " !!bool sk-hidden",
        " !!timestamp sk-hidden",
        " sk-hidden: x",
        ' "sk-hidden',
        " 'sk-hidden' 'sk-other'",
        ' "\\q sk-hidden"',
        "sk-hidden\nport: 1",
    ],
)
def test_no_error_of_a_file_shows_a_secret(tmp_path: Path, name: str, value: str) -> None:
    file = tmp_path / "settings.yaml"
    for content in (f"{name}:{value}\n", f"{{{name}:{value}}}\n"):
        file.write_text(content)
        with pytest.raises(StartupError) as error:
            Config.load(["--config", str(file)], {})
        assert "hidden" not in str(error.value)


@pytest.mark.parametrize(
    "argv",
    [
        ["--api-key", "k1", "sk-hidden"],
        ["--api-key=k1", "--", "sk-hidden"],
        ["--cluster-secret", "k1", "-sk-hidden"],
        ["--api-key sk-hidden"],
        ["--api-key:sk-hidden"],
        ["--api-keys=sk-hidden"],
        ["--api-keys", "sk-hidden"],
        ["--api-key", "-sk-hidden"],
        ["--api-key", "sk-hidden,,k2"],
        ["--api-key", "sk-hidden\udcff"],
    ],
)
def test_no_error_of_the_command_line_shows_a_secret(argv: list[str]) -> None:
    with pytest.raises(StartupError) as error:
        Config.load(argv, {})
    assert "hidden" not in str(error.value)
