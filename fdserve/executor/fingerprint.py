"""What must be the same on every host of a cluster: the checkpoint, the settings it is loaded with, and fdserve itself.

A rank shows its fingerprint once both sides know each other, and the server lets it in or says what differs.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import msgspec

import fdserve
from fdserve.executor.cluster import NotTrusted
from fdserve.executor.frames import FrameStream
from fdserve.executor.wire import HEADER
from fdserve.models.checkpoint import Checkpoint
from fdserve.models.fields import read_json_object

TAIL_BYTES = 64 << 10
"""Of each file so much of the weights' end is looked at: two trainings of one model have the same headers."""
MOST_NAMED = 4


class Fingerprint(msgspec.Struct, frozen=True):
    """Compared by `differences`."""

    version: str
    """fdserve's."""
    settings: dict[str, str]
    config: dict[str, str]
    """The fields of config.json, as JSON."""
    weights: dict[str, tuple[int, str]]
    """Of each file of weights its size, and a digest of its header and its end."""


class Different(Exception):
    """A rank and the server do not match; the message says in what."""


def take_fingerprint(directory: Path, *, dtype: str, quantization: str, kv_cache_dtype: str) -> Fingerprint:
    """Of the checkpoint in `directory` and what it is loaded with.

    Raises StartupError if the checkpoint cannot be read.
    """
    config = {
        name: json.dumps(value, sort_keys=True) for name, value in read_json_object(directory / "config.json").items()
    }
    with Checkpoint(directory) as checkpoint:
        files = {tensor.file for tensor in checkpoint.tensors.values()}
    settings = {"dtype": dtype, "quantization": quantization, "kv_cache_dtype": kv_cache_dtype}
    return Fingerprint(fdserve.__version__, settings, config, {path.name: _weights(path) for path in sorted(files)})


def _weights(path: Path) -> tuple[int, str]:
    with path.open("rb") as file:
        start = file.read(8)
        digest = hashlib.sha256(start + file.read(int.from_bytes(start, "little")))
        size = path.stat().st_size
        file.seek(max(file.tell(), size - TAIL_BYTES))
        digest.update(file.read())
    return size, digest.hexdigest()


def differences(theirs: Fingerprint, ours: Fingerprint) -> list[str]:
    """In what theirs is not like ours, most telling first; empty if they are the same."""
    found = [f"fdserve is {theirs.version}, not {ours.version}"] if theirs.version != ours.version else []
    found += [
        f"{name} is {theirs.settings.get(name)}, not {value}"
        for name, value in ours.settings.items()
        if theirs.settings.get(name) != value
    ]
    names = [name for name in {**ours.config, **theirs.config} if ours.config.get(name) != theirs.config.get(name)]
    if names:
        more = f" and {len(names) - MOST_NAMED} more fields" if len(names) > MOST_NAMED else ""
        found.append(f"config.json differs in {', '.join(names[:MOST_NAMED])}{more}")
    for name in {**ours.weights, **theirs.weights}:
        if name not in theirs.weights:
            found.append(f"{name} is missing")
        elif name not in ours.weights:
            found.append(f"{name} is one too many")
        elif theirs.weights[name][0] != ours.weights[name][0]:
            found.append(f"{name} has {theirs.weights[name][0]} bytes, not {ours.weights[name][0]}")
        elif theirs.weights[name] != ours.weights[name]:
            found.append(f"{name} holds other weights")
    return found


async def show(frames: FrameStream, fingerprint: Fingerprint) -> None:
    """The side of a rank. Raises Different if the server will not have it, or what the frames raise."""
    await _send(frames, msgspec.msgpack.encode(fingerprint))
    refusal = (await frames.receive()).decode(errors="replace")
    if refusal:
        raise Different(refusal)


async def examine(frames: FrameStream, rank: int, ours: Fingerprint) -> None:
    """The server's side: tell a rank whether it matches. Raises Different if not, NotTrusted, or what frames raise."""
    try:
        theirs = msgspec.msgpack.decode(await frames.receive(), type=Fingerprint)
    except msgspec.DecodeError as error:
        raise NotTrusted(f"rank {rank} does not say what it serves: {error}") from None
    found = differences(theirs, ours)
    refusal = ""
    if found:
        more = f"; and {len(found) - MOST_NAMED} more" if len(found) > MOST_NAMED else ""
        refusal = f"rank {rank} does not match rank 0: {'; '.join(found[:MOST_NAMED])}{more}"
    await _send(frames, refusal.encode())
    if refusal:
        raise Different(refusal)


async def _send(frames: FrameStream, body: bytes) -> None:
    await frames.send(HEADER.pack(len(body)) + body)
