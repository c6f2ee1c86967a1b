"""What the bytes of an HTTP/1.1 response say: its head, its body, and the server-sent events in it with their times."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

LAST_CHUNK = b"\r\n0\r\n\r\n"
"""What a chunked body ends with, the line's end before it included. (Trailers, which nobody sends, are not known.)"""


@dataclass(frozen=True)
class Head:
    """A response's first lines. `size` is in bytes, the empty line included."""

    status: int
    size: int
    chunked: bool
    length: int | None
    """Of the body; None where it is chunked, or goes on until the connection is closed."""
    keep_alive: bool


def parse_head(data: bytes) -> Head | None:
    """The head at the beginning of `data`, None while it is incomplete. ValueError if this is not HTTP."""
    if not b"HTTP/1".startswith(data[:6]):
        raise ValueError(f"the server does not speak HTTP/1.1: {data[:40]!r}")
    end = data.find(b"\r\n\r\n")
    if end < 0:
        return None
    first, *lines = data[:end].decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    version, status = first.split(" ")[:2]
    chunked = "chunked" in headers.get("transfer-encoding", "").lower()
    length = headers.get("content-length")
    return Head(
        status=int(status),
        size=end + 4,
        chunked=chunked,
        length=None if chunked or length is None else int(length),
        keep_alive=version == "HTTP/1.1" and headers.get("connection", "").lower() != "close",
    )


@dataclass(frozen=True)
class Response:
    """A whole response. `body` is without the chunks' sizes; `spans` tells where its pieces were in the raw bytes."""

    status: int
    body: bytes
    spans: list[tuple[int, int]]
    """(end in `body`, end in the raw bytes) of each piece, ascending"""

    def raw_offset(self, offset: int) -> int:
        """Where the byte before `offset` of the body ends in the raw bytes."""
        body_end, raw_end = self.spans[bisect_left(self.spans, (offset, 0))]
        return raw_end - (body_end - offset)


def parse_response(data: bytes) -> Response:
    """The response that `data` holds, as far as it came. ValueError if not even the head did, or it is not HTTP."""
    head = parse_head(data)
    if head is None:
        raise ValueError("the answer ended within its head")
    if not head.chunked:
        end = len(data) if head.length is None else min(len(data), head.size + head.length)
        return Response(head.status, data[head.size : end], [(end - head.size, end)])
    pieces, spans = [], []
    at, size = head.size, 0
    while (line_end := data.find(b"\r\n", at)) >= 0:
        count = int(data[at:line_end].partition(b";")[0], 16)
        if count == 0:
            break
        piece = data[line_end + 2 : line_end + 2 + count]
        size += len(piece)
        pieces.append(piece)
        spans.append((size, line_end + 2 + len(piece)))
        at = line_end + 2 + count + 2
    return Response(head.status, b"".join(pieces), spans)


_DATA = re.compile(rb"^data: ?(.*?)\r?\n", re.MULTILINE)


def timed_events(response: Response, times: Sequence[float], sizes: Sequence[int]) -> Iterator[tuple[float, bytes]]:
    """(when it was complete, its data) of each server-sent event; events of several lines are taken line by line.

    `times` and `sizes` are of the pieces received, in order.
    """
    ends = list(accumulate(sizes))
    for match in _DATA.finditer(response.body):
        yield times[bisect_left(ends, response.raw_offset(match.end()))], match[1]
