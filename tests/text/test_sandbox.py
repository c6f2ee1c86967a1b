"""Templates that try to get out, or to keep the server busy."""

from __future__ import annotations

import time
import tracemalloc

import pytest

from fdserve.errors import InvalidRequest
from fdserve.text import template_meter
from fdserve.text.template import ChatTemplate

MEGABYTE = "x" * 1_000_000


@pytest.fixture(autouse=True)
def quick_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small enough to be reached at once; a value may still be as large as ever."""
    monkeypatch.setattr(template_meter, "MAX_TOTAL_BYTES", 64 << 20)
    monkeypatch.setattr(template_meter, "MAX_CPU_SECONDS", 0.3)


def render(source: str) -> str:
    return ChatTemplate(source, {}).render([{"role": "user", "content": "hi"}], big=MEGABYTE)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ raise_exception.__globals__.os }}",
        "{{ raise_exception.__code__.co_code }}",
        "{{ ('' | attr('__class__')).mro() }}",
        "{{ '{0.__class__.__mro__}'.format('') }}",
        "{{ '{x.__class__.__mro__}'.format_map({'x': ''}) }}",
        "{{ [''] | map(attribute='__class__.__mro__') | first }}",
        "{{ self._TemplateReference__context.environment }}",
        "{{ self.__init__.__globals__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='system') }}",
        "{{ messages.clear() }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{% extends '/etc/passwd' %}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ lipsum.__globals__ }}",
    ],
)
def test_escapes_are_refused(source: str) -> None:
    with pytest.raises(InvalidRequest):
        render(source)


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'x' * 10**10 }}",
        "{{ [1] * 10**10 }}",
        "{{ 2 ** (10**9) }}",
        "{{ 10 ** (10**10) }}",
        "{{ 'x' | center(10**10) }}",
        "{{ 'x'.ljust(10**10) }}",
        "{{ '\\t'.expandtabs(10**10) }}",
        "{{ '{:10000000000}'.format(1) }}",
        "{{ '{:{}}'.format(1, 10**10) }}",
        "{{ '%10000000000d' % 1 }}",
        "{{ '%*d' | format(10**10, 1) }}",
        "{{ '%.*f' | format(10**10, 1) }}",
        "{{ ('%s' * 100) % ([big] * 100) }}",
        "{{ big | replace('x', big) }}",
        "{{ big.replace('', big) }}",
        "{{ big | join(big) }}",
        "{{ big.join(big) }}",
        "{{ ('x\\n' * 10000) | indent(1000, blank=true) }}",
        "{{ [1] | tojson(indent=400000000) }}",
        "{{ range(9999) | list | tojson(separators=(big, big)) }}",
        "{{ ('{0:9999}' * 100000).format(1) }}",
        "{{ ('{' ~ ':' * 20000).format(1) }}",
        "{{ ('%099999d' * 100) % 1 }}",
        "{{ strftime_now('%9999Y' * 100000) | length }}",
        "{{ strftime_now('%Y' * 100000) | length }}",
        "{{ (10**300)**100000 }}",
        "{{ 1.5 | round(30000000, 'ceil') }}",
        "{{ 15 | round(-30000000, 'floor') }}",
        "{{ big | list }}",
        "{{ big.split('x') }}",
        "{{ big.rsplit('x') }}",
        "{{ ('x ' * 1000000).split() }}",
        "{{ ('x\\n' * 1000000).splitlines() }}",
        "{{ big | replace('x', [big]) }}",
        "{{ big | replace(new=big, old='x') }}",
        "{{ ('' | e).center(10**10) }}",
        "{{ ([big] * 9) ~ '' }}",
        "{{ [big] * 9 }}",
        "{{ big.translate({120: big}) }}",
        "{{ (1).to_bytes(10**10, 'big') }}",
        "{{ [1] | batch(10**10, 1) | list }}",
        "{{ [1] | slice(10**10) | list }}",
        "{{ 1.5 | round(10**10) }}",
        "{{ [[1]] | sum(start=[]) }}",
        "{{ range(10**10) }}",
        "{{ lipsum(10**9) }}",
        "{% set x = 'xxxxxxxx' %}" + "{% set x = x ~ x %}" * 60,
        "{% set x = 'xxxxxxxx' %}" + "{% set x = x + x %}" * 60,
        "{% set x %}xxxxxxxx{% endset %}" + "{% set x %}{{ x }}{{ x }}{% endset %}" * 60,
        "{% set ns = namespace(x=7) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
        "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
        "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% set ns = namespace(x=1) %}{% for i in range(99) %}{% set ns.x = {1: ns.x, 2: ns.x} %}{% endfor %}",
        "{% set ns = namespace(x={}) %}{% for i in range(99) %}"
        "{% set ns.x = dict(a=ns.x.values(), b=ns.x.items()) %}{% endfor %}{{ ns.x }}",
        "{% set x, y = [1], [1] %}" + "{% set x, y = (x, x), (y, y) %}" * 60 + "{{ x == y }}",
        "{{ ([[[1]]] * 9999) | tojson(indent=100000) }}",
        "{{ " + " ~ ".join(["big"] * 999) + " }}",
        "{{ [" + ", ".join(["big[1:]"] * 999) + "] }}",
    ],
)
def test_values_cannot_grow_without_bound(source: str) -> None:
    started = time.process_time()
    with pytest.raises(InvalidRequest):
        render(source)
    assert time.process_time() - started < 5


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
        "{% for i in range(100000) if big[::-1] == i %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(100) }}",
        "{% macro f(n) %}{{ caller() }}{{ caller() }}{% endmacro %}{% macro g(n) %}{% if n %}"
        "{% call f(n) %}{{ g(n - 1) }}{% endcall %}{% endif %}{% endmacro %}{{ g(60) }}",
        "{{ (big * 8) | trim(big) }}",
        "{{ (big * 8).rfind('y' ~ big) }}",
        "{{ dict(range(0, 10**5 * (2**61 - 1), 2**61 - 1) | batch(2) | list) }}",
        "{{ dict([[1, 2]]) }}",
        "{{ range(100000) | sort(attribute='a,' * 9999) }}",
        "{{ range(100000) | max(attribute='a.' * 9999) }}",
        "{% for x in [1] recursive %}{{ loop([1, 1]) }}{{ loop([1, 1]) }}{% endfor %}",
        "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}",
        "{{ range(100000) | map('string') | reject('in', big) | list }}",
        "{{ big | map('upper') | join(big) }}",
        "{% for i in range(100000) %}{% if big + 'y' in big %}{% endif %}{% endfor %}",
        "{% for i in range(100000) %}{% for j in range(100000) %}" + "x" * 9999 + "{% endfor %}{% endfor %}",
        "{% for i in range(100000) %}{% for j in range(100000) %}{{ '" + "x" * 9999 + "' }}{% endfor %}{% endfor %}",
    ],
)
def test_work_is_bounded(source: str) -> None:
    started = time.process_time()
    with pytest.raises(InvalidRequest):
        render(source)
    assert time.process_time() - started < 5


@pytest.mark.parametrize(
    "source",
    [
        "{{ " + "(" * 9999 + "1" + ")" * 9999 + " }}",
        "{{ " + "not " * 9999 + "1 }}",
        "{{ " + " + ".join(["1"] * 9999) + " }}",
        "{{ " + "[" * 9999 + "]" * 9999 + " }}",
        "{% for i in [1] %}" * 50 + "{% endfor %}" * 50,
        "{% if 1 %}" * 5000 + "{% endif %}" * 5000,
    ],
)
def test_deep_nesting_does_not_compile(source: str) -> None:
    started = time.process_time()
    with pytest.raises(InvalidRequest, match="does not compile") as caught:
        ChatTemplate(source, {})
    assert caught.value.param == "chat_template"
    assert time.process_time() - started < 5


@pytest.mark.parametrize("source", ["{{x}}" * 26_000, "{{ [" + "1," * 60_000 + "] }}", "{% set x = 1 %}" * 8_000])
def test_compiling_is_bounded(source: str) -> None:
    started = time.process_time()
    with pytest.raises(InvalidRequest, match="takes too long"):
        ChatTemplate(source, {})
    assert time.process_time() - started < 2


def test_what_python_compiles_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_meter, "MAX_CPU_SECONDS", 60)
    with pytest.raises(InvalidRequest, match="too many statements"):
        ChatTemplate("{{x}}" * 10_000, {})


def test_constants_are_not_worked_out_unmetered_while_compiling() -> None:
    for source in ("{{ 'x' | join(10**10 * 'x') }}", "{{ 'x' * 10**10 }}", "{{ 'x' | indent(10**10, true) }}"):
        started = time.process_time()
        template = ChatTemplate(source, {})
        assert time.process_time() - started < 1
        with pytest.raises(InvalidRequest, match="too large a value"):
            template.render([])


@pytest.mark.parametrize(
    "source",
    [
        "{{ [1] | tojson(indent=400000000) }}",
        "{{ ('{0:9999}' * 100000).format(1) }}",
        "{{ strftime_now('%9999Y' * 100000) | length }}",
        "{{ range(9999) | list | tojson(separators=(big, big)) }}",
        "{{ (big * 8).split('x') }}",
        "{{ [big * 6, '\U000e0001'] }}",
    ],
)
def test_one_operation_does_not_take_much_memory(source: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(InvalidRequest):
            render(source)
        assert tracemalloc.get_traced_memory()[1] < 2 * template_meter.MAX_VALUE_BYTES
    finally:
        tracemalloc.stop()


def test_memory_stays_bounded() -> None:
    source = "{% set ns = namespace(l=[]) %}{% for i in range(200) %}{% set ns.l = ns.l + [big[1:]] %}{% endfor %}"
    tracemalloc.start()
    try:
        with pytest.raises(InvalidRequest, match="too much text"):
            render(source)
        assert tracemalloc.get_traced_memory()[1] < template_meter.MAX_TOTAL_BYTES * 1.2
    finally:
        tracemalloc.stop()


def test_namespaces_print_without_their_attributes() -> None:
    assert render("{% set ns = namespace(a=1) %}{% set ns.b = [ns, ns] %}{{ ns }}{{ ns.b }}") == (
        "<namespace>[<namespace>, <namespace>]"
    )


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ 'a<b' | e }}|{{ 'a<b' | safe }}|{{ 'x' | indent(2, first=true) }}", "a&lt;b|a<b|  x"),
        ("{{ '%s: %5.1f' % ('a', 2.25) }}{{ '{x:>4}|{}'.format('{', x=7) }}", "a:   2.2   7|{"),
        ("{{ dict(messages[0], role='system').role }}{{ dict(a=1) | length }}", "system1"),
        ("{{ (big * 4 ~ '</think>\\n\\nx').split('</think>')[-1].lstrip('\\n') }}", "x"),
        ("{{ [big * 3, 'x'] | join('\\n') | length }}{{ messages | map(attribute='content') | join }}", "3000002hi"),
        ("{{ 'ID 123456: %s' % 1700000000 }}", "ID 123456: 1700000000"),
        (
            "{{ 'at ' ~ 1700000000 ~ none ~ [1] ~ nothing }}{{ '{}'.format(10**12) }}",
            "at 1700000000None[1]1000000000000",
        ),
        ("{{ '**%s** %d%%' | format('a', 5) }}", "**a** 5%"),
        ("{{ '{{{}}} 123456 {:>4}'.format('a', 5) }}", "{a} 123456    5"),
        ("{{ big.replace('x', '') ~ big.count('x') }}", "1000000"),
        (
            "{{ (big | length, big[:3], 7 % 4, 2 ** 10, [1] + [2], 3 * 4) }}",
            "(1000000, 'xxx', 3, 1024, [1, 2], 12)",
        ),
        ("{{ big.split('y') | length }}{{ [1, 2] | sum }}{{ 2.345 | round(2) }}", "132.35"),
        ("{{ [3, 1, 2] | sort | map('string') | join(', ') }}", "1, 2, 3"),
        ("{{ {'b': 1, 'a': 2} | dictsort }}", "[('a', 2), ('b', 1)]"),
        ("{% filter upper %}a{{ 'b' }}{% endfilter %}{% set x | trim %} c {% endset %}{{ x }}", "ABc"),
        ("{% for a, b in [(1, 2)] %}{{ a ~ b }}{% else %}none{% endfor %}", "12"),
        (
            "{% for x in [1, 2, 3] if x != 2 %}{{ loop.index ~ loop.last ~ x }} {% endfor %}",
            "1False1 2True3 ",
        ),
    ],
)
def test_ordinary_work_is_not_disturbed(source: str, expected: str) -> None:
    assert render(source) == expected
