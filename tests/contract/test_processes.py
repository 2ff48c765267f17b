"""A server never outlives the process that started it, and says why it cannot start."""

from __future__ import annotations

import json
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from serve.backends import endpoint
from serve.command import serve
from serve.settings import Settings
from suite.errors import SuiteError
from suite.processes import importing
from tests.contract.conftest import Served
from tests.contract.suite_server import suite_serve
from tests.namesakes import namesakes
from tests.tiny.tiny_models import tiny_model

ROOT = Path(__file__).parents[2]
HOLD = """
import sys, time
from pathlib import Path
{imports}
from serve.backends import endpoint
from serve.command import serve
from serve.settings import Settings
with endpoint(Path(sys.argv[1])) as running:
    print(running.url, flush=True)
    time.sleep(600)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("processes") / "base")


def until(condition: Callable[[], bool], seconds: float = 20) -> bool:
    deadline = time.monotonic() + seconds
    while not (done := condition()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return done


def refuses(url: str) -> bool:
    host, port = url.removeprefix("http://").split(":")
    with socket.socket() as sock:
        return sock.connect_ex((host, int(port))) != 0


@pytest.mark.parametrize("imports", ["", "import torch, transformers"], ids=["spawned", "forked"])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_the_server_dies_with_its_parent(folder: Path, imports: str, how: signal.Signals, tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-c", HOLD.format(imports=imports), str(folder)]
    here = namesakes(tmp_path / "here")
    parent = subprocess.Popen(command, cwd=here, env=importing(), stdout=subprocess.PIPE, text=True)
    try:
        assert parent.stdout is not None
        url = parent.stdout.readline().strip()
        assert httpx.get(f"{url}/ready").status_code == 200
        parent.send_signal(how)
        parent.wait(30)
        assert until(lambda: refuses(url))
    finally:
        parent.kill()
        parent.wait()
        assert parent.stdout is not None
        parent.stdout.close()


def test_the_block_takes_the_server_down(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), endpoint(folder, log=tmp_path / "log") as running:
        raise ZeroDivisionError
    assert refuses(running.url)


def test_why_it_cannot_start_is_the_error(folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in folder.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "model_type": "no-such-type", "architectures": None}))
    with pytest.raises(SuiteError, match="no-such-type"), endpoint(broken):
        pass


SLOW = """#!{python}
import http.server, os, signal, sys, time
from pathlib import Path
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
def end(*_):
    time.sleep(1)
    os._exit(0)
signal.signal(signal.SIGTERM, end)
Path({pid!r}).write_text(str(os.getpid()))
http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


def test_an_engine_that_ends_slowly_has_ended_after_the_block(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next one may measure how much memory is free."""
    monkeypatch.setattr("serve.backends.STOP_SECONDS", 0.1)  # enough for a server of ours alone
    (tmp_path / "python").symlink_to(sys.executable)
    command, pid = tmp_path / "vllm", tmp_path / "pid"
    command.write_text(SLOW.format(python=sys.executable, pid=str(pid)))
    command.chmod(0o755)
    with endpoint(folder, backend="vllm", env_python=str(tmp_path / "python"), probe=False):
        engine = Path("/proc") / pid.read_text()
        assert engine.exists()
    assert not engine.exists()


def test_suite_serve_says_where_and_ends_cleanly(folder: Path) -> None:
    server = subprocess.Popen(
        [sys.executable, "-m", "suite.cli", "serve", "--model", str(folder), "--name", "nano", "--port", "0"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stdout is not None
        lines = [server.stdout.readline() for _ in range(6)]
        url = lines[1].split(" at ")[1].strip()
        assert "models: nano" in lines[2]
        command = "".join(lines[3:5]).removeprefix("try:").replace("\\\n", "")
        body = json.loads(command[command.index("-d '") + 4 : command.rindex("'")])
        assert httpx.post(f"{url}/chat/completions", json=body, timeout=30).status_code == 200
        server.send_signal(signal.SIGINT)
        _, errors = server.communicate(timeout=30)
        assert server.returncode == 0
        assert "Traceback" not in errors
    finally:
        server.kill()


def test_two_servers_of_one_port(served: Served) -> None:
    port = int(served.endpoint.url.rpartition(":")[2])
    with pytest.raises(SuiteError) as error:
        serve(Settings(model=served.base, port=port))
    assert "another server listens there" in error.value.hint


def test_https(folder: Path, tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    make = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
        "-days",
        "2",
    ]
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*make, *names, "-keyout", key, "-out", cert], check=True, capture_output=True)
    with suite_serve(tmp_path, "--model", folder, "--tls-cert", cert, "--tls-key", key) as running:
        url = str(running.http.base_url)
        assert httpx.get(f"{url}/ready", verify=ssl.create_default_context(cafile=str(cert))).status_code == 200
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            httpx.get(f"{url}/ready")
        with pytest.raises(httpx.RemoteProtocolError):
            httpx.get(url.replace("https", "http") + "/ready")
