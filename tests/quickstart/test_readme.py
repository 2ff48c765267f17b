"""Every command that the README shows, in its order, as it stands there."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

from tests.quickstart.running import ROOT, Quickstart, command, server_of

SETUP = ("pip install", "cd ", "git clone")


def shown_commands() -> list[str]:
    """Lines of the README's `sh` blocks, without set-up and comments."""
    blocks = re.findall(r"^```sh\n(.*?)^```", (ROOT / "README.md").read_text("utf-8"), re.M | re.S)
    lines = [line.partition("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith(SETUP)]


def test_the_two_commands_are_there() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    assert "pip install . && suite run examples/quickstart.toml" in text
    assert "pip install tox && tox" in text


def test_every_command_of_the_readme_works(quickstart: Quickstart, home: Path, tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    environment = {**os.environ, "SUITE_HOME": str(home)}
    commands = [shlex.split(line) for line in shown_commands()]
    assert len(commands) >= 8
    assert all(words[0] == "suite" for words in commands), commands
    serving = next(i for i, words in enumerate(commands) if words[1] == "serve")
    with server_of(home, *commands[serving][2:]) as url:
        for words in commands[:serving] + commands[serving + 1 :]:
            arguments = [w.replace("http://127.0.0.1:8000", url) for w in words[1:]]
            if words[1] == "chat":
                arguments += ["--url", url]
            done = subprocess.run(
                [command(), *arguments],
                cwd=tmp_path,
                env=environment,
                input="Who are you?\n",
                text=True,
                timeout=300,
                check=False,
            )
            assert done.returncode == 0, words
