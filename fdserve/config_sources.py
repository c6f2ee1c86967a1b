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
# What stands between a setting and its value where they were meant as one word, and what YAML's errors quote.
_JOINT = re.compile(r"[=:\s]")
_QUOTED = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""")
_NO_VALUE = re.compile(r"""(['"])(.|<[a-z ]+>)\1""")
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
    if _is_secret(field):
        several = ', several keys as "k1,k2"' if "," in field.metadata["metavar"] else ""
        raise StartupError(f"{origin} is no text: write it in quotes{several}.")
    expected = {"int": "an integer", "float": "a number", "bool": "true or false", "str": "text"}[str(kind)]
    if field.metadata["metavar"] == "BYTES":
        expected = "a number of bytes such as 4096, 512M or 4G"
    raise StartupError(f"{origin} is {value!r:.200}: expected {expected}.")


def _is_secret(field: dataclasses.Field[Any]) -> bool:
    """Whether no error may show its value."""
    return not field.repr


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

    The keys of what is no setting by itself are not shown: they may be those of clients, in wrong brackets.

    What is a number in octal or sexagesimal to YAML, 0123 or 12:30, stays the text that it is: a key or a name, mostly.
    """

    _root: yaml.MappingNode | None = None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        self._root = self._root or node  # which comes first
        seen = set()
        for key, _ in node.value:
            name = key.value.replace("-", "_") if isinstance(key, yaml.ScalarNode) else None
            if name is not None and name in seen:
                where = f"in {self.name}, line {key.start_mark.line + 1}"
                what = f"the setting {key.value}" if node is self._root else "a key"
                raise StartupError(f"{where}, {what} stands for the second time.")
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
    except (KeyError, AttributeError):  # PyYAML's, of what is no boolean or date and is tagged as one
        raise StartupError(
            f"the configuration file {path} is not valid YAML: a value is not what its tag says."
        ) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # besides YAML's own, those of dates and integers
        raise StartupError(f"the configuration file {path} is not valid YAML: {_flaw(error)}.") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise StartupError(f"the configuration file {path} must hold settings as `name: value` lines.")
    values = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in fields:
            if (begin := _JOINT.split(str(key))[0]).replace("-", "_") in fields:
                raise StartupError(f"in {path}, {begin} must be followed by a colon and a space.")
            raise _unknown(f"in {path}, the setting", str(key), fields)
        if value is not None:
            values[name] = _convert(fields[name], value, f"{key} in {path}")
    return values


def _flaw(error: Exception) -> str:
    """What the error says, without the line that it shows and the texts that it quotes: they may be secrets."""
    if isinstance(error, UnicodeDecodeError):
        return f"it is not UTF-8 (byte {error.start})"
    text, where = str(error), ""
    if isinstance(error, yaml.MarkedYAMLError):
        text = " ".join([part for part in (error.context, error.problem) if part])
        if error.problem_mark is not None:
            where = f" (line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1})"
    text = _QUOTED.sub(lambda quoted: quoted[0] if _NO_VALUE.fullmatch(quoted[0]) else "…", text)
    return " ".join(text.split()) + where


def _read_flags(fields: Fields, argv: Sequence[str]) -> dict[str, Any]:
    parser = _parser(fields)
    known, rest = parser.parse_known_args(list(argv))
    if rest:
        if _follows_secret(fields, argv, rest[0]):
            raise StartupError("a word behind a secret belongs to no flag: quote what holds spaces.")
        flag = _JOINT.split(rest[0])[0]
        if not flag.startswith("-"):
            raise StartupError(f"{rest[0]!r:.200} belongs to no flag: settings are written as --name value.")
        if flag.lstrip("-") in parser.flags and flag.startswith("--"):
            raise StartupError(f"{flag} and its value must be two words, or joined by =.")
        raise _unknown("the flag", flag, parser.flags, "--")
    for name, text in vars(known).items():
        # Of a variable that is not set, mostly: a server open to everybody is not what was meant.
        if not text and name in fields and _is_secret(fields[name]):
            raise StartupError(f"--{name.replace('_', '-')} is empty: leave it out where none is wanted.")
    return {
        name: text if name == "config" else _convert(fields[name], text, "--" + name.replace("_", "-"))
        for name, text in vars(known).items()
    }


def _follows_secret(fields: Fields, argv: Sequence[str], word: str) -> bool:
    """Whether the word stands behind a secret's flag, before the next one: as the second of several keys, say."""
    secret = False
    for given in argv:
        if secret and given == word and not given.startswith("--"):
            return True
        if given.startswith("--") and given != "--":
            name = given[2:].split("=")[0].replace("-", "_")
            secret = name in fields and _is_secret(fields[name])
    return False


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
