"""Files of a checkpoint directory that are of no use, as can be told before anything is made of them."""

from __future__ import annotations

import os
from pathlib import Path

from fdserve.errors import StartupError

SUFFIXES = (".safetensors", ".json", ".jinja", ".model")
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def check_files(directory: Path) -> None:
    """Raise StartupError where a checkpoint's directory or file cannot be read, or a file only stands for another.

    A directory without a config.json is left to those who want one: nothing says that its files belong together.
    """
    try:
        names = os.listdir(directory)
        for name in sorted(names) if "config.json" in names else ():
            if name.endswith(SUFFIXES):
                _check_file(directory / name)
    except OSError as error:
        raise StartupError(f"{error.filename} cannot be read: {error.strerror}.") from None


def _check_file(path: Path) -> None:
    if not path.exists():
        raise StartupError(
            f"{path} is a link to {os.readlink(path)}, and nothing is there: copy the files that the links of the "
            "directory lead to, or make them reachable too."
        )
    if path.is_file():
        with path.open("rb") as file:
            if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
                raise StartupError(f"{path} is only Git LFS's pointer to the file: run `git lfs pull` beside it.")
