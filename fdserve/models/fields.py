"""JSON files of a checkpoint directory, read field by field with errors that name the file and the field."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any, TypeVar

from fdserve.errors import StartupError

T = TypeVar("T")
LARGEST = sys.float_info.max  # keeps out infinity, and integers too long for a float


class Fields:
    """One JSON object read from a file, with typed look-ups that name the file and the field in their errors.

    A null counts as absent everywhere, as it does for the writers of these files.
    """

    def __init__(self, path: Path, values: dict[str, Any] | None = None) -> None:
        self.path = path
        self.values = read_json_object(path) if values is None else values

    def error(self, what: str) -> StartupError:
        return StartupError(f"{self.path}: {what}.")

    def get(self, *names: str) -> Any:
        """The first of `names` that is present, or None."""
        return next((self.values[name] for name in names if self.values.get(name) is not None), None)

    def section(self, name: str) -> Fields:
        """The object under `name`; empty when absent."""
        value = self.get(name)
        if value is not None and not isinstance(value, dict):
            raise self.error(f"{name} must be an object, not {value!r}")
        return Fields(self.path, value or {})

    def optional_integer(self, *names: str, low: int = 1) -> int | None:
        value = self.get(*names)
        if value is not None and (not _is_integer(value) or value < low):
            raise self.error(f"{names[0]} must be an integer of at least {low}, not {value!r}")
        return None if value is None else int(value)

    def integer(self, *names: str, default: int | None = None, low: int = 1) -> int:
        value = self.optional_integer(*names, low=low)
        return self._required(names[0], default if value is None else value)

    def optional_number(self, name: str, *, low: float, high: float = math.inf, low_open: bool = False) -> float | None:
        value = self.get(name)
        if value is None:
            return None
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not low <= value <= min(high, LARGEST) or (low_open and value == low):
            bounds = f"above {low:g}" if low_open else f"of at least {low:g}"
            upper = "" if high == math.inf else f" and at most {high:g}"
            raise self.error(f"{name} must be a number {bounds}{upper}, not {value!r}")
        return float(value)

    def number(self, name: str, *, default: float | None = None) -> float:
        """A number above zero."""
        value = self.optional_number(name, low=0.0, low_open=True)
        return self._required(name, default if value is None else value)

    def boolean(self, name: str, *, default: bool) -> bool:
        value = self.get(name)
        if value is not None and not isinstance(value, bool):
            raise self.error(f"{name} must be true or false, not {value!r}")
        return default if value is None else value

    def token_id(self, name: str) -> int | None:
        return self.optional_integer(name, low=0)

    def token_ids(self, name: str) -> list[int]:
        """One id, a list of ids, or nothing."""
        value = self.get(name)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(_is_integer(token) and token >= 0 for token in ids):
            raise self.error(f"{name} must be a token id or a list of token ids, not {value!r}")
        return ids

    def _required(self, name: str, value: T | None) -> T:
        if value is None:
            raise self.error(f"{name} is missing")
        return value


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; StartupError when it cannot be read or is anything else."""
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise StartupError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise StartupError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise StartupError(f"{path} must hold a JSON object.")
    return value


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
