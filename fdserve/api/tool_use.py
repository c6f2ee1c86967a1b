"""Which tools a chat may call, and whether it must: OpenAI's forms of asking, old and new, as one."""

from __future__ import annotations

from typing import NamedTuple

from fdserve.api.params import unsupported
from fdserve.errors import InvalidRequest
from fdserve.protocol.chat import ChatRequest
from fdserve.protocol.tools import AllowedTools, FunctionDefinition, FunctionName, NamedTool, Tool, ToolChoice
from fdserve.server.server import Server


class ToolUse(NamedTuple):
    """`mode` is "auto", "required" or the name of the one tool to call; `param` is the field that says so."""

    tools: list[Tool]
    mode: str
    parallel: bool
    param: str

    @property
    def forced(self) -> bool:
        """Whether there must be a call."""
        return self.mode != "auto"


def tool_use(request: ChatRequest) -> ToolUse | None:
    """The tools that the prompt shows and the answer may call; None where there are none.

    Raises InvalidRequest where the choice names no tool that there is, or belongs to the form that has no tools here.
    """
    if request.functions and request.tools:
        raise InvalidRequest("functions is the older form of tools: give one of them.", param="functions")
    _check_pair(request)
    tools, param = list(request.tools or ()), "tool_choice"
    choice: ToolChoice | FunctionName | None = request.tool_choice
    if request.functions:
        tools, param = [Tool(type="function", function=function) for function in request.functions], "function_call"
        choice = request.function_call
    if choice == "none":
        return None
    mode = "auto"
    known = {tool.function.name for tool in tools}
    if isinstance(choice, AllowedTools):
        names = dict.fromkeys(tool.function.name for tool in choice.allowed_tools.tools)
        for name in names:
            _check_name(name, known, param)
        tools = [tool for tool in tools if tool.function.name in names]
        mode = choice.allowed_tools.mode
    elif isinstance(choice, NamedTool | FunctionName):
        mode = choice.function.name if isinstance(choice, NamedTool) else choice.name
        _check_name(mode, known, param)
    elif choice is not None:
        mode = choice
    if not tools:
        if mode != "auto":
            raise InvalidRequest(f"{param} is only allowed when tools are specified.", param=param)
        return None
    parallel = request.parallel_tool_calls is not False and not request.functions
    return ToolUse(tools, mode, parallel, param)


def _check_pair(request: ChatRequest) -> None:
    """Raise InvalidRequest for a choice in the form that the tools do not have, unless it says what holds anyway."""
    if request.functions:
        if request.tool_choice not in (None, request.function_call or "auto"):
            message = "tool_choice belongs to tools: with functions, send function_call."
            raise InvalidRequest(message, param="tool_choice")
    elif request.tools:
        if request.function_call not in (None, request.tool_choice or "auto"):
            message = "function_call belongs to functions: with tools, send tool_choice."
            raise InvalidRequest(message, param="function_call")
    elif isinstance(request.function_call, FunctionName):
        message = "function_call is only allowed when functions are specified."
        raise InvalidRequest(message, param="function_call")


def check_tools(request: ChatRequest, server: Server) -> None:
    """Raise InvalidRequest for what cannot be called.

    That is a choice that names no tool, a forced call where the model has no form for it, and arguments that are no
    object.
    """
    use = tool_use(request)
    if use is not None and use.forced and server.tools is None:
        raise unsupported(use.param, "that forces a call ")
    for index, tool in enumerate(request.tools or ()):
        _check_parameters(tool.function, f"tools[{index}]")
    for index, function in enumerate(request.functions or ()):
        _check_parameters(function, f"functions[{index}]")


def _check_name(name: str, known: set[str], param: str) -> None:
    if name not in known:
        raise InvalidRequest(f"{param} names {name[:200]!r}, which is not among the tools.", param=param)


def _check_parameters(function: FunctionDefinition, path: str) -> None:
    kind = (function.parameters or {}).get("type", "object")
    if kind != "object" and not (isinstance(kind, list) and "object" in kind):
        message = f"The parameters of {function.name[:200]!r} must be a schema of the type 'object', not {kind!r:.200}."
        raise InvalidRequest(message, param=path)
