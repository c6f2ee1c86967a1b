"""Jinja2 for templates that nobody has vouched for: sandboxed, and bounded in time and memory.

Jinja2's immutable sandbox keeps a template away from Python's internals, but lets it loop for ever or double
a string until memory is gone. Here every operation that makes a value or takes more than constant time goes
through the `Meter` of the render in progress: calls, filters, tests, attributes and operators by the sandbox's own
hooks, the rest (loops, macros, literals, `~`, slices, comparisons, output) by a rewrite of the syntax tree. So no
value grows past MAX_VALUE_BYTES, all of them together stay below MAX_TOTAL_BYTES, and no single operation
is long: the CPU-time limit, checked at each, holds. Compiling is metered alike, by the token and by the node.

A template has the filters and methods that chat templates use, not all of Jinja's and Python's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import wraps
from types import BuiltinMethodType
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError, nodes, pass_context
from jinja2.compiler import CodeGenerator
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.ext import loopcontrols as LoopControls
from jinja2.lexer import Token, TokenStream
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer
from markupsafe import escape

from fdserve.text.template_meter import FILTERS, METHODS, current_meter

MAX_CODE_CHARS = 512 << 10
"""Of the Python that a template becomes: its compiler is a single call."""
MAX_MESSAGE_CHARS = 500


class _Opaque(Namespace):
    """`namespace()`, except that it does not print its attributes, which no meter has counted."""

    def __repr__(self) -> str:
        return "<namespace>"


def _dict(base: Mapping[Any, Any] | None = None, /, **items: Any) -> dict[Any, Any]:
    """`dict()` of no pairs: numbers among their keys could be chosen to have one hash."""
    return {**(base or {}), **items}


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}`, with which templates mark the model's own words for training."""

    tags = {"generation"}  # noqa: RUF012 (declared so by Extension)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def filter_stream(self, stream: TokenStream) -> Iterable[Token]:
        for token in stream:
            current_meter().step()
            yield token


class _Code(CodeGenerator):
    def visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> Any:
        current_meter().step()
        return super().visit(node, *args, **kwargs)


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """The environment of chat templates; use it inside `metered()`.

    Raises jinja2.TemplateError, of which SecurityError is one, or what a filter or operator raises.
    """

    intercepted_binops = frozenset({"+", "*", "**", "%"})
    code_generator_class = _Code

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[LoopControls, _Generation])
        del self.globals["lipsum"]
        self.globals["namespace"] = _Opaque
        self.globals["dict"] = _dict
        self.filters.update({"safe": str, "e": _escape, "escape": _escape})  # there is no markup to keep apart
        filters = {name: filter for name, filter in self.filters.items() if name in FILTERS}
        tests: dict[str, Any] = dict(self.tests)
        self.filters.clear()
        self.filters.update({name: _metered_filter(name, filter) for name, filter in filters.items()})
        self.tests.update({name: _metered_test(test) for name, test in tests.items()})
        self.filters.update({_ADMIT: _admit, _CONCAT: _concat, _SHOW: _show, _TICK: _tick})

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        _Rewriter().visit(tree)
        return tree

    def _compile(self, source: str, filename: str) -> Any:
        if len(source) > MAX_CODE_CHARS:
            raise SecurityError("the template has too many statements")
        current_meter().tick()
        return super()._compile(source, filename)

    def getattr(self, obj: Any, attribute: str) -> Any:
        current_meter().step()
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        current_meter().step()
        return super().getitem(obj, argument)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        meter = current_meter()
        meter.tick()
        method = getattr(__obj, "__wrapped__", __obj)  # the sandbox wraps str.format
        if isinstance(method, BuiltinMethodType):
            if method.__name__ not in METHODS:
                raise SecurityError(f"the template calls {method.__name__}, which is not at hand")
            args = tuple(list(arg) if isinstance(arg, Iterator) else arg for arg in args)
            values = (method.__self__, *args, *kwargs.values())
            meter.check(method.__name__, values[::-1] if method.__name__ == "join" else values)
        return meter.admit(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        meter = current_meter()
        meter.check(operator, (left, right))
        return meter.admit(super().call_binop(context, operator, left, right))


# Names that no template can write, for filters that only the rewrite uses.
_ADMIT, _CONCAT, _SHOW, _TICK = "(admit)", "(concat)", "(show)", "(tick)"


@pass_context  # without it the optimizer would run them once, at compile time
def _admit(context: Context, value: Any) -> Any:
    return current_meter().admit(value)


@pass_context
def _concat(context: Context, parts: tuple[Any, ...]) -> Any:
    meter = current_meter()
    meter.check("~", parts)
    return meter.admit("".join(map(str, parts)))


@pass_context
def _show(context: Context, value: Any) -> Any:
    meter = current_meter()
    meter.check("string", (value,))
    return meter.admit(value)


@pass_context
def _tick(context: Context, size: int) -> str:
    current_meter().tick(size)
    return ""


def _escape(value: Any) -> str:
    return str(escape(value))


def _metered_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    subject = 1 if hasattr(function, "jinja_pass_arg") else 0  # the context or environment comes first
    checked = "%" if name == "format" else name

    @wraps(function)  # keeps jinja_pass_arg
    def run(*args: Any, **kwargs: Any) -> Any:
        meter = current_meter()
        meter.tick()
        if name == "replace" and kwargs.keys() - {"count"}:
            raise SecurityError("the template gives replace its arguments by name")
        if name in ("join", "sum"):
            args = tuple(list(arg) if isinstance(arg, Iterator) else arg for arg in args)
        meter.check(checked, (*args[subject:], *kwargs.values()))
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

    def visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> Any:
        current_meter().step()
        return super().visit(node, *args, **kwargs)

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
            *(part if isinstance(part, nodes.TemplateData) else _filtered(_SHOW, part) for part in node.nodes),
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
