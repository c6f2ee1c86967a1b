"""Two hosts: network namespaces where they can be made, else two launches on the loopback address."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.executor.process_table import command, is_alive
from tests.http.processes import ROOT, until

CLIENT = """
import sys, urllib.error, urllib.request
request = urllib.request.Request(sys.argv[1], sys.argv[2].encode() or None)
try:
    print(urllib.request.urlopen(request, timeout=30).read().decode())
except urllib.error.HTTPError as error:
    print(error.read().decode())
except OSError:
    print("{}")
"""


@dataclass
class Host:
    """Where a host's commands run, and its address."""

    prefix: list[str]
    address: str


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, timeout=10, capture_output=True)


@pytest.fixture
def hosts() -> Iterator[list[Host]]:
    names = [f"fdserve-{os.getpid()}-{letter}" for letter in "ab"]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "eth0", "netns", names[0], "type", "veth", "peer", "name", "eth0", "netns", names[1])
        for number, name in enumerate(names, start=1):
            ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", "eth0")
            for link in ("eth0", "lo"):
                ip("-n", name, "link", "set", link, "up")
    except (OSError, subprocess.CalledProcessError):
        yield [Host([], "127.0.0.1")] * 2
    else:
        yield [Host(["ip", "netns", "exec", name], f"10.77.0.{n}") for n, name in enumerate(names, start=1)]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


class Launched:
    """The two launches; use as a context manager."""

    def __init__(self, hosts: list[Host], directory: Path) -> None:
        self._hosts = hosts
        program = directory / "fdserve"  # as the installed command is
        program.write_text(f'#!/bin/sh\nexec {sys.executable} -W ignore -m fdserve "$@"\n')
        program.chmod(0o755)
        environ = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{directory}:{os.environ['PATH']}"}
        environ["FDSERVE_CLUSTER_SECRET"] = "a secret of this cluster"
        self._launches = []
        for rank, host in enumerate(hosts):
            launch = [*host.prefix, sys.executable, "-m", "paddle.distributed.launch", "--nnodes", "2"]
            launch += ["--nproc_per_node", "1", "--master", f"{hosts[0].address}:8790", "--host", host.address]
            launch += ["--rank", str(rank), "--log_dir", str(directory / str(rank)), "-m", "fdserve"]
            launch += ["--port", "8189", "--kv-cache-memory", "32M", "--num-threads", "1"]
            log = (directory / f"{rank}.log").open("w")
            self._launches.append(subprocess.Popen(launch, env=environ, cwd=directory, stdout=log, stderr=log))

    def __enter__(self) -> Launched:
        return self

    def __exit__(self, *_: object) -> None:
        trees = [pid for launch in self._launches for pid in tree(launch.pid)]
        for launch in self._launches:
            launch.terminate()
        for launch in self._launches:
            launch.wait(30)
        for pid in trees:
            if is_alive(pid):
                os.kill(pid, signal.SIGKILL)
        until(lambda: not any(map(is_alive, trees)))

    def ask(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """The server's answer, from its own host; empty if there is none."""
        ask = [sys.executable, "-c", CLIENT, f"http://127.0.0.1:8189{path}", json.dumps(body) if body else ""]
        answer = subprocess.run([*self._hosts[0].prefix, *ask], check=True, timeout=60, capture_output=True)
        return dict(json.loads(answer.stdout))

    def is_ready(self) -> bool:
        time.sleep(0.5)  # to ask starts a process
        return self.ask("/health").get("status") == "ok"

    def rank_pid(self, rank: int) -> int:
        (pid,) = [pid for pid in tree(self._launches[rank].pid) if b"fdserve.worker" in command(pid)]
        return pid


def tree(pid: int) -> list[int]:
    """The process and all that come from it."""
    lists = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    return [pid, *(each for children in lists for child in children.split() for each in tree(int(child)))]


def test_ranks_on_two_hosts_serve_and_come_back(hosts: list[Host], tmp_path: Path) -> None:
    with Launched(hosts, tmp_path) as launched:
        until(launched.is_ready, 60)
        question = {"prompt": "The sum of 12 and 30 is", "max_tokens": 8, "temperature": 0}
        answer = launched.ask("/v1/completions", question)
        text = answer["choices"][0]["text"]
        assert text.strip()
        for seed in range(3):
            sampled = launched.ask("/v1/completions", {"prompt": "Hello", "seed": seed, "max_tokens": 5, "top_p": 0.9})
            assert sampled["usage"]["completion_tokens"] > 0
        lost = launched.rank_pid(1)
        os.kill(lost, signal.SIGKILL)
        until(lambda: not launched.is_ready(), 10)
        assert "was killed by SIGKILL" in launched.ask("/health")["error"]["message"]
        until(launched.is_ready, 60)
        assert not is_alive(lost)
        again = launched.ask("/v1/completions", question)
        assert again["choices"][0]["text"] == text
