"""What an engine is to us: a command line, made of the settings that all engines share and of options of its own."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from serve.engines.process import Launch
from serve.engines.translation import Translation
from serve.settings import Settings
from suite import store
from suite.chat import load_tokenizer
from suite.envs import Environment
from suite.errors import SuiteError, near
from suite.processes import foreign

CHECK = """
import contextlib, io, json, sys
{parser}
said = io.StringIO()
with contextlib.redirect_stderr(said):
    try:
        parser.parse_args(sys.argv[1:])
    except (SystemExit, ValueError) as error:
        known = sorted(option for action in parser._actions for option in action.option_strings)
        lines = said.getvalue().strip().splitlines() or [str(error)]
        print(json.dumps({{"error": lines[-1], "known": known}}))
        sys.exit()
print(json.dumps({{}}))
"""


class Kind(Protocol):
    """An engine that can be run. Its name is that of its environment."""

    name: str
    loads_adapters: bool
    """Whether it takes adapters while it runs, by vLLM's routes; others are started again."""
    parser: str
    """Python source that makes `parser`, the tool's own of what follows its verb; run in its environment."""

    def translation(self, settings: Settings) -> Translation:
        """Between it and OpenAI's clients, for the model of these settings."""

    def check(self, settings: Settings) -> None:
        """Raise SuiteError for settings that it has no option for."""

    def precision(self, settings: Settings) -> str:
        """The dtype that it computes in, as its command line takes it."""

    def room(self, settings: Settings) -> int | None:
        """How many adapters one process can take in its life, if that is limited."""

    def launch(self, settings: Settings, environment: Environment, port: int, key: str, replica: int) -> Launch:
        """How replica number `replica` is started on that port of the loopback; `key` is what it shall ask for."""


def flags(extra: Mapping[str, str | int | float | bool]) -> list[str]:
    """Options as a command line takes them.

    >>> flags({"max_num_seqs": 64, "enforce-eager": True, "enable-prefix-caching": False})
    ['--max-num-seqs', '64', '--enforce-eager', '--no-enable-prefix-caching']
    """
    found: list[str] = []
    for name, value in extra.items():
        option = name.lstrip("-").replace("_", "-")
        if isinstance(value, bool):
            found.append(f"--{option}" if value else f"--no-{option}")
        else:
            found += [f"--{option}", str(value)]
    return found


def check_extra(kind: Kind, environment: Environment, options: Sequence[str]) -> None:
    """Raise SuiteError where an engine's own parser refuses options; what it took once is not asked again."""
    if not options:
        return
    whole = json.dumps([environment.libraries, kind.parser, list(options)])
    known = _kept(f"options-{hashlib.sha256(whole.encode()).hexdigest()[:32]}")
    if known.is_file():
        return
    command = [str(environment.python), "-I", "-c", CHECK.format(parser=kind.parser), *options]
    ran = subprocess.run(command, env=foreign(), capture_output=True, text=True)
    if ran.returncode:
        raise SuiteError(f"the options of {kind.name} cannot be checked:\n{ran.stderr[-2000:]}")
    said = json.loads(ran.stdout.splitlines()[-1])
    if said:
        unknown = [word for word in options if word.startswith("--") and word not in said["known"]]
        hint = near(unknown[0], said["known"]) if unknown else ""
        why = said["error"].removeprefix("-c: error: ")  # what argparse puts first, for whom "-c" is the program
        raise SuiteError(f"{kind.name} refuses {' '.join(options)}: {why}", where="extra", hint=hint)
    known.touch()


def chat_template(folder: Path) -> Path | None:
    """The artifact's own chat template as a file, given to engines so that they choose no other; None without one."""
    # loading a tokenizer brings torch with it
    text = _written(folder) or load_tokenizer(folder).chat_template
    if not isinstance(text, str):
        return None
    file = _kept(f"template-{hashlib.sha256(text.encode()).hexdigest()[:32]}.jinja")
    if not file.is_file():
        partial = file.with_suffix(f".{os.getpid()}")
        partial.write_text(text, "utf-8")
        partial.rename(file)
    return file


def marked(template: Path, parsers: Mapping[str, str]) -> str | None:
    """Of parsers of calls by their marks, the first whose mark a chat template that takes tools has."""
    text = template.read_text("utf-8")
    return next((parser for mark, parser in parsers.items() if "tools" in text and mark in text), None)


def gpus(replica: int, count: int) -> list[str]:
    """The devices of one replica: those that this process may see, `count` for each in turn."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    devices = [d.strip() for d in seen.split(",") if d.strip()] or [
        str(i) for i in range(len([*Path("/proc/driver/nvidia/gpus").glob("*")]) or count * (replica + 1))
    ]
    first = replica * count % max(len(devices) - count + 1, 1)
    return devices[first : first + count]


def _written(folder: Path) -> str | None:
    """The only chat template that the files of a folder hold; None where there is none, or may be several."""
    file, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if (folder / "additional_chat_templates").is_dir():
        return None
    if file.is_file():
        return file.read_text("utf-8")
    said = json.loads(config.read_text("utf-8")).get("chat_template") if config.is_file() else None
    return said if isinstance(said, str) else None


def _kept(name: str) -> Path:
    folder = store.home() / "engines"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / name
