from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fdserve.config import Config
from fdserve.errors import StartupError, Unavailable
from fdserve.hub import DEMO
from fdserve.server.server import DEMO_NAME, build
from fdserve.text.tools import ToolFormat

ROOT = Path(__file__).parents[2]


@pytest.mark.anyio
async def test_the_demo() -> None:
    server = await build(Config())
    assert server.model_name == DEMO_NAME
    assert {DEMO_NAME, "default", "null", ""} <= server.model_names
    assert server.reasoning is not None
    assert set(server.eos_token_ids) == set(server.model.eos_token_ids)
    assert server.engine.status == "loading"
    with pytest.raises(Unavailable, match="loading"):
        server.check_ready()


@pytest.mark.anyio
async def test_names_and_parsers() -> None:
    server = await build(Config(model=str(DEMO), reasoning_parser="none", tool_call_parser="none"))
    assert (server.model_name, server.reasoning, server.tools) == ("checkpoint", None, None)
    assert str(DEMO) in server.model_names
    named = await build(Config(model=str(DEMO), served_model_name="mine"))
    assert named.model_name == "mine"
    assert "checkpoint" not in named.model_names
    assert named.tools == ToolFormat("ernie_x1")


@pytest.mark.anyio
async def test_what_stops_the_start(tmp_path: Path) -> None:
    for config, message in (
        (Config(model=str(tmp_path)), "has no config.json"),
        (Config(reasoning_parser="nonsense"), "unknown reasoning parser 'nonsense'"),
        (Config(tool_call_parser="nonsense"), "unknown tool call parser 'nonsense'"),
        (Config(chat_template="{% if %}"), "template"),
        (Config(max_model_len=10**9), "max-model-len"),
    ):
        with pytest.raises(StartupError, match=message) as error:
            await build(config)
        assert "\n" not in str(error.value)


def test_no_paddle_in_the_api_process() -> None:
    code = (
        "import anyio, sys; from fdserve.app import app; from fdserve.config import Config\n"
        "from fdserve.server.server import build; anyio.run(build, Config()); sys.exit('paddle' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, check=True)
