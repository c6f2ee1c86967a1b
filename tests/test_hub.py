"""Where models come from. The hub is a small one, on loopback, behind the real client library."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from fdserve import hub
from fdserve.errors import StartupError
from fdserve.hub import resolve_model

ROOT = Path(__file__).parents[1]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b"{}",
    "tokenizer.model": b"tokens",
    "chat_template.jinja": b"{{ messages }}",
    "model.safetensors": b"weights",
    "model_state.pdparams": b"pickled",
    "pytorch_model.bin": b"pickled",
    "modeling.py": b"raise SystemExit",
    "onnx/model.safetensors": b"other weights",
    "README.md": b"Hello",
}


def sha1(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's protocol as a download takes, for the repository "owner/model"."""

    requests: list[str]

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, *, with_body: bool) -> None:
        self.requests.append(f"{self.command} {self.path}")
        headers: dict[str, str] = {}
        status, body = 404, b'{"error": "Repository not found"}'
        if self.path.startswith("/api/models/owner/model/revision/"):
            siblings = [{"rfilename": name} for name in FILES]
            status, body = 200, json.dumps({"id": "owner/model", "sha": COMMIT, "siblings": siblings}).encode()
        elif self.path.startswith("/api/models/owner/model/tree/"):
            tree = [{"type": "file", "path": n, "size": len(c), "oid": sha1(c)} for n, c in FILES.items()]
            status, body = 200, json.dumps(tree).encode()
        elif self.path.startswith(f"/owner/model/resolve/{COMMIT}/"):
            status, body = 200, FILES[self.path.split(COMMIT + "/")[1]]
            headers = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Repo-Commit": COMMIT}
        elif self.path.startswith("/api/models/owner/gated/"):
            status, headers = 403, {"X-Error-Code": "GatedRepo"}
        else:
            headers = {"X-Error-Code": "RepoNotFound"}
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def endpoint() -> Iterator[str]:
    Hub.requests = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def resolve(name: str, home: Path, **environ: str) -> Path | str:
    """`resolve_model` in a process of its own, since the library reads its settings at import; a str is an error."""
    code = (
        "import sys; from fdserve.hub import resolve_model; from fdserve.errors import StartupError\n"
        "try: print(resolve_model(sys.argv[1]))\n"
        "except StartupError as error: sys.exit('error: ' + str(error))"
    )
    clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()}
    environment = {**clean, "PYTHONPATH": str(ROOT), "HF_HOME": str(home), **environ}
    done = subprocess.run(
        [sys.executable, "-c", code, name], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    if done.returncode:
        error = done.stderr.strip().splitlines()[-1]
        assert error.startswith("error: "), done.stderr
        return error
    return Path(done.stdout.strip().splitlines()[-1])


def test_a_download_and_then_the_cache(tmp_path: Path, endpoint: str) -> None:
    directory = resolve("owner/model", tmp_path, HF_ENDPOINT=endpoint)
    assert isinstance(directory, Path), directory
    names = {str(path.relative_to(directory)) for path in directory.rglob("*") if not path.is_dir()}
    assert names == {"config.json", "tokenizer.model", "chat_template.jinja", "model.safetensors"}
    assert (directory / "model.safetensors").read_bytes() == b"weights"
    assert not any("pdparams" in request or ".bin" in request or ".py" in request for request in Hub.requests)

    Hub.requests.clear()
    assert resolve("owner/model", tmp_path, HF_ENDPOINT=endpoint) == directory
    assert resolve("owner/model", tmp_path, HF_ENDPOINT=endpoint, HF_HUB_OFFLINE="1") == directory
    assert not Hub.requests

    # A download that was cut short is completed.
    (directory / "model.safetensors").unlink()
    assert resolve("owner/model", tmp_path, HF_ENDPOINT=endpoint) == directory
    assert (directory / "model.safetensors").is_file()


def test_what_the_hub_refuses(tmp_path: Path, endpoint: str) -> None:
    error = resolve("owner/nothing", tmp_path, HF_ENDPOINT=endpoint)
    assert "--model owner/nothing: the hub has no such repository, or it is private" in str(error)
    error = resolve("owner/gated", tmp_path, HF_ENDPOINT=endpoint)
    assert "--model owner/gated: its owner grants access to it" in str(error)


@pytest.mark.parametrize("environ", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}])
def test_no_hub(tmp_path: Path, environ: dict[str, str]) -> None:
    error = resolve("owner/model", tmp_path, **environ)
    assert "--model owner/model: it is not in the cache and the hub cannot be reached" in str(error)


def test_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_model(str(tmp_path)) == tmp_path
    (tmp_path / "owner" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_model("owner/model") == Path("owner/model")


def test_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "DEMO", tmp_path)
    assert resolve_model("") == tmp_path
    monkeypatch.setattr(hub, "DEMO", tmp_path / "missing")
    with pytest.raises(StartupError, match="bundled demo checkpoint is missing"):
        resolve_model("")


@pytest.mark.parametrize("name", ["/no/where", "./here", "~/x", "../x", "~nobody/x", "~no one/x"])
def test_no_such_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(StartupError) as error:
        resolve_model(name)
    assert str(error.value) == f"--model {name}: there is no such directory."


@pytest.mark.parametrize("name", ["one", "a/b/c", "owner/", "https://hub.co/a/b"])
def test_neither_a_directory_nor_a_hub_name(name: str) -> None:
    problem = "there is no such directory, and it is no hub name such as baidu/ERNIE-4.5-0.3B-Paddle."
    with pytest.raises(StartupError, match=re.escape(f"--model {name}: {problem}")):
        resolve_model(name)


def test_a_user_without_a_home_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "~/.cache/huggingface/hub")
    monkeypatch.setattr(Path, "expanduser", no_home)
    with pytest.raises(StartupError, match="owner/model: there is no home directory for the hub's cache: set HF_HOME"):
        resolve_model("owner/model")


def test_a_name_that_the_system_refuses() -> None:
    with pytest.raises(StartupError, match=r"^--model a{200}: File name too long\.$"):
        resolve_model("a" * 5000)


def test_a_name_that_no_repository_can_have() -> None:
    with pytest.raises(StartupError, match="is neither a directory nor a repository's name"):
        resolve_model("owner/bad name!")


def test_a_file(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    with pytest.raises(StartupError, match="give the directory"):
        resolve_model(str(file))


@pytest.mark.parametrize(
    ("files", "complete"),
    [
        (["config.json", "tokenizer.json", "model.safetensors"], True),
        (["config.json", "spm.model", "model.safetensors"], True),
        (["config.json", "tokenizer.json"], False),
        (["config.json", "model.safetensors"], False),
        (["tokenizer.json", "model.safetensors"], False),
        (["config.json", "tokenizer.json", "index:a,b", "a", "b"], True),
        (["config.json", "tokenizer.json", "index:a,b", "a"], False),
        (["config.json", "tokenizer.json", "index:broken"], False),
        (["config.json", "tokenizer.json", "index:broken", "model.safetensors"], True),
        (["config.json", "tokenizer.json", "index:a,b", "a", "model.safetensors"], True),
    ],
)
def test_complete(tmp_path: Path, files: list[str], complete: bool) -> None:
    for name in files:
        if name.startswith("index:"):
            shards = name.removeprefix("index:").split(",")
            index = {"weight_map": {f"w{i}": shard for i, shard in enumerate(shards)}}
            content = "{" if shards == ["broken"] else json.dumps(index)
            (tmp_path / "model.safetensors.index.json").write_text(content)
        else:
            (tmp_path / name).write_bytes(b"")
    assert hub._complete(tmp_path) is complete
