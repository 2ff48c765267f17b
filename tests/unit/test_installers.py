"""How uv is told what pip is set up with, and when it is left alone."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from suite import installers
from suite.errors import SuiteError


@pytest.fixture
def pip_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only configuration that pip has; a program `uv` is there."""
    for name in [name for name in os.environ if name.startswith(("PIP_", "UV_", "SSL_CERT"))]:
        monkeypatch.delenv(name)
    program = tmp_path / "bin" / "uv"
    program.parent.mkdir()
    program.touch(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    file = tmp_path / "pip.conf"
    monkeypatch.setenv("PIP_CONFIG_FILE", str(file))
    return file


def test_uv_asks_where_pip_would_ask(pip_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip_file.write_text(
        "[global]\nindex-url = https://someone:secret@example.org/simple\n"
        "extra-index-url =\n    https://one.example.org\n    https://two.example.org\n"
        "find-links = /a /b\ncert = /certs.pem\nretries = 9\n[install]\nno-index = false\n[list]\nformat = json\n"
    )
    monkeypatch.setenv("PIP_CONSTRAINT", "/pins.txt")
    uv = installers.uv()
    assert uv
    assert uv.variables == {
        "UV_DEFAULT_INDEX": "https://someone:secret@example.org/simple",
        "UV_INDEX": "https://one.example.org https://two.example.org",
        "SSL_CERT_FILE": "/certs.pem",
    }
    said = " ".join(uv.packages(Path("py"), ["--no-deps"], ["a==1"]))
    assert "--find-links /a --find-links /b" in said
    assert "--constraint /pins.txt" in said
    assert said.endswith(" --no-deps a==1")
    assert "secret" not in said
    assert uv.create[-2:] == ("--python", sys.executable)
    monkeypatch.setenv("UV_DEFAULT_INDEX", "https://mine.example.org")
    again = installers.uv()
    assert again
    assert "UV_DEFAULT_INDEX" not in again.variables


def test_uv_is_not_used_for_what_it_cannot_be_told(pip_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip_file.write_text("[install]\nno-binary = :all:\n")
    with pytest.raises(SuiteError, match="'no-binary', which uv does not know"):
        installers.uv()
    pip_file.write_text("no section")
    with pytest.raises(SuiteError, match="how pip is set up cannot be read"):
        installers.uv()
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "executable", "nowhere/python")
    assert installers.uv() is None


def test_what_has_been_fetched_is_counted() -> None:
    said = (
        "Looking in links: /a\n  Downloading a-1-py3-none-any.whl.metadata (1 kB)\n"
        "  Downloading a-1-py3-none-any.whl (1 kB)\nProcessing /a/b-1-py3-none-any.whl\n"
    )
    assert installers.pip().count(said) == 2
