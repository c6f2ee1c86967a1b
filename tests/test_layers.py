"""The package's layers import one way."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "fdserve"

# From the top down. Those of one line do not know each other; what is not listed imports nothing that is.
LAYERS = [
    {"__main__"},
    {"launcher"},
    {"app"},
    {"api"},
    {"server"},
    {"http", "text", "engine", "hub"},
    {"executor"},
    {"worker"},
    {"models", "executor.wire"},  # the frames are what both ends of the wire speak
    {"ops"},
    {"config"},
    {"config_sources"},
    {"protocol", "errors"},
]
DEPTHS = {name: depth for depth, names in enumerate(LAYERS) for name in names}


def layer(module: str) -> str | None:
    """The layer of a module that is named from the package on."""
    parts = module.split(".")
    return next((name for name in (".".join(parts[:2]), parts[0]) if name in DEPTHS), None)


def imported(path: Path) -> Iterator[str]:
    """The package's modules that a file imports, named from the package on; names in them may count as modules."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are written out"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name.removeprefix("fdserve.") for name in names if name.startswith("fdserve."))


def test_no_layer_imports_one_above_it() -> None:
    found = set()
    for path in PACKAGE.rglob("*.py"):
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        for name in imported(path):
            above, below = layer(module), layer(name)
            if below is not None and above != below:
                assert above is not None, f"{module} imports {name}"
                assert DEPTHS[above] < DEPTHS[below], f"{module} imports {name}"
                found.add((above, below))
    assert {("app", "api"), ("api", "server"), ("server", "engine"), ("models", "ops")} <= found
