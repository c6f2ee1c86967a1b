from __future__ import annotations

import json
import threading
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from fdserve.errors import InvalidRequest, StartupError
from fdserve.text.family_templates import FAMILY_TEMPLATES
from fdserve.text.template import ChatTemplate, load_template
from fdserve.text.tokenizer import Tokenizer

from .vocabulary import ListTokenizer

SYSTEM = {"role": "system", "content": "S"}
U1 = {"role": "user", "content": "U1"}
A1 = {"role": "assistant", "content": "A1"}
U2 = {"role": "user", "content": "U2"}
TOOL = {"type": "function", "function": {"name": "weather", "description": "天气 <now>", "parameters": {}}}


def render(source: str, *messages: dict[str, Any], **kwargs: Any) -> str:
    return ChatTemplate(source, {"cls_token": "<cls>", "sep_token": "<sep>"}).render(list(messages), **kwargs)


class TestPlainFamily:
    """Reference: the checkpoints without thinking join role names and texts."""

    plain = ChatTemplate(FAMILY_TEMPLATES["plain"], {})

    @pytest.mark.parametrize(
        ("messages", "expected"),
        [
            ([U1], "User: U1\nAssistant: "),
            ([SYSTEM, U1, A1, U2], "S\nUser: U1\nAssistant: A1<|end_of_sentence|>User: U2\nAssistant: "),
            ([U1, SYSTEM], "User: U1\nS\nAssistant: "),
            (
                [U1, {"role": "tool", "content": "T"}, {"role": "function", "content": "F"}],
                "User: U1\nAssistant: ",
            ),
            ([{"role": "user", "content": " two\n\nlines \n"}], "User:  two\n\nlines \n\nAssistant: "),
            ([{"role": "user", "content": None}], "User: \nAssistant: "),
        ],
    )
    def test_golden(self, messages: list[dict[str, Any]], expected: str) -> None:
        assert self.plain.render(messages) == "<|begin_of_sentence|>" + expected

    def test_without_generation_prompt(self) -> None:
        text = self.plain.render([U1, A1], add_generation_prompt=False)
        assert text == "<|begin_of_sentence|>User: U1\nAssistant: A1<|end_of_sentence|>"

    def test_separators_come_from_the_tokenizer(self) -> None:
        assert render(FAMILY_TEMPLATES["plain"], U1, A1) == "<cls>User: U1\nAssistant: A1<sep>Assistant: "


class TestThinkingFamily:
    """Reference: the thinking checkpoints use im_start/im_end turns and always open a thought."""

    thinking = ChatTemplate(FAMILY_TEMPLATES["thinking"], {})
    settings = "<global_setting>\nthink_mode=True\n</global_setting>"
    opening = "<|im_start|>assistant\n<think>\n"

    def test_without_system(self) -> None:
        expected = f"<|im_start|>system\n{self.settings}<|im_end|>\n\n<|im_start|>user\nU1<|im_end|>\n\n{self.opening}"
        assert self.thinking.render([U1]) == expected
        assert self.thinking.render([U1], add_generation_prompt=False) == expected

    def test_system_and_history(self) -> None:
        assert self.thinking.render([SYSTEM, U1, A1, U2]) == (
            f"<|im_start|>system\n<system_setting>\nS\n</system_setting>\n\n{self.settings}<|im_end|>\n\n"
            "<|im_start|>user\nU1<|im_end|>\n\n"
            "<|im_start|>assistant\n<response>\nA1\n</response>\n<|im_end|>\n\n"
            f"<|im_start|>user\nU2<|im_end|>\n\n{self.opening}"
        )

    @pytest.mark.parametrize("arguments", ['{"city": "北京"}', {"city": "北京"}])
    def test_tools(self, arguments: object) -> None:
        call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": arguments}}
        messages: list[Any] = [
            U1,
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "1", "content": "sunny"},
        ]
        assert self.thinking.render(messages, tools=[TOOL]) == (
            f"<|im_start|>system\n{self.settings}\n\n<tool_list>\n"
            '[{"type": "function", "function": '
            '{"name": "weather", "description": "天气 <now>", "parameters": {}}}]'
            "\n</tool_list><|im_end|>\n\n<|im_start|>user\nU1<|im_end|>\n\n"
            '<|im_start|>assistant\n<tool_call>\n{"name": "weather", "arguments": {"city": "北京"}}\n</tool_call>\n'
            "<|im_end|>\n\n<|im_start|>user\n<tool_response>\nsunny\n</tool_response><|im_end|>\n\n" + self.opening
        )


class TestLanguage:
    """What templates of the field rely on, as Hugging Face's environment has it."""

    def test_blocks_leave_no_blank_lines(self) -> None:
        source = "{% for m in messages %}\n  {% if m.role == 'user' %}\n{{ m.content }}\n  {% endif %}\n{% endfor %}\n"
        assert render(source, U1, A1, U2) == "U1\nU2\n"

    def test_tojson_keeps_text_as_it_is(self) -> None:
        assert render("{{ x | tojson }}", x={"b": "<é世界'&>", "a": 1}) == """{"b": "<é世界'&>", "a": 1}"""
        assert render("{{ x | tojson(indent=2, sort_keys=true) }}", x={"b": 1, "a": [2]}) == json.dumps(
            {"a": [2], "b": 1}, indent=2
        )
        assert render("{{ x | tojson(ensure_ascii=true, separators=(',', ':')) }}", x=["é", 1]) == '["\\u00e9",1]'

    def test_loop_controls(self) -> None:
        source = "{% for i in range(9) %}{% if i == 1 %}{% continue %}{% elif i == 4 %}{% break %}{% endif %}"
        assert render(source + "{{ i }}{% endfor %}") == "023"

    def test_generation_marks_are_transparent(self) -> None:
        source = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %};{% endfor %}"
        assert render(source, U1, A1) == "U1;A1;"

    def test_namespace_macro_filters_and_string_methods(self) -> None:
        source = """
        {%- set ns = namespace(last=-1, parts=[]) -%}
        {%- macro show(m, sep=': ') -%}{{ m.role | upper ~ sep ~ m['content'].strip() }}{%- endmacro -%}
        {%- for m in messages -%}
            {%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}
            {%- set ns.parts = ns.parts + [show(m)] -%}
        {%- endfor -%}
        {{- ns.parts | join('|') }} {{ ns.last }} {{ messages[::-1] | map(attribute='content') | list -}}
        {{- messages | selectattr('role', 'equalto', 'user') | list | length -}}
        {{- 'a</think>b'.split('</think>')[-1] ~ ('%05.1f' % 2.5) ~ '{:>3}'.format(7) ~ 'x' * 3 -}}
        """
        assert render(source, U1, A1, U2) == "USER: U1|ASSISTANT: A1|USER: U2 2 ['U2', 'A1', 'U1']2b002.5  7xxx"

    def test_as_llama_and_qwen_templates_are_written(self) -> None:
        source = """
        {%- set day = strftime_now("%d %b %Y") if strftime_now is defined else none -%}
        {%- macro extra(fields, known) -%}
            {%- if fields is mapping -%}
                {%- for key in fields if key not in known -%}
                    {%- set value = fields[key] -%}
                    {{- '<' ~ key ~ '>' ~ (value | tojson | safe if value is mapping else value | string) -}}
                {%- endfor -%}
            {%- endif -%}
        {%- endmacro -%}
        {%- set ns = namespace(last=messages | length - 1) -%}
        {%- for m in messages[::-1] -%}
            {%- if m.role == 'user' and not (m.content.startswith('<a>') and m.content.endswith('</a>')) -%}
                {%- set ns.last = messages | length - 1 - loop.index0 -%}
            {%- endif -%}
        {%- endfor -%}
        {{- ns.last ~ (tools | tojson(indent=4) | length > 99) -}}
        {%- for name, value in tools[0].function | items -%}
            {{- extra({name: value}, ['name', 'parameters']) -}}
        {%- endfor -%}
        {{- [{'type': 'text', 'text': ' x '}] | selectattr('type', 'equalto', 'text') | map(attribute='text')
            | map('trim') | join('\n') -}}
        {{- 't</think>\n\na'.split('</think>')[-1].lstrip('\n') ~ 't</think>a'.split('</think>')[0].rstrip('\n') -}}
        {%- for key, value in {'b': 1, 'a': none} | dictsort -%}{{- key ~ value -}}{%- endfor -%}
        """
        assert render(source, U1, A1, U2, tools=[TOOL]) == "0True<description>天气 <now>xataNoneb1"

    def test_variables(self) -> None:
        assert render("{{ enable_thinking }} {{ cls_token }} {{ tools is none }}", enable_thinking=False) == (
            "False <cls> True"
        )
        assert render("{{ cls_token }}{{ add_generation_prompt }}", cls_token="own") == "ownTrue"
        assert render("{{ nothing }}{{ nothing is defined }}") == "False"

    def test_strftime_now(self) -> None:
        assert render("{{ strftime_now('%Y') }}") in {str(datetime.now().year), str(datetime.now().year - 1)}

    def test_rendering_leaves_the_messages_alone(self) -> None:
        messages = [dict(U1)]
        ChatTemplate("{% for m in messages %}{% set m = {} %}{% endfor %}", {}).render(messages)
        assert messages == [U1]


class TestErrors:
    def test_raise_exception(self) -> None:
        source = "{{ raise_exception('roles must alternate') }}"
        with pytest.raises(InvalidRequest, match=r"^The chat template failed: roles must alternate$") as caught:
            render(source)
        assert (caught.value.param, caught.value.status) == ("messages", 400)

    def test_long_messages_are_cut(self) -> None:
        with pytest.raises(InvalidRequest) as caught:
            render("{{ raise_exception('x' * 100000) }}")
        assert len(caught.value.message) < 600

    @pytest.mark.parametrize(
        ("source", "message"),
        [
            ("{{ messages[0].content + 1 }}", "TypeError: "),
            ("{{ 1 / 0 }}", "ZeroDivisionError: "),
            ("{{ nothing.here }}", "'nothing' is undefined"),
            ("{{ nothing | tojson }}", "not JSON serializable"),
        ],
    )
    def test_failures_have_one_line_and_no_traceback(self, source: str, message: str) -> None:
        with pytest.raises(InvalidRequest, match=message) as caught:
            render(source, U1)
        assert "Traceback" not in caught.value.message
        assert "\n" not in caught.value.message

    @pytest.mark.parametrize("source", ["{% if %}", "{{ 1 | no_such_filter }}", "{% for %}", "{{ 'x", "{% what %}"])
    def test_source_that_does_not_compile(self, source: str) -> None:
        with pytest.raises(InvalidRequest, match="does not compile: ") as caught:
            ChatTemplate(source, {})
        assert caught.value.param == "chat_template"

    def test_source_too_long(self) -> None:
        with pytest.raises(InvalidRequest, match="longer than 131072 characters"):
            ChatTemplate("x" * 131073, {})


class TestLoadTemplate:
    def test_override(self, ernie: Tokenizer, tmp_path: Path) -> None:
        path = tmp_path / "mine.jinja"
        path.write_text("é{{ eos_token }}", encoding="utf-8")
        assert load_template(ernie, str(path)).render([]) == "é</s>"
        assert load_template(ernie, "inline {{ bos_token }}").render([]) == "inline <s>"

    def test_the_directorys_own(self, ernie: Tokenizer) -> None:
        assert load_template(ernie).render([U1]) == "U1"

    def test_family(self) -> None:
        thinking = ListTokenizer([b"<|im_start|>", b"<think>"])
        assert load_template(thinking).source == FAMILY_TEMPLATES["thinking"]
        assert load_template(ListTokenizer([b"<think>"])).source == FAMILY_TEMPLATES["plain"]

    def test_errors(self, ernie: Tokenizer, tmp_path: Path) -> None:
        with pytest.raises(StartupError, match=r"absent.jinja' cannot be read: No such file or directory\.$"):
            load_template(ernie, str(tmp_path / "absent.jinja"))
        with pytest.raises(StartupError, match="does not compile"):
            load_template(ernie, "{% if %}")


def test_surrogates_that_stand_alone_are_replaced() -> None:
    """The arguments of a call are JSON text inside of the body's: nothing else can have them."""
    odd = {"content": "a\ud800b"}
    assert render("{{ messages[0].content | tojson }}", odd) == '"a\ufffdb"'
    with pytest.raises(InvalidRequest, match="failed: a\ufffdb"):
        render("{{ raise_exception(messages[0].content) }}", odd)


def test_renders_at_once_from_several_threads() -> None:
    template = ChatTemplate("{% for i in range(2000) %}{{ x }}{% endfor %}", {})
    results: list[bool] = []
    threads = [
        threading.Thread(target=lambda x=x: results.append(template.render([], x=x) == str(x) * 2000)) for x in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert results == [True] * 4


ACCUMULATING = """
{%- set ns = namespace(seen=[], text='') -%}
{%- for m in messages -%}{%- set ns.seen = ns.seen + [m] -%}{%- set ns.text = ns.text ~ m.content -%}{%- endfor -%}
{{- ns.text ~ (ns.seen | length) -}}
"""


@pytest.mark.parametrize("source", [*FAMILY_TEMPLATES.values(), ACCUMULATING], ids=[*FAMILY_TEMPLATES, "accumulating"])
def test_a_long_conversation_is_rendered_fast(source: str) -> None:
    messages = [{"role": role, "content": str(i) * 250} for i in range(500) for role in ("user", "assistant")]
    started = time.process_time()
    text = ChatTemplate(source, {}).render(messages)
    assert time.process_time() - started < 1.5
    assert len(text) > 500_000
