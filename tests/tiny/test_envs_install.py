"""Installing environments for real, from a wheel made here: with uv and pip, kills and two installers at once."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from suite import envs, installers
from suite.cli import main
from suite.envs import Definition, Environment
from suite.errors import SuiteError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one wheel, `tinywheel` 1.0, and a pip, and so a uv, that know nothing else."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    info = "tinywheel-1.0.dist-info"
    with zipfile.ZipFile(folder / "tinywheel-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tinywheel.py", "HERE = 'tiny'\n")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tinywheel\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_USER", "0")  # as tox says it
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def slow(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """The same wheel from a server that answers once the event is set: an install takes as long as a test wants."""
    open_now = threading.Event()

    class Held(SimpleHTTPRequestHandler):
        def send_head(self) -> Any:
            assert open_now.wait(120)
            return super().send_head()

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Held, directory=str(wheels))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("PIP_FIND_LINKS", f"http://127.0.0.1:{server.server_port}/")
        yield open_now
        open_now.set()
        server.shutdown()


@pytest.fixture
def pipeline_file(tmp_path: Path) -> Path:
    file = tmp_path / "p.toml"
    file.write_text('[env.tiny]\nrequirements = ["tinywheel==1.0"]\n')
    return file


def command(file: Path, action: str = "install", *others: str) -> list[str]:
    return [sys.executable, "-m", "suite.cli", "env", action, "tiny", *others, "--pipeline", str(file)]


@pytest.fixture(params=["pip", "uv"])
def program(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the environment is made by."""
    if request.param == "pip":
        monkeypatch.setattr("suite.installers.uv", lambda: None)
    elif installers.uv() is None:
        pytest.skip("there is no uv")
    return str(request.param)


def test_pins_are_installed_with_progress_checked_and_removed(
    program: str,
    wheels: Path,
    suite_home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "lock.txt").write_text("# all of it\ntinywheel==1.0\n")
    definition = Definition("lock.txt", ("tinywheel",), aliases=(("teeny", "tinywheel", "+x"),))
    monkeypatch.setattr(envs, "LOCKS", tmp_path)
    monkeypatch.setattr(envs, "BUILT_IN", {"tiny": {envs.device(): definition}})
    found = envs.get("tiny")
    seen: list[tuple[float, float, str]] = []
    found.install(lambda *step: seen.append(step))
    assert found.installed
    assert [line.split()[1].endswith("uv") for line in found.log.read_text().splitlines() if line.startswith("# ")] == [
        program == "uv"
    ] * 2
    assert [*found.folder.glob("lib/python*/site-packages/__pycache__/tinywheel.*.pyc")]
    assert found.folder.parent == suite_home / "envs"
    assert {what for *_, what in seen} == {"venv", "packages"}
    assert all(step <= total for step, total, _ in seen)
    ran = subprocess.run(
        [found.python, "-I", "-c", "import tinywheel; print(tinywheel.HERE)"], capture_output=True, text=True
    )
    assert ran.stdout == "tiny\n"
    checked = found.check()
    assert checked["problems"] == []
    assert checked["versions"]["tinywheel"] == "1.0"
    assert checked["versions"]["teeny"] == "1.0+x"
    record = found.record()
    assert record["requirements"] == ["tinywheel==1.0"]
    assert record["bytes"] > 1e4

    assert main(["env", "install", "tiny"]) == 0
    assert "installed already" in capsys.readouterr().out
    (module,) = found.folder.glob("lib/python*/site-packages/tinywheel.py")
    module.write_text("raise OSError('torn')\n")
    assert main(["env", "check", "tiny"]) == 1
    assert "problem: import tinywheel: OSError: torn" in capsys.readouterr().out
    stale = found.root / f"tiny-{'0' * 16}"
    stale.mkdir()
    assert main(["env", "remove", "tiny"]) == 0
    assert not found.folder.exists()
    assert not stale.exists()
    assert not found.log.exists()


def test_pip_goes_on_where_uv_fails(wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "bin" / "uv"
    broken.parent.mkdir()
    broken.write_text('#!/bin/sh\nmkdir "$8" && echo invalid peer certificate >&2\nexit 2\n')
    broken.chmod(0o755)
    monkeypatch.setattr("suite.installers.shutil.which", lambda *_, **__: str(broken))
    said: list[str] = []
    found = Environment("tiny", envs.store.home() / "envs", ("tinywheel==1.0",))
    found.install(say=said.append)
    assert said == ["made by pip, because uv cannot: invalid peer certificate"]
    assert found.installed
    assert "# " + str(broken) in found.log.read_text()


def test_what_pip_cannot_find_is_an_error_with_its_last_lines(wheels: Path) -> None:
    missing = Environment("tiny", envs.store.home() / "envs", ("tinywheel==3.0",))
    with pytest.raises(SuiteError, match=r"(?s)'tiny' could not be installed.*tinywheel==3.0") as failed:
        missing.install()
    assert "no such release" in failed.value.hint
    assert str(missing.log) in failed.value.hint
    assert "No matching distribution" in missing.log.read_text()
    assert not missing.folder.exists()


def test_without_a_network_it_ends_with_a_reason_and_leaves_nothing(suite_home: Path, pipeline_file: Path) -> None:
    nowhere = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "1", "PIP_CONFIG_FILE": os.devnull}
    kept = {name: value for name, value in os.environ.items() if name != "PIP_FIND_LINKS"}
    ran = subprocess.run(
        command(pipeline_file), cwd=ROOT, env={**kept, **nowhere}, capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 2
    assert "hint: no network: pip could not reach its index" in ran.stderr
    assert "Traceback" not in ran.stderr
    assert not [path for path in (suite_home / "envs").iterdir() if path.is_dir()]


def test_a_killed_install_leaves_nothing_that_is_used(
    slow: threading.Event, suite_home: Path, pipeline_file: Path
) -> None:
    def folders() -> list[Path]:
        return [p for p in (suite_home / "envs").glob("tiny-*") if p.is_dir()]

    with subprocess.Popen(command(pipeline_file), cwd=ROOT, stderr=subprocess.DEVNULL) as installer:
        while not any((folder / "bin" / "python").exists() for folder in folders()):
            time.sleep(0.005)
        os.kill(installer.pid, signal.SIGKILL)
    (folder,) = folders()
    assert not (folder / envs.MARKER).exists()
    (folder / "half").touch()
    listed = subprocess.run([*command(pipeline_file, "check")], cwd=ROOT, capture_output=True, text=True)
    assert listed.returncode == 2
    assert "is not installed" in listed.stderr
    deadline = time.monotonic() + 10
    while (left := users(folder)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert left == []

    slow.set()
    again = subprocess.run(command(pipeline_file), cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert (folder / envs.MARKER).is_file()
    assert not (folder / "half").exists()


def users(folder: Path) -> list[str]:
    """Processes that still work on `folder`."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            line = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if str(folder) in line:
            found.append(line)
    return found


def test_ctrl_c_ends_all_that_one_command_installs(slow: threading.Event, suite_home: Path, tmp_path: Path) -> None:
    file = tmp_path / "two.toml"
    file.write_text("".join(f'[env.{name}]\nrequirements = ["tinywheel==1.0"]\n' for name in ("tiny", "other")))
    both = command(file, "install", "other")

    def folders() -> list[Path]:
        return [p for p in (suite_home / "envs").glob("*-*") if p.is_dir()]

    # what runs in the background ignores Ctrl-C, and so would what it starts
    heeding = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(both, cwd=ROOT, stderr=subprocess.PIPE, text=True, preexec_fn=heeding) as installer:
        while len(folders()) < 2 and installer.poll() is None:
            time.sleep(0.005)
        installer.send_signal(signal.SIGINT)
        _, said = installer.communicate(timeout=60)
    assert (installer.returncode, folders()) == (130, [])
    assert "Traceback" not in said

    slow.set()
    again = subprocess.run(both, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert [again.stdout.count(f"{name}: installed in") for name in ("tiny", "other")] == [1, 1]
    assert [(folder / envs.MARKER).is_file() for folder in folders()] == [True, True]


def test_of_two_installers_one_waits(slow: threading.Event, suite_home: Path, pipeline_file: Path) -> None:
    def start() -> subprocess.Popen[str]:
        asked = [*command(pipeline_file), "--json"]
        return subprocess.Popen(asked, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    with start() as first:
        while not [*(suite_home / "envs").glob("tiny-*/pyvenv.cfg")] and first.poll() is None:
            time.sleep(0.005)
        with start() as second:
            assert second.stdout is not None
            before = []
            while not before or (before[-1] and "waiting" not in before[-1]):
                before.append(second.stdout.readline())
            slow.set()
            said = [first.communicate(timeout=120), second.communicate(timeout=120)]
    assert [first.returncode, second.returncode] == [0, 0], said
    assert "another process is installing it; waiting" in before[-1]
    assert "waiting" not in said[0][0]
    ends = [json.loads(out.splitlines()[-1]) for out, _ in said]
    assert ends[0] == ends[1]
    assert re.fullmatch(r".*/envs/tiny-[0-9a-f]{16}/bin/python", ends[0]["python"])
