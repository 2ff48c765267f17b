"""Making a model with `ollama`: whether the command is there, what it says, and what its server reads.

No real Ollama is run here: the command and the server are stand-ins that only decide what is present and what fails.
"""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

from export.ollama import server as ollama_server
from export.package import Export
from suite.chat import Chat
from suite.errors import SuiteError
from suite.stages import Artifact
from tests.tiny.export_jobs import run
from tests.tiny.tiny_models import tiny_tokenizer

COMMAND = """#!/bin/sh
echo "$PWD: $*" >> "{log}"
case "$1" in
list) {list} ;;
show) {show} ;;
create) {create} ;;
esac
"""


class Server:
    """Answers /api/chat with `tokens` prompt tokens, and keeps what it was asked."""

    def __init__(self, tokens: int | None, status: int = 200) -> None:
        self.asked: list[dict[str, object]] = []
        reply = {"message": {"role": "assistant", "content": "Q."}, **({"prompt_eval_count": tokens} if tokens else {})}
        asked = self.asked

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(status if self.path == "/api/chat" else 404)
                self.end_headers()
                self.wfile.write(json.dumps(reply if status == 200 else {"error": "out of memory"}).encode())

            def log_message(self, *_: object) -> None:
                """Says nothing."""

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """Puts an `ollama` on the path that behaves as told, and a server behind it."""
    started: list[Server] = []
    (tmp_path / "package").mkdir()

    def put(tokens: int | None = 7, status: int = 200, **what: str) -> tuple[Path, Server]:
        log = tmp_path / "log"
        behaviour = {"list": "exit 0", "show": "exit 1", "create": "exit 0", **what}
        command = tmp_path / "bin" / "ollama"
        command.parent.mkdir()
        command.write_text(COMMAND.format(log=log, **behaviour), "utf-8")
        command.chmod(0o755)
        started.append(Server(tokens, status))
        monkeypatch.setenv("PATH", f"{command.parent}:/usr/bin:/bin")
        monkeypatch.setenv("OLLAMA_HOST", f"http://127.0.0.1:{started[-1].server.server_port}")
        return log, started[-1]

    yield put
    for server in started:
        server.server.shutdown()
        server.server.server_close()


def test_without_ollama_the_export_succeeds_and_says_what_to_type(tmp_path: Path, install: object) -> None:
    stage = Export(model="m", to="ollama", create=True, name="tiny").followers()["create"][1]
    package = tmp_path / "a folder"
    package.mkdir()
    (package / "Modelfile").write_text("FROM ./model.gguf\n")
    events: list[dict[str, Any]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(tmp_path))
        before = stage.recipe()
        found = run(stage, tmp_path / "out", events, package=Artifact(package, "package"))
    assert [found["typed"] in event["text"] for event in events if event["event"] == "warn"] == [True]
    log, _ = install()  # type: ignore[operator]
    assert stage.recipe() != before  # with a command, it is made
    subprocess.run(["sh", "-c", found["typed"]], check=True)
    assert log.read_text().splitlines() == [f"{package}: create tiny -f Modelfile", f"{package}: run tiny Who are you?"]


def test_an_export_is_followed_by_making_its_model(tmp_path: Path, install: object) -> None:
    log, _ = install()  # type: ignore[operator]
    field, stage = Export(model="m", to="ollama", create=True).followers()["create"]
    package = tmp_path / "package"
    with pytest.raises(SuiteError, match="no Modelfile"):
        stage.check({field: [Artifact(package, "package")]})
    (package / "Modelfile").write_text("FROM ./model.gguf\n")
    (package / "artifact.json").write_text(json.dumps({"metrics": {"name": "tiny", "prompt_tokens": 7}}))
    metrics = run(stage, tmp_path / "out", package=Artifact(package, "package"))
    assert metrics == json.loads((tmp_path / "out" / "receipt.json").read_text())
    assert (metrics["name"], metrics["prompt_tokens"]) == ("tiny", 7)
    assert "create tiny -f Modelfile" in log.read_text()


def test_the_model_is_made_and_asked(tmp_path: Path, install: object) -> None:
    log, server = install()  # type: ignore[operator]
    said: list[str] = []
    made = ollama_server.create(tmp_path / "package", "tiny", said.append, expected_tokens=7)
    assert made == {"name": "tiny", "question": "Who are you?", "answer": "Q.", "prompt_tokens": 7}
    package = tmp_path / "package"
    assert log.read_text().splitlines() == [
        f"{package}: list",
        f"{Path.cwd()}: show tiny",
        f"{package}: create tiny -f Modelfile",
    ]
    assert server.asked[0]["messages"] == [{"role": "user", "content": "Who are you?"}]
    assert server.asked[0]["think"] is False
    assert any("'Q.'" in line for line in said)


@pytest.mark.parametrize(
    ("behaviour", "expected", "said"),
    [
        ({"list": "echo 'could not connect' >&2; exit 1"}, 7, "server does not answer: could not connect"),
        ({"show": "exit 0"}, 7, "has a model named tiny"),
        ({"create": "echo 'Error: unknown type' >&2; exit 1"}, 7, "create tiny failed: Error: unknown type"),
        ({}, 9, "reads 7 tokens .* gives 9"),
        ({"status": 500}, 7, "out of memory"),
    ],
)
def test_what_goes_wrong_is_said(
    tmp_path: Path, install: object, behaviour: dict[str, str], expected: int, said: str
) -> None:
    log, _ = install(**behaviour)  # type: ignore[operator]
    with pytest.raises(SuiteError, match=said):
        ollama_server.create(tmp_path / "package", "tiny", lambda _: None, expected)
    if "show" in behaviour:
        assert "create" not in log.read_text()  # nothing is overwritten


def test_no_server_is_an_error(tmp_path: Path, install: object, monkeypatch: pytest.MonkeyPatch) -> None:
    install()  # type: ignore[operator]
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:9")
    with pytest.raises(SuiteError, match="did not answer the question"):
        ollama_server.create(tmp_path / "package", "tiny", lambda _: None)


def test_a_server_that_counts_nothing_is_believed(tmp_path: Path, install: object) -> None:
    install(tokens=None)  # type: ignore[operator]
    assert ollama_server.create(tmp_path / "package", "tiny", lambda _: None, 9)["prompt_tokens"] is None


def test_the_tokens_that_an_engine_reads() -> None:
    chat = Chat(tiny_tokenizer())
    asked = ollama_server.ASKED
    assert ollama_server.prompt_tokens(chat) == len(chat.ids(asked, generate=True))
    before = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    merged = [before[0], {"role": "user", "content": "Hi\n\nWho are you?"}]
    assert ollama_server.prompt_tokens(chat, before) == len(chat.ids(merged, generate=True))


def test_a_bos_that_only_the_tokenizer_adds_is_counted() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = "<|endoftext|>"
    plain = ollama_server.prompt_tokens(Chat(tokenizer))
    adding = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = adding
    assert ollama_server.prompt_tokens(Chat(tokenizer)) == plain + 1
