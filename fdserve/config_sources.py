"""Where settings come from: the command line with its --help, the FDSERVE_* variables and the YAML file."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

import fdserve
from fdserve.errors import StartupError

MAX_INTEGER = 2**63 - 1
"""Beyond it nothing can be counted: the ranks are told in 64 bits."""

Fields = Mapping[str, dataclasses.Field[Any]]
"""The fields of `Config` by their names."""

_PREFIX = "FDSERVE_"
# What Kubernetes sets in every container for a service whose name begins with "fdserve".
_OF_A_SERVICE = re.compile(r"(.+_)?(SERVICE_HOST|SERVICE_PORT(_.+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)")
_SERVICE_ADDRESS = re.compile(r"(tcp|udp|sctp)://.+")
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_BOOLEANS = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}


def read_settings(fields: Fields, argv: Sequence[str] | None, environ: Mapping[str, str]) -> dict[str, Any]:
    """The settings that were given, in their types: see `Config.load`."""
    flags = _read_flags(fields, argv) if argv is not None else {}
    given = {**_read_variables(fields, environ), **flags}
    file = given.pop("config", "")
    return {**(_read_file(fields, Path(file)) if file else {}), **given}


def parse_bytes(name: str, text: str) -> int:
    """A size such as "4096", "512M" or "1.5GiB" in bytes (K, M and G are powers of 1024); StartupError if garbled."""
    match = re.fullmatch(r"(\d{1,20}(?:\.\d{1,20})?)\s*([KMG]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    size = int(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
    if not 0 < size <= MAX_INTEGER:
        raise StartupError(f"{name} is {text!r:.200}: expected a number of bytes such as 4096, 512M or 4G.")
    return size


def _convert(field: dataclasses.Field[Any], value: object, origin: str) -> Any:
    """The value in the field's type, from the text of a flag or variable or from a YAML scalar."""
    kind = field.type
    if kind == "str" and isinstance(value, (str, int)) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, dict) and field.metadata["metavar"] == "JSON":
        try:
            return json.dumps(value)
        except (TypeError, ValueError, RecursionError) as error:  # dates, say, or a mapping inside itself
            raise StartupError(f"{origin} is not JSON: {error}.") from None
    if kind == "bool":
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.strip().lower() in _BOOLEANS:
            return _BOOLEANS[value.strip().lower()]
    elif isinstance(value, (str, int, float)) and not isinstance(value, bool):
        try:
            if kind == "int" and not isinstance(value, float):
                # Sizes in bytes may carry a unit, in max_request_bytes as in kv_cache_memory.
                return int(value) if field.metadata["metavar"] != "BYTES" else parse_bytes(origin, str(value))
            if kind == "float":
                return float(value)
        except ValueError:
            pass
    expected = {"int": "an integer", "float": "a number", "bool": "true or false", "str": "text"}[str(kind)]
    if field.metadata["metavar"] == "BYTES":
        expected = "a number of bytes such as 4096, 512M or 4G"
    raise StartupError(f"{origin} is {value!r:.200}: expected {expected}.")


def _read_variables(fields: Fields, environ: Mapping[str, str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for variable, text in environ.items():
        if not variable.startswith(_PREFIX):
            continue
        upper = variable.removeprefix(_PREFIX)
        if _OF_A_SERVICE.fullmatch(upper) or (upper.endswith("PORT") and _SERVICE_ADDRESS.fullmatch(text)):
            continue
        name = upper.lower()
        if name != "config" and name not in fields:
            known = [setting.upper() for setting in (*fields, "config")]
            raise _unknown("the environment variable", variable, known, _PREFIX)
        # Compose files and manifests write "not set" as an empty value.
        if text:
            if name in values:
                raise StartupError(f"the environment variable {variable} stands for the second time, in other letters.")
            values[name] = text if name == "config" else _convert(fields[name], text, variable)
    return values


class _Loader(yaml.SafeLoader):
    """Raises StartupError for a key that stands twice, be it once with hyphens, where YAML takes the later one.

    What is a number in octal or sexagesimal to YAML, 0123 or 12:30, stays the text that it is: a key or a name, mostly.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            name = key.value.replace("-", "_") if isinstance(key, yaml.ScalarNode) else None
            if name is not None and name in seen:
                where = f"in {self.name}, line {key.start_mark.line + 1}"
                raise StartupError(f"{where}, the setting {key.value} stands for the second time.")
            seen.add(name)
        return super().construct_mapping(node, deep)


_INTEGER = "tag:yaml.org,2002:int"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _INTEGER]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_INTEGER, re.compile(r"(0|-?[1-9][0-9]*)\Z"), list("-0123456789"))


def _read_file(fields: Fields, path: Path) -> dict[str, Any]:
    try:
        loader = _Loader(path.read_text(encoding="utf-8"))
        loader.name = str(path)
        content = loader.get_single_data()
    except OSError as error:
        raise StartupError(f"the configuration file {path} cannot be read: {error.strerror}.") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # besides YAML's own, those of dates and integers
        problem = " ".join(str(error).split())
        raise StartupError(f"the configuration file {path} is not valid YAML: {problem}.") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise StartupError(f"the configuration file {path} must hold settings as `name: value` lines.")
    values = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in fields:
            raise _unknown(f"in {path}, the setting", str(key), fields)
        if value is not None:
            values[name] = _convert(fields[name], value, f"{key} in {path}")
    return values


def _read_flags(fields: Fields, argv: Sequence[str]) -> dict[str, Any]:
    parser = _parser(fields)
    known, rest = parser.parse_known_args(list(argv))
    if rest:
        flag = rest[0].split("=")[0]
        if not flag.startswith("-"):
            raise StartupError(f"{flag!r} belongs to no flag: settings are written as --name value.")
        raise _unknown("the flag", flag, parser.flags, "--")
    for name, text in vars(known).items():
        # Of a variable that is not set, mostly: a server open to everybody is not what was meant.
        if not text and name in fields and not fields[name].repr:
            raise StartupError(f"--{name.replace('_', '-')} is empty: leave it out where none is wanted.")
    return {
        name: text if name == "config" else _convert(fields[name], text, "--" + name.replace("_", "-"))
        for name, text in vars(known).items()
    }


def _unknown(what: str, given: str, known: Iterable[str], prefix: str = "") -> StartupError:
    """`known` are names without the prefix: with it, everything looks alike."""
    close = difflib.get_close_matches(given.removeprefix(prefix), list(known), n=1)
    return StartupError(f"{what} {given} is unknown" + (f": did you mean {prefix}{close[0]}?" if close else "."))


class _Parser(argparse.ArgumentParser):
    """argparse, with its errors as StartupError."""

    flags: list[str]

    def error(self, message: str) -> NoReturn:
        raise StartupError(message + "." if not message.endswith(".") else message)


def _parser(fields: Fields) -> _Parser:
    """Flags leave text under the setting's name, and nothing where they are absent."""
    parser = _Parser(
        prog="fdserve",
        description="An OpenAI-compatible inference server for ERNIE-4.5 on PaddlePaddle.",
        epilog=f"Every setting is also a variable ({_PREFIX}MAX_MODEL_LEN=4096) and a key of the YAML file "
        "(max_model_len: 4096). Flags win over variables, variables over the file.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"fdserve {fdserve.__version__}")
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings")
    for name, field in fields.items():
        flag = "--" + name.replace("_", "-")
        default = f" (default: {str(field.default).lower() if field.type == 'bool' else field.default})"
        text = (field.metadata["help"] + (default if field.default != "" else "")).replace("%", "%%")
        metavar = field.metadata["metavar"]
        if field.type == "bool":
            parser.add_argument(flag, dest=name, metavar=metavar, nargs="?", const="true", help=text)
            parser.add_argument(
                flag.replace("--", "--no-", 1), dest=name, action="store_const", const="false", help=argparse.SUPPRESS
            )
        else:
            parser.add_argument(flag, dest=name, metavar=metavar, help=text)
    parser.flags = [flag.lstrip("-") for action in parser._actions for flag in action.option_strings]
    return parser
