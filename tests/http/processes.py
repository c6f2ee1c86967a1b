"""Servers in processes of their own, and a client that can leave, stall and go on."""

from __future__ import annotations

import http.client
import json
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
TIMEOUT = 20.0


class ServerProcess:
    """A server process, whose output is collected; use as a context manager."""

    def __init__(self, *command: str, **environ: str) -> None:
        environ = {**{k: v for k, v in os.environ.items() if not k.startswith("FDSERVE_")}, **environ}
        environ["PYTHONPATH"] = str(ROOT)
        self.process = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.output: list[str] = []
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.port = 0

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait(TIMEOUT)
        self._reader.join(TIMEOUT)
        assert self.process.stdout is not None
        self.process.stdout.close()

    def wait_line(self, pattern: str) -> re.Match[str]:
        """The first line from here on that matches."""
        deadline = time.monotonic() + TIMEOUT
        while (line := self._lines.get(timeout=max(0.01, deadline - time.monotonic()))) is not None:
            self.output.append(line)
            if match := re.search(pattern, line):
                return match
        raise AssertionError(f"no {pattern!r} in {self.output}")

    def listening(self) -> ServerProcess:
        """Wait until it says where it listens."""
        self.port = int(self.wait_line(r"http://127\.0\.0\.1:(\d+)")[1])
        return self

    def stop(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    def wait(self) -> int:
        """The exit status; all of the output is in `output` then."""
        status = self.process.wait(TIMEOUT)
        self._reader.join(TIMEOUT)
        while not self._lines.empty():
            if (line := self._lines.get()) is not None:
                self.output.append(line)
        return status

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT)

    def get(self, path: str) -> tuple[int, bytes]:
        connection = self.connect()
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def post(self, text: str | list[int], **fields: Any) -> tuple[int, bytes]:
        """A completion of the prompt `text`, or of these ids."""
        connection = self.connect()
        try:
            connection.request("POST", "/v1/completions", body(text, **fields))
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def open(self, text: str, *, small_buffers: bool = False, **fields: Any) -> socket.socket:
        """A completion asked for on a raw socket; nothing is read."""
        sock = socket.socket()
        sock.settimeout(TIMEOUT)
        if small_buffers:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", self.port))
        content = body(text, **fields)
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n"
        sock.sendall(head.encode() + content)
        return sock

    def running(self) -> int:
        """How many sequences the engine holds."""
        return self._metric(b"fdserve_requests_running")

    def prompt_tokens(self) -> int:
        """Of all sequences that the engine ever held."""
        return self._metric(b"fdserve_prompt_tokens_total")

    def _metric(self, name: bytes) -> int:
        match = re.search(rb"^%s (\d+)" % name, self.get("/metrics")[1], re.MULTILINE)
        assert match
        return int(match[1])

    def memory(self) -> int:
        """Bytes resident."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        match = re.search(r"VmRSS:\s+(\d+) kB", status)
        assert match
        return int(match[1]) << 10


def body(text: str | list[int], **fields: Any) -> bytes:
    return json.dumps({"prompt": text, "max_tokens": 50_000, **fields}).encode()


def until(condition: Callable[[], bool], seconds: float = TIMEOUT) -> float:
    """Wait until it holds; return how long that took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, "it never became true"
        time.sleep(0.01)
    return time.monotonic() - began


def read_until(sock: socket.socket, mark: bytes) -> bytes:
    """What comes up to the mark and with it."""
    data = bytearray()
    searched = 0  # of what comes in many pieces each is looked at once
    while data.find(mark, max(0, searched - len(mark))) < 0:
        searched = len(data)
        part = sock.recv(1 << 16)
        assert part, f"the connection ended before {mark!r}"
        data += part
    return bytes(data)
