"""Jinja2 for templates that nobody has vouched for: sandboxed, and bounded in time and memory.

Jinja2's immutable sandbox keeps a template away from Python's internals, but lets it loop for ever or double
a string until memory is gone. Here every operation that makes a value or takes more than constant time goes
through the `Meter` of the render in progress: calls, filters, tests and operators by the sandbox's own hooks,
the rest (loops, macros, literals, `~`, slices, comparisons, output) by a rewrite of the syntax tree. So no
value grows past MAX_VALUE_BYTES, all of them together stay below MAX_TOTAL_BYTES, and no single operation
is long: the CPU-time limit, checked at each, holds.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, ValuesView
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from math import prod
from types import BuiltinMethodType
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError, nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.ext import loopcontrols as LoopControls
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MAX_VALUE_BYTES = 32 << 20
MAX_TOTAL_BYTES = 512 << 20
MAX_CPU_SECONDS = 2.0
MAX_MESSAGE_CHARS = 500

_CONTAINERS = (list, tuple, dict, set, frozenset, KeysView, ValuesView, ItemsView)

# Methods and filters whose result can be as long as the product of what they are given.
_GROWING = frozenset(
    {"batch", "center", "expandtabs", "format", "format_map", "indent", "join", "ljust", "replace", "rjust"}
    | {"round", "slice", "to_bytes", "translate", "truncate", "zfill"}
)
# Slow out of proportion to their input, and of no use in a prompt.
_DROPPED_FILTERS = ("pprint", "random", "striptags", "urlize", "wordwrap", "xmlattr")
# A width or precision of five digits, or one that is itself an argument, in "%" and str.format formats.
_WIDE_FORMAT = re.compile(r"%(?:\(\w*\))?[-+ #0]*(?:\d{5,}|\*|\d*\.(?:\d{5,}|\*))" r"|\{[^{}]*(?:\{|:[^{}]*\d{5,})")


class Meter:
    """What one render has used. Sizes are in bytes, as `sys.getsizeof` counts them."""

    def __init__(self) -> None:
        self._deadline = time.thread_time() + MAX_CPU_SECONDS
        self._left = MAX_TOTAL_BYTES
        # id -> (the value, kept alive so that its id stays its own; its size written out in full)
        self._sizes: dict[int, tuple[object, int]] = {}

    def tick(self, size: int = 0) -> None:
        """Count a step, and `size` bytes made by it."""
        self._left -= size
        if self._left < 0:
            raise SecurityError("the template makes too much text")
        if time.thread_time() > self._deadline:
            raise SecurityError("the template takes too long")

    def admit(self, value: Any) -> Any:
        """Count a value that an operation made, and return it; a lazy one is counted as it is read."""
        if isinstance(value, Iterator):
            return self.stream(value)
        if isinstance(value, _CONTAINERS):
            self.tick()
            size = self._full_size(value)
        else:
            size = sys.getsizeof(value)
            self.tick(size)
        if size > MAX_VALUE_BYTES or (isinstance(value, int) and size > 1024):
            raise SecurityError("the template makes too large a value")
        return value

    def stream(self, values: Iterable[Any]) -> Iterator[Any]:
        """Yield the values, each admitted."""
        for value in values:
            yield self.admit(value)

    def _full_size(self, value: Any) -> int:
        """The size written out: a value inside a list twice counts twice, but is walked only once."""
        if known := self._sizes.get(id(value)):
            return known[1]
        size = sys.getsizeof(value)
        self.tick(size)
        if isinstance(value, dict):
            size += sum(map(self._full_size, value)) + sum(map(self._full_size, value.values()))
        elif isinstance(value, _CONTAINERS):
            size += sum(map(self._full_size, value))
        self._sizes[id(value)] = (value, size)
        return size

    def check_growth(self, name: str, values: tuple[Any, ...]) -> None:
        """Refuse an operation on these values, the subject first, before its result gets too large."""
        if name in ("format", "format_map", "%"):
            self._check_format(values)
        elif name == "replace" and isinstance(values[0], str) and len(values) > 2:
            found = len(values[0]) // max(self._weight(values[1]), 1) + 1
            self._check_bound(found * self._weight(values[2]))
        elif name == "**":
            self._check_bound(self._weight(values[1]) * sys.getsizeof(values[0]))
        elif name == "*":
            if not all(isinstance(value, (int, float)) for value in values):
                self._check_bound(prod(map(self._weight, values)))
        elif name == "~":
            self._check_bound(sum(map(self._size, values)))
        elif name == "sum":
            if any(isinstance(value, _CONTAINERS) for value in values[1:]):
                raise SecurityError("the template sums what is not numbers")
        elif name in _GROWING:
            self._check_bound(prod(max(self._weight(value), 1) for value in values))

    def _check_format(self, values: tuple[Any, ...]) -> None:
        source = values[0] if isinstance(values[0], str) else ""
        if _WIDE_FORMAT.search(source.replace("{{", "")):
            raise SecurityError("the template formats with too large a width")
        fields = source.count("%") + source.count("{")
        self._check_bound(fields * sum(map(self._size, values[1:])))

    def _size(self, value: Any) -> int:
        return self._full_size(value) if isinstance(value, _CONTAINERS) else sys.getsizeof(value)

    def _weight(self, value: Any) -> int:
        """What a value adds to a product: as a width or a count, a number is worth itself."""
        if isinstance(value, (str, bytes)):
            return len(value)
        if isinstance(value, int):
            return abs(value)
        return self._full_size(value) if isinstance(value, _CONTAINERS) else 1

    def _check_bound(self, size: int) -> None:
        if size > MAX_VALUE_BYTES:
            raise SecurityError("the template makes too large a value")


_meter: ContextVar[Meter] = ContextVar("_meter")


@contextmanager
def metered() -> Iterator[None]:
    """Compiling and rendering happen inside: everything is counted on one new meter."""
    token = _meter.set(Meter())
    try:
        yield
    finally:
        _meter.reset(token)


def current_meter() -> Meter:
    """The meter of the render in progress."""
    return _meter.get()


class _Opaque(Namespace):
    """`namespace()`, except that it does not print its attributes, which no meter has counted."""

    def __repr__(self) -> str:
        return "<namespace>"


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}`, with which templates mark the model's own words for training."""

    tags = {"generation"}  # noqa: RUF012 (declared so by Extension)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """The environment of chat templates; use it inside `metered()`.

    Raises jinja2.TemplateError, of which SecurityError is one, or what a filter or operator raises.
    """

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[LoopControls, _Generation])
        del self.globals["lipsum"]
        self.globals["namespace"] = _Opaque
        for name in _DROPPED_FILTERS:
            del self.filters[name]
        filters: dict[str, Any] = dict(self.filters)
        tests: dict[str, Any] = dict(self.tests)
        self.filters.update({name: _metered_filter(name, filter) for name, filter in filters.items()})
        self.tests.update({name: _metered_test(test) for name, test in tests.items()})
        self.filters.update({_ADMIT: _admit, _CONCAT: _concat, _TICK: _tick})

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        _Rewriter().visit(tree)
        return tree

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        meter = current_meter()
        meter.tick()
        method = getattr(__obj, "__wrapped__", __obj)  # the sandbox wraps str.format
        if isinstance(method, BuiltinMethodType):
            args = tuple(list(arg) if isinstance(arg, Iterator) else arg for arg in args)
            meter.check_growth(method.__name__, (method.__self__, *args, *kwargs.values()))
        return meter.admit(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        meter = current_meter()
        if operator != "%" or isinstance(left, str):
            meter.check_growth(operator, (left, right))
        return meter.admit(super().call_binop(context, operator, left, right))


# Names that no template can write, for filters that only the rewrite uses.
_ADMIT, _CONCAT, _TICK = "(admit)", "(concat)", "(tick)"


@pass_context  # without it the optimizer would run them once, at compile time
def _admit(context: Context, value: Any) -> Any:
    return current_meter().admit(value)


@pass_context
def _concat(context: Context, parts: tuple[Any, ...]) -> Any:
    meter = current_meter()
    meter.check_growth("~", parts)
    return meter.admit("".join(map(str, parts)))


@pass_context
def _tick(context: Context, size: int) -> str:
    current_meter().tick(size)
    return ""


def _metered_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    subject = 1 if hasattr(function, "jinja_pass_arg") else 0  # the context or environment comes first

    @wraps(function)  # keeps jinja_pass_arg
    def run(*args: Any, **kwargs: Any) -> Any:
        meter = current_meter()
        meter.tick()
        if name in _GROWING or name == "sum":
            args = tuple(list(arg) if isinstance(arg, Iterator) else arg for arg in args)
            meter.check_growth(name, (*args[subject:], *kwargs.values()))
        return meter.admit(function(*args, **kwargs))

    return run


def _metered_test(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        current_meter().tick()
        return function(*args, **kwargs)

    return run


def _filtered(name: str, node: nodes.Node) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class _Rewriter(NodeTransformer):
    """Puts the meter where the sandbox has no hook."""

    def _admitted(self, node: nodes.Expr) -> nodes.Expr:
        self.generic_visit(node)
        return _filtered(_ADMIT, node)

    visit_List = visit_Dict = visit_Compare = _admitted

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Expr:
        return self._admitted(node) if node.ctx == "load" else node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Expr:
        if isinstance(node.arg, nodes.Slice):
            return self._admitted(node)
        self.generic_visit(node)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:
        self.generic_visit(node)
        return _filtered(_CONCAT, nodes.Tuple(node.nodes, "load", lineno=node.lineno))

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        self.generic_visit(node)
        literal = sum(len(part.data) for part in node.nodes if isinstance(part, nodes.TemplateData))
        node.nodes = [
            _ticked(literal, node.lineno),
            *(part if isinstance(part, nodes.TemplateData) else _filtered(_ADMIT, part) for part in node.nodes),
        ]
        return node

    def _ticked_body(self, node: nodes.Macro | nodes.CallBlock | nodes.Block | nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, nodes.Output([_ticked(0, node.lineno)], lineno=node.lineno))
        return node

    visit_Macro = visit_CallBlock = visit_Block = _ticked_body

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self._ticked_body(node)
        if node.test is not None:
            node.test = _filtered(_ADMIT, node.test)
        return node


def _ticked(size: int, lineno: int) -> nodes.Filter:
    return _filtered(_TICK, nodes.Const(size, lineno=lineno))


def template_message(error: Exception) -> str:
    """What went wrong, without a traceback; cut where the template's own message is long."""
    if isinstance(error, TemplateError):
        where = f" (line {error.lineno})" if isinstance(error, TemplateSyntaxError) else ""
        return f"{error.message or type(error).__name__}"[:MAX_MESSAGE_CHARS] + where
    return f"{type(error).__name__}: {error}"[:MAX_MESSAGE_CHARS]
