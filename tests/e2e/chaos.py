"""A server whose ranks are killed, stopped and terminated at random moments, under load, and what must hold then.

    python -m tests.e2e.chaos --rounds 50 --ranks 2 --seed 1

Each round: streams that run and requests that wait for a place; a signal to a random rank at a random moment, at times
a second one while the ranks start again. Every request ends in time, whole or with a 503; no more are lost than ran;
/health says so and returns; what waited runs; the text is still the same. In every fifth round the server itself is
killed at a random moment. No process, zombie, shared memory or descriptor is left.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import signal
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from tests.executor.process_table import is_alive, open_files, process_tree, rank_pids, shared_memory
from tests.http.processes import ServerProcess, until

STEP_TIMEOUT = 2.0
MAX_NUM_SEQS = 2
RECOVERY_SECONDS = 40.0
SIGNALS = (signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM)
# A rank that is stopped while it loads is to be found out as soon as one that is stopped in a step.
START = f"""
import sys
from fdserve import launcher
from fdserve.engine import create
create.MIN_LOAD_TIMEOUT = {STEP_TIMEOUT} * 3
sys.exit(launcher.main())
"""


@dataclass
class Outcome:
    """How one request ended."""

    status: int
    text: str = ""
    lost: str = ""
    """What the error says, if it was lost."""


@dataclass
class Report:
    """What happened over the rounds."""

    rounds: int = 0
    server_kills: int = 0
    signals: dict[str, int] = field(default_factory=dict)
    whole: int = 0
    lost: int = 0
    longest_end: float = 0.0
    """From the signal to the end of the last request that was lost by it, in seconds."""
    longest_recovery: float = 0.0

    def __str__(self) -> str:
        return (
            f"{self.rounds} rounds, signals {self.signals}, server killed {self.server_kills} times; requests: "
            f"{self.whole} whole, {self.lost} lost; longest until told {self.longest_end:.2f} s, until ready again "
            f"{self.longest_recovery:.2f} s"
        )


class Chaos:
    """Rounds against one server after another; use as a context manager."""

    def __init__(self, ranks: int, seed: int) -> None:
        self.random = Random(seed)
        self.report = Report()
        self._ranks = ranks
        self._shared = shared_memory()
        self._server = self._start()
        self._text = self._ready_text()

    def __enter__(self) -> Chaos:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.__exit__()

    def run(self, rounds: int) -> Report:
        for number in range(1, rounds + 1):
            if number % 5 == 0:
                self.kill_the_server()
            else:
                self.lose_a_rank()
            self.report.rounds += 1
        return self.report

    # -- a round -------------------------------------------------------------------------------------------------

    def lose_a_rank(self) -> None:
        server, before = self._server, rank_pids(self._server.process.pid)
        assert len(before) == self._ranks
        descriptors = len(os.listdir(f"/proc/{server.process.pid}/fd"))
        load = [Load(server, stream=index % 3 != 2) for index in range(6)]
        until(lambda: server.running() == MAX_NUM_SEQS)
        time.sleep(self.random.uniform(0, 0.4))
        number = self._signal(self.random.choice(before))
        began = time.monotonic()
        signals = 1
        until(lambda: server.get("/health")[0] == 503, STEP_TIMEOUT + 5)
        reason = server.get("/health")[1].decode()
        assert "restarting after a failure" in reason, reason
        assert "longer than" in reason if number == signal.SIGSTOP else "killed by" in reason, reason
        if self.random.random() < 0.4:
            time.sleep(self.random.uniform(0, 3))
            fresh = [pid for pid in rank_pids(server.process.pid) if pid not in before]
            if fresh:
                victim = self.random.choice(fresh)
                self._signal(victim)
                signals += 1
                # It may have been ready, and stopped: only work shows that.
                load.append(Load(server, stream=False))
                until(lambda: not Path(f"/proc/{victim}").exists(), RECOVERY_SECONDS)
        self._wait_ready()
        self.report.longest_recovery = max(self.report.longest_recovery, time.monotonic() - began)
        outcomes = [each.outcome() for each in load]
        # The one that came after the second signal may have come while the ranks started.
        refused = [outcome for outcome in outcomes if outcome.lost.startswith("The server is not ready")]
        lost = [outcome for outcome in outcomes if outcome.lost and outcome not in refused]
        assert all(outcome.status in (200, 503) for outcome in outcomes), outcomes
        assert len(refused) < signals, outcomes
        assert 0 < len(lost) <= MAX_NUM_SEQS * signals, outcomes
        assert all(outcome.text == self._text for outcome in outcomes if not outcome.lost), "another text"
        if signals == 1:
            ended = max(each.ended for each in load if each.outcome().lost) - began
            self.report.longest_end = max(self.report.longest_end, ended)
            assert ended < 1.5 + (STEP_TIMEOUT if number == signal.SIGSTOP else 0), ended
        self._count(outcomes)
        assert all(not Path(f"/proc/{pid}").exists() for pid in before), "an old rank, or its zombie, is left"
        self._check_processes()
        assert self._ready_text() == self._text
        until(lambda: len(os.listdir(f"/proc/{server.process.pid}/fd")) <= descriptors)

    def kill_the_server(self) -> None:
        """While it serves, while it starts its ranks again, or while it starts."""
        server = self._server
        when = self.random.choice(["serving", "restarting", "starting"])
        load: list[Load] = []
        if when == "starting":
            server.__exit__()
            server = self._server = self._start()
        else:
            load = [Load(server, stream=index % 2 == 0) for index in range(4)]
            until(lambda: server.running() == MAX_NUM_SEQS)
        if when == "restarting":
            self._signal(self.random.choice(rank_pids(server.process.pid)))
        time.sleep(self.random.uniform(0, 3 if when != "serving" else 0.3))
        children = process_tree(server.process.pid)
        server.process.kill()
        server.process.wait(10)
        for each in load:
            each.outcome()
        until(lambda: not any(map(is_alive, children)), 5)
        server.__exit__()
        assert shared_memory() == self._shared
        self.report.server_kills += 1
        self._server = self._start()
        assert self._ready_text() == self._text

    # -- parts ---------------------------------------------------------------------------------------------------

    def _start(self) -> ServerProcess:
        settings = {
            "FDSERVE_TENSOR_PARALLEL_SIZE": str(self._ranks),
            "FDSERVE_STEP_TIMEOUT": str(STEP_TIMEOUT),
            "FDSERVE_MAX_NUM_SEQS": str(MAX_NUM_SEQS),
            "FDSERVE_KV_CACHE_MEMORY": "32M",
            "FDSERVE_PORT": "0",
            "FDSERVE_NUM_THREADS": "1",
        }
        return ServerProcess("-c", START, **settings).listening()

    def _signal(self, pid: int) -> signal.Signals:
        number = self.random.choice(SIGNALS)
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return number
        self.report.signals[number.name] = self.report.signals.get(number.name, 0) + 1
        return number

    def _wait_ready(self) -> None:
        until(lambda: self._server.get("/health")[0] == 200, RECOVERY_SECONDS)

    def _ready_text(self) -> str:
        self._wait_ready()
        outcome = Load(self._server, stream=False).outcome()
        assert outcome.status == 200
        return outcome.text

    def _check_processes(self) -> None:
        pid = self._server.process.pid
        assert len(rank_pids(pid)) == self._ranks
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        assert all(is_alive(int(child)) for child in children), "a zombie is left"
        assert not any("memfd" in link for link in open_files(pid))
        assert shared_memory() == self._shared

    def _count(self, outcomes: list[Outcome]) -> None:
        self.report.whole += sum(not outcome.lost for outcome in outcomes)
        self.report.lost += sum(bool(outcome.lost) for outcome in outcomes)


class Load:
    """One greedy completion, asked for in a thread of its own."""

    def __init__(self, server: ServerProcess, *, stream: bool) -> None:
        self.ended = 0.0
        self._server = server
        self._stream = stream
        self._outcome: Outcome | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def outcome(self) -> Outcome:
        """How it ended; waits for that."""
        self._thread.join(RECOVERY_SECONDS + 20)
        assert not self._thread.is_alive(), "a request never ended"
        assert self._outcome is not None
        return self._outcome

    def _run(self) -> None:
        try:
            self._outcome = self._ask()
        except (OSError, ValueError, http.client.HTTPException) as error:  # the server was killed
            self._outcome = Outcome(0, lost=repr(error))
        self.ended = time.monotonic()

    def _ask(self) -> Outcome:
        fields: dict[str, Any] = {"max_tokens": 400, "ignore_eos": True, "temperature": 0, "stream": self._stream}
        connection = self._server.connect()
        connection.timeout = RECOVERY_SECONDS + 10
        try:
            connection.request("POST", "/v1/completions", json.dumps({"prompt": "The sum of 12 and 3", **fields}))
            response = connection.getresponse()
            data = response.read()
        finally:
            connection.close()
        if response.status == 200 and self._stream:
            return streamed(data)
        answer = json.loads(data)
        if response.status == 200:
            return Outcome(200, answer["choices"][0]["text"])
        return Outcome(response.status, lost=answer["error"]["message"])


def streamed(data: bytes) -> Outcome:
    """The outcome of a stream, which ends with [DONE] also after an error."""
    *events, last = [event.removeprefix(b"data: ") for event in data.split(b"\n\n") if event.startswith(b"data: ")]
    if last != b"[DONE]":
        raise ValueError("the stream broke off")
    text = ""
    for event in map(json.loads, events):
        if error := event.get("error"):
            assert error["code"] == "unavailable", error
            return Outcome(503, text, error["message"])
        text += "".join(choice["text"] for choice in event["choices"])
    return Outcome(200, text)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with Chaos(options.ranks, options.seed) as chaos:
        try:
            chaos.run(options.rounds)
        finally:
            print(chaos.report)


if __name__ == "__main__":
    main()
