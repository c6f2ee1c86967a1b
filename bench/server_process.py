"""A server in a process of its own, started and stopped by a benchmark."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bench import server_metrics

ROOT = Path(__file__).parent.parent
STOP_SECONDS = 20.0


def free_port() -> int:
    """A port on which nobody listens now."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
        return port


class ServerProcess:
    """`python ARGUMENTS…` from the checkout; use as a context manager, which ends it.

    `began` is `time.perf_counter()` just before it was started. Its output is `lines`, each with the time it came.
    """

    def __init__(self, arguments: Sequence[str], port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        environ = {name: value for name, value in os.environ.items() if not name.startswith("FDSERVE_")}
        paths = [str(ROOT), *filter(None, [environ.get("PYTHONPATH")])]
        # Lines are to come as they are written, or their times would say nothing.
        environ |= {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
        self.began = time.perf_counter()
        self._process = subprocess.Popen(
            [sys.executable, *arguments], env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        assert self._process.stdout is not None
        os.set_blocking(self._process.stdout.fileno(), False)
        self.lines: list[tuple[float, str]] = []
        self._rest = b""

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def wait_healthy(self, timeout: float = 600.0) -> float:
        """Wait until GET /health answers 200, and return when it did. RuntimeError if the server ends, or time does."""
        while time.perf_counter() - self.began < timeout:
            self.read_lines()
            if self._process.poll() is not None:
                raise RuntimeError(f"the server ended with status {self._process.returncode}:\n{self.output()}")
            try:
                server_metrics.get(f"{self.url}/health")
            except OSError:
                time.sleep(0.02)
            else:
                now = time.perf_counter()
                self.read_lines()
                return now
        raise RuntimeError(f"the server was not healthy after {timeout:g} s:\n{self.output()}")

    def read_lines(self) -> None:
        """Take what it wrote by now. A server must not wait for someone to read its output for long."""
        assert self._process.stdout is not None
        while data := self._process.stdout.read():
            now = time.perf_counter()
            *lines, self._rest = (self._rest + data).split(b"\n")
            self.lines += [(now, line.decode(errors="replace")) for line in lines]

    def output(self) -> str:
        """The last lines of what it wrote."""
        self.read_lines()
        return "\n".join(line for _, line in self.lines[-20:])

    def cpu_seconds(self) -> float:
        """Processor time that the process has taken, without those it started."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory(self) -> dict[str, int]:
        """Bytes of the process ("api") and of each process it started ("rank 0" and so on): resident, of its own
        ("private") and at most ever ("peak"), as name and kind with a blank between them."""
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        names = {"api": str(self._process.pid)} | {f"rank {i}": pid for i, pid in enumerate(children)}
        found = {}
        for name, pid in names.items():
            status = Path(f"/proc/{pid}/status").read_text()
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
            found[f"{name} resident"] = _kilobytes(status, "VmRSS")
            found[f"{name} private"] = _kilobytes(rollup, "Private_Dirty") + _kilobytes(rollup, "Private_Clean")
            found[f"{name} peak"] = _kilobytes(status, "VmHWM")
        return found


def _kilobytes(text: str, name: str) -> int:
    match = re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)
    return int(match[1]) << 10 if match else 0
