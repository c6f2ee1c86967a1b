"""The launcher: starts, failures, and ends."""

from __future__ import annotations

import signal
import socket
import sys
import time

import h2.config
import h2.connection
import pytest

from tests.http.processes import ServerProcess, read_until, until

FAKE = ["-m", "tests.http.fake_main", "--port", "0"]


def test_start_and_stop() -> None:
    with ServerProcess(*FAKE, "--served-model-name", "mine") as server:
        server.listening()
        server.wait_line(r"ready in [\d.]+ s: mine, 100000 tokens at most")
        assert server.get("/health") == (200, b'{"status":"ok"}')
        status, content = server.post("Hi")
        assert status == 200
        assert b"Hello, world!" in content
        server.stop()
        assert server.wait() == 0
        assert "Traceback" not in "".join(server.output)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_running_requests_finish(number: signal.Signals) -> None:
    with ServerProcess(*FAKE) as server:
        server.listening().wait_line("ready")
        sock = server.open("slow", stream=True)
        read_until(sock, b'"text":"0')
        server.stop(number)
        server.wait_line("stopping: 1 to finish, for up to 30 s")
        status, content = server.get("/health")
        assert status == 503
        assert b"shutting down" in content
        assert server.post("Hi")[0] == 503
        data = read_until(sock, b"data: [DONE]\n\n")
        assert b'"finish_reason":"stop"' in data
        assert b"error" not in data
        sock.close()
        assert server.wait() == 0


def test_requests_that_take_too_long_are_told() -> None:
    with ServerProcess(*FAKE, "--graceful-timeout", "0.3") as server:
        server.listening().wait_line("ready")
        stream = server.open("endless", stream=True)
        whole = server.open("silent")
        read_until(stream, b'"text":"x')
        until(lambda: server.running() == 2)
        server.stop()
        assert b"the server is shutting down" in read_until(stream, b"data: [DONE]\n\n")
        assert b" 503 " in read_until(whole, b"the server is shutting down")
        for sock in (stream, whole):
            sock.close()
        assert server.wait() == 0


def test_a_client_that_does_not_read_holds_up_no_stop() -> None:
    with ServerProcess(*FAKE, "--graceful-timeout", "0.2", FAKE_FORCE_AFTER="1") as server:
        server.listening().wait_line("ready")
        sock = server.open("flood", stream=True, small_buffers=True)
        until(lambda: server.prompt_tokens() > 0)
        time.sleep(0.5)
        server.stop()
        began = time.monotonic()
        assert server.wait() == 0
        assert time.monotonic() - began < 3.5
        sock.close()


def test_a_body_that_does_not_come_holds_up_no_stop() -> None:
    with ServerProcess(*FAKE) as server:
        server.listening().wait_line("ready")
        with socket.create_connection(("127.0.0.1", server.port)) as sock:
            sock.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
            until(lambda: server.get("/health")[0] == 200)  # it has come, too
            began = time.monotonic()
            server.stop()
            head, _, body = read_until(sock, b"}}").partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 503 ")
            assert b"connection: close" in head
            assert b'"message":"The server is shutting down."' in body
            assert server.wait() == 0
        assert time.monotonic() - began < 10  # and not graceful_timeout


def test_a_body_that_comes_at_a_stop_is_answered() -> None:
    with ServerProcess(*FAKE) as server:
        server.listening().wait_line("ready")
        with socket.create_connection(("127.0.0.1", server.port)) as sock:
            sock.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 40\r\n\r\n")
            until(lambda: server.get("/health")[0] == 200)
            server.stop()
            server.wait_line("stopping")
            time.sleep(0.2)
            sock.sendall(b" " * 40)
            head = read_until(sock, b"}}").partition(b"\r\n\r\n")[0]
            assert head.startswith(b"HTTP/1.1 503 ")
            assert b"connection: close" in head
            assert server.wait() == 0


def test_a_second_signal_ends_at_once() -> None:
    with ServerProcess(*FAKE) as server:
        server.listening().wait_line("ready")
        sock = server.open("silent")
        until(lambda: server.running() == 1)
        server.stop()
        server.wait_line("stopping")
        server.stop()
        assert server.wait() == 128 + signal.SIGTERM
        sock.close()


def test_a_hangup_is_no_second_signal() -> None:
    with ServerProcess(*FAKE) as server:
        server.listening().wait_line("ready")
        sock = server.open("slow", stream=True)
        read_until(sock, b'"text":"0')
        server.stop()
        server.wait_line("stopping")
        for _ in range(2):
            server.stop(signal.SIGHUP)
            time.sleep(0.1)
        assert b'"finish_reason":"stop"' in read_until(sock, b"data: [DONE]\n\n")
        sock.close()
        assert server.wait() == 0


def test_a_hangup_that_is_ignored_stays_ignored() -> None:
    command = [sys.executable, *FAKE]
    nohup = f"import os, signal; signal.signal(signal.SIGHUP, signal.SIG_IGN); os.execv({command[0]!r}, {command!r})"
    with ServerProcess("-c", nohup) as server:
        server.listening().wait_line("ready")
        server.stop(signal.SIGHUP)
        time.sleep(0.2)
        assert server.get("/health")[0] == 200
        server.stop()
        assert server.wait() == 0


def test_announcements_that_cannot_be_written_end_nothing() -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    command = [sys.executable, "-m", "tests.http.fake_main", "--port", str(port)]
    full = f"import os; os.dup2(os.open('/dev/full', os.O_WRONLY), 1); os.execv({command[0]!r}, {command!r})"
    with ServerProcess("-c", full) as server:
        server.port = port
        until(lambda: is_up(server))
        sock = server.open("slow", stream=True)
        read_until(sock, b'"text":"0')
        server.stop()
        assert b'"finish_reason":"stop"' in read_until(sock, b"[DONE]")
        assert server.wait() == 0


def test_a_name_that_stdout_has_no_characters_for_ends_nothing() -> None:
    with ServerProcess(*FAKE, "--served-model-name", "modèle", PYTHONIOENCODING="ascii", PYTHONUTF8="1") as server:
        server.listening().wait_line(r"ready in .*: mod\\xe8le")


def is_up(server: ServerProcess) -> bool:
    try:
        return server.get("/health")[0] == 200
    except OSError:
        return False


def test_a_stop_while_loading() -> None:
    with ServerProcess(*FAKE, FAKE_FAILURE="loading") as server:
        server.listening()
        assert server.get("/health")[0] == 503
        server.stop()
        assert server.wait() == 0


@pytest.mark.parametrize(("where", "sentence"), [("startup", "fake start failed."), ("engine", "fake rank failed.")])
def test_a_failed_start(where: str, sentence: str) -> None:
    with ServerProcess(*FAKE, FAKE_FAILURE=where) as server:
        assert server.wait() == 1
        output = "".join(server.output)
        assert output.count(sentence) == 1
        assert "Traceback" not in output


def test_an_address_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with ServerProcess("-m", "tests.http.fake_main", "--port", str(port)) as server:
            assert server.wait() == 1
            assert server.output == [
                f"fdserve: cannot listen on 127.0.0.1 port {port}: Address already in use; "
                "choose another --host or --port.\n"
            ]


@pytest.mark.parametrize(
    ("arguments", "status", "output"),
    [
        (["--prot", "1"], 1, "fdserve: the flag --prot is unknown: did you mean --port?\n"),
        (["--host", "999.0.0.1"], 1, "; choose another --host or --port.\n"),
        (["--host", "a..b"], 1, "fdserve: cannot listen on a..b: it is no host's name; choose another --host.\n"),
        (["--version"], 0, "fdserve "),
        (["--port", "0", "--model", "/no/where"], 1, "there is no such directory.\n"),
    ],
)
def test_python_m_fdserve(arguments: list[str], status: int, output: str) -> None:
    with ServerProcess("-m", "fdserve", *arguments) as server:
        assert server.wait() == status
        assert output in "".join(server.output)
        assert len(server.output) == 1


def test_ipv6() -> None:
    with ServerProcess(*FAKE, "--host", "::1") as server:
        match = server.wait_line(r"http://\[::1\]:(\d+)")
        server.wait_line("ready")
        with socket.create_connection(("::1", int(match[1])), timeout=10) as sock:
            sock.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert b" 200 " in read_until(sock, b"\r\n\r\n")


@pytest.mark.parametrize("delay", [0.05, 0.1, 0.2, 0.3])
def test_an_early_interrupt_leaves_no_traceback(delay: float) -> None:
    # Before the interpreter has come to the program there is nothing that it could do.
    code = "import runpy; print('begun', flush=True); runpy.run_module('fdserve', run_name='__main__')"
    with ServerProcess("-c", code, FDSERVE_PORT="0") as server:
        server.wait_line("begun")
        time.sleep(delay)
        server.stop(signal.SIGINT)
        status = server.wait()
        output = "".join(server.output)
        assert status in (-signal.SIGINT, 128 + signal.SIGINT, 0)
        assert "Traceback" not in output


def test_hypercorns_messages_are_logged_once() -> None:
    with ServerProcess("-m", "hypercorn", "-w", "0", "-b", "127.0.0.1:0", "tests.http.fake_main:app") as server:
        server.listening()
        server.stop()
        server.wait()
        assert sum("Running on" in line for line in server.output) == 1


def test_no_library_logs_keys() -> None:
    """That of HTTP/2 tells all headers at the level debug."""
    client = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
    client.initiate_connection()
    headers = [(":method", "GET"), (":path", "/v1/models"), (":scheme", "http"), (":authority", "x")]
    client.send_headers(1, [*headers, ("authorization", "Bearer my-secret")], end_stream=True)
    with ServerProcess(*FAKE, "--log-level", "debug", "--api-key", "my-secret") as server:
        server.listening().wait_line("ready")
        with socket.create_connection(("127.0.0.1", server.port), 10) as sock:
            sock.sendall(client.data_to_send())
            server.wait_line("GET /v1/models 200")
        server.stop()
        server.wait()
        assert "my-secret" not in "".join(server.output)
