"""The documents agree with the code, as far as a machine can tell."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import msgspec
import pytest

from fdserve import errors
from fdserve.api import messages_input, responses_input
from fdserve.api.fields import EXTRA_FIELDS
from fdserve.config import Config
from fdserve.engine.stats import EngineStats
from fdserve.errors import ServerError
from fdserve.http.request import BODY_SECONDS
from fdserve.protocol.chat import ChatMessage, ChatRequest, ConversationRequest
from fdserve.protocol.completion import CompletionRequest
from fdserve.protocol.messages import CountTokensRequest, MessagesRequest
from fdserve.protocol.responses import ResponsesRequest
from fdserve.server.metrics import Metrics

ROOT = Path(__file__).parents[1]
PROTOCOL = (ROOT / "docs/protocol.md").read_text()
OPERATIONS = (ROOT / "docs/operations.md").read_text()
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def section(text: str, heading: str) -> str:
    """What stands under a heading, up to the next one of its level or a higher one."""
    _, found, rest = text.partition(f"\n{heading}\n")
    assert found, heading
    level = heading.count("#")
    return re.split(rf"^#{{1,{level}}} ", rest, maxsplit=1, flags=re.MULTILINE)[0]


def first_cells(text: str) -> set[str]:
    """The names in the first column of the text's tables."""
    cells = re.findall(r"^\| (`.*?) \|", text, re.MULTILINE)
    return {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}


REFUSED = first_cells(section(PROTOCOL, "### What is refused"))
BOTH, CHAT, COMPLETIONS, MESSAGES = (
    first_cells(section(PROTOCOL, heading))
    for heading in ("### Both endpoints", "### Chat only", "### Completions only", "### Messages")
)


def row(field: dataclasses.Field[object]) -> str:
    """The row of a setting in the table of operations.md."""
    data = field.metadata
    value = data["metavar"].replace("|", " or ")
    if data["high"] is not None:
        value += f", {data['low']}…{data['high']}"
    elif data["low"] is not None:
        value += f" ≥ {data['low']}"
    default = str(field.default).lower() if field.type == "bool" else str(field.default)
    return f"| `{field.name}` | {value} | {f'`{default}`' if default else 'empty'} | {data['help']} |"


def test_every_setting_has_its_row() -> None:
    rows = [row(field) for field in dataclasses.fields(Config)]
    assert re.findall(r"^\| `.*", section(OPERATIONS, "## Settings"), re.MULTILINE) == rows


def test_the_example_file_is_one(tmp_path: Path) -> None:
    (example,) = re.findall(r"```yaml\n(.*?)```", OPERATIONS, re.DOTALL)
    path = tmp_path / "fdserve.yaml"
    path.write_text(example)
    config = Config.load(None, {"FDSERVE_CONFIG": str(path)})
    assert (config.max_model_len, config.kv_cache_bytes, config.enable_logprob) == (32768, 4 << 30, True)
    assert Config.load(["--config", str(path)], {}) == config


@pytest.mark.parametrize(("request_type", "own"), [(ChatRequest, CHAT), (CompletionRequest, COMPLETIONS)])
def test_every_field_of_a_request_is_documented(request_type: type[msgspec.Struct], own: set[str]) -> None:
    fields = set(request_type.__struct_fields__)
    assert fields >= BOTH
    assert fields >= own
    assert fields <= BOTH | own | REFUSED


def range_in_words(field_type: msgspec.inspect.Type) -> str | None:
    """How the tables say the type and range of a field; None for types that are told in other words."""
    types = field_type.types if isinstance(field_type, msgspec.inspect.UnionType) else (field_type,)
    (kind, *others) = [one for one in types if not isinstance(one, msgspec.inspect.NoneType)]
    if others:
        return None
    if isinstance(kind, msgspec.inspect.BoolType):
        return "boolean"
    if not isinstance(kind, msgspec.inspect.IntType | msgspec.inspect.FloatType):
        return None
    name = "integer" if isinstance(kind, msgspec.inspect.IntType) else "number"
    return f"{name} {number(kind.ge)}…{number(kind.le)}" if kind.le is not None else f"{name} ≥ {number(kind.ge)}"


def number(value: float | None) -> str:
    assert value is not None
    powers: dict[float, str] = {2**63 - 1: "2⁶³-1", 2**31 - 1: "2³¹-1", -(2**31): "-2³¹"}
    return powers.get(value, f"{value:g}")


@pytest.mark.parametrize(
    ("request_type", "heading"), [(ChatRequest, "### Chat only"), (CompletionRequest, "### Completions only")]
)
def test_the_ranges_are_those_of_the_types(request_type: type[msgspec.Struct], heading: str) -> None:
    tables = section(PROTOCOL, "### Both endpoints") + section(PROTOCOL, heading)
    cells = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", tables, re.MULTILINE))
    checked = 0
    for field in msgspec.inspect.type_info(request_type).fields:  # type: ignore[attr-defined]
        words = range_in_words(field.type)
        if words is not None:
            assert cells[field.name].startswith(words), field.name
            checked += 1
    assert checked > 20


def test_nothing_is_documented_that_no_request_has() -> None:
    fields = {*ChatRequest.__struct_fields__, *CompletionRequest.__struct_fields__}
    assert fields == BOTH | CHAT | COMPLETIONS | REFUSED
    assert set(ChatMessage.__struct_fields__) == MESSAGES


@pytest.mark.parametrize(
    ("heading", "request_type"),
    [("## The Responses API", ResponsesRequest), ("## Anthropic's Messages API", MessagesRequest)],
)
def test_the_fields_of_the_other_forms_of_a_chat(heading: str, request_type: type[msgspec.Struct]) -> None:
    before_details = section(PROTOCOL, heading).partition("\n### ")[0]
    documented, fields = first_cells(before_details), set(request_type.__struct_fields__)
    refused = first_cells(section(PROTOCOL, "### In the other forms of a chat"))
    assert fields - set(ConversationRequest.__struct_fields__) - refused <= documented <= fields
    assert set(CountTokensRequest.__struct_fields__) == set(MessagesRequest.__struct_fields__)


def test_the_fields_that_are_refused_in_the_other_forms_of_a_chat() -> None:
    table = section(PROTOCOL, "### In the other forms of a chat")
    rows = re.findall(r"^\| `(\w+)` \| (.*?) ?\| (.*?) ?\|$", table, re.MULTILINE)
    for column, refused in ((1, responses_input.REFUSED), (2, messages_input.REFUSED)):
        documented = {row[0]: row[column].replace("`", "") for row in rows if row[column]}
        assert documented.keys() == refused.keys()
        for name, hint in refused.items():
            assert documented[name] in ("none", hint.removeprefix("Send ").removesuffix("."))


def test_the_extension_fields_are_listed() -> None:
    text = section(PROTOCOL, "### Where extension fields may stand")
    (listed,) = re.findall(r"inside `chat_template_kwargs`:(.*?)\. These", text, re.DOTALL)
    assert set(re.findall(r"`(\w+)`", listed)) == EXTRA_FIELDS


def test_every_error_is_documented() -> None:
    table = section(PROTOCOL, "## Errors")
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, ServerError)]
    for kind in kinds:
        if kind not in (ServerError, errors.NotFound):  # the latter always says what was not found
            assert f"| {kind.status} | `{kind.type}` | `{kind.code}` |" in table
    sources = [path.read_text() for path in (ROOT / "fdserve").rglob("*.py")]
    codes = {code for source in sources for code in re.findall(r'code="(\w+)"', source)}
    assert len(codes) > 4
    for code in codes:
        assert f"| `{code}` |" in table


def test_both_documents_say_how_long_a_body_may_take() -> None:
    assert f"the body did not come within {BODY_SECONDS:g} seconds" in PROTOCOL
    limits = " ".join(section(OPERATIONS, "## Limits and back-pressure").split())
    assert f"body takes more than {BODY_SECONDS:g} seconds gets a 408" in limits


def test_every_metric_has_its_row() -> None:
    text = Metrics(EngineStats).render().decode()
    metrics = re.findall(r"^# HELP (\S+) (.*)\n# TYPE \S+ (\S+)$", text, re.MULTILINE)
    rows = [f"| `{name}` | {kind} | {help} |" for name, help, kind in metrics if not name.endswith("_created")]
    assert len(rows) > 10
    assert re.findall(r"^\| `.*", section(OPERATIONS, "## Metrics"), re.MULTILINE) == rows


def anchors(path: Path) -> set[str]:
    """The names that a document's headings can be linked by."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_paths_lead_somewhere(document: Path) -> None:
    text = document.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = document.parent / path if path else document
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target
    # Files of the repository by name: from its root, or inside the package.
    named = re.findall(r"`((?:[\w.-]+/)+(?:[\w-]+\.(?:py|md|cc|h|cu|toml|json|jinja))?)`", text)
    for name in named:
        assert any((base / name).exists() for base in (ROOT, ROOT / "fdserve")), name
