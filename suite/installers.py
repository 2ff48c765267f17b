"""Programs that fill a virtual environment: uv where there is one, and pip; uv asks the indexes that pip is set up for.

uv does not read pip's configuration: a mirror, or an index of CPU builds, that a machine is set up with would be passed
over, and on a machine without a GPU several GB of CUDA libraries taken. So it is told; of what it cannot be told it is
not used.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from suite.errors import SuiteError

QUIET = ("--disable-pip-version-check", "--no-input", "--progress-bar", "off", "--no-warn-script-location")

FLAGS = {"find-links": "--find-links", "constraint": "--constraint", "trusted-host": "--allow-insecure-host"}
"""Settings of pip with several values, by what uv calls them."""
VARIABLES = {
    "index-url": "UV_DEFAULT_INDEX", "extra-index-url": "UV_INDEX", "cert": "SSL_CERT_FILE", "proxy": "ALL_PROXY",
    "timeout": "UV_HTTP_TIMEOUT", "default-timeout": "UV_HTTP_TIMEOUT",
}  # fmt: skip
"""Settings that are variables to uv: addresses may hold passwords, which others could read on a command line."""
OF_PIP_ALONE = frozenset({
    "disable-pip-version-check", "no-input", "progress-bar", "no-warn-script-location", "quiet", "verbose", "no-color",
    "cache-dir", "no-cache-dir", "retries", "root-user-action", "require-virtualenv", "break-system-packages", "log",
    "no-compile", "no-python-version-warning", "config-file",
})  # fmt: skip
"""Settings that decide nothing of what is installed."""
OFF = ("0", "false", "no", "off", "n", "f")
"""How pip's settings say that something is not done, which is uv's way too."""

CURES: Mapping[str, str] = {
    "No space left on device": "free some space, or set SUITE_HOME to a larger disk",
    "Temporary failure in name resolution": "no network: pip could not reach its index",
    "Failed to establish a new connection": "no network: pip could not reach its index",
    "ensurepip is not available": "this Python cannot make virtual environments: install its venv package",
    "ResolutionImpossible": "these requirements exclude each other",
    "No matching distribution": "the index that pip uses has no such release for this Python and machine",
}
"""What pip says, the causes before what follows from them, and what to do about it."""


@dataclass(frozen=True)
class Installer:
    """A program that makes virtual environments, and one that installs into them."""

    name: str
    create: Sequence[str]
    """Command that makes an empty one; the folder follows."""
    install: Sequence[str]
    """Command that installs, with `{python}` for the interpreter there; options and requirements follow."""
    fetched: str
    """Pattern of what it says for each package that it has fetched, or for a number of them."""
    variables: Mapping[str, str] = field(default_factory=dict)

    def packages(self, python: Path, options: Sequence[str], requirements: Sequence[str]) -> list[str]:
        """The command that installs requirements for an interpreter."""
        return [*(word.format(python=python) for word in self.install), *options, *requirements]

    def count(self, said: str) -> int:
        """How many packages it has fetched, by what it said."""
        return sum(int(number or 1) for number in re.findall(self.fetched, said, re.MULTILINE))


def pip() -> Installer:
    """The pip that every new virtual environment has."""
    return Installer(
        "pip",
        (sys.executable, "-m", "venv"),
        ("{python}", "-I", "-m", "pip", "install", *QUIET),
        r"^\s*(?:Downloading|Using cached|Processing) \S+\.whl\b(?!\.metadata)()",
    )


def uv() -> Installer | None:
    """uv, set up as pip is; None where there is none. Raises SuiteError where it cannot be set up so."""
    beside = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    program = shutil.which("uv", path=beside)
    if program is None:
        return None
    flags, variables = _as_uv_takes(pip_settings())
    apart = ("--project", os.sep)  # what a project in the current folder says to uv is about that project
    # as pip: the best of what all indexes have, and modules compiled once, not at each start
    chosen = ("--index-strategy", "unsafe-best-match", "--compile-bytecode", *flags)
    return Installer(
        "uv",
        (program, "venv", *apart, "--no-project", "--no-python-downloads", "--python", sys.executable),
        (program, "pip", "install", *apart, "--python", "{python}", *chosen),
        r"^Prepared (\d+) packages?",
        variables,
    )


def pip_settings() -> dict[str, str]:
    """What pip is set up with for installing, by files and by variables; raises SuiteError where there is no pip."""
    command = [sys.executable, "-I", "-m", "pip", "config", "list"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise SuiteError("how pip is set up cannot be read", hint=ran.stderr.strip()[-300:])
    sections: dict[str, dict[str, str]] = {"global": {}, "install": {}, ":env:": {}}
    for section, name, value in re.findall(r"^(\S+?)\.([\w-]+)=('.*'|\".*\")$", ran.stdout, re.MULTILINE):
        if section in sections:
            sections[section][name] = str(ast.literal_eval(value))
    return {name: value for section in sections.values() for name, value in section.items()}


def _as_uv_takes(settings: Mapping[str, str]) -> tuple[list[str], dict[str, str]]:
    """Flags and variables for uv; raises SuiteError for a setting that it has no word for."""
    flags, variables = [], {}
    for name, value in settings.items():
        if value.lower() in OFF:  # as `user` is in virtual environments
            continue
        if name in FLAGS:
            flags += [part for each in value.split() for part in (FLAGS[name], each)]
        elif name in VARIABLES:
            variables[VARIABLES[name]] = " ".join(value.split())
        elif name == "no-index":
            flags += ["--no-index"]
        elif name not in OF_PIP_ALONE:
            raise SuiteError(f"pip is set up with '{name}', which uv does not know")
    # what is said to uv itself counts
    return flags, {name: value for name, value in variables.items() if name not in os.environ}


def cure(said: str) -> str:
    """What to do about why pip failed, by what it said; empty where that is not known."""
    return next((advice for text, advice in CURES.items() if text in said), "")
