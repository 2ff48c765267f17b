"""Where else the report of a command goes: files that CI systems pick up, and trackers of experiments."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from suite.commands.flags import Parser
from suite.errors import SuiteError
from suite.reports import tracking
from suite.store import disk_error

COPIES = {"html": "report.html", "junit": "junit.xml"}


def add(parser: Parser) -> None:
    """The flags."""
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write the report there, as one HTML file")
    parser.add_argument("--junit", type=Path, metavar="FILE", help="also write JUnit XML there, for CI systems")
    parser.add_argument("--log", choices=list(tracking.INSTALL), help="also log to this tracker of experiments")


def check(given: argparse.Namespace) -> None:
    """Raise SuiteError for what could not be written later, before anything is computed."""
    if given.log:
        tracking.check(given.log)
    for flag in COPIES:
        file = getattr(given, flag)
        if file and (file.is_dir() or not file.absolute().parent.is_dir()):
            what = "is a folder" if file.is_dir() else f"no folder {file.absolute().parent}"
            raise SuiteError(f"--{flag} {file}: {what}", hint="name a file in a folder that exists")


def deliver(
    given: argparse.Namespace, folder: Path, name: str, metrics: Mapping[str, Any], error: SuiteError | None = None
) -> None:
    """Copy the reports in `folder` to where they are wanted, and log `metrics` as the run `name`.

    Raises SuiteError; what goes wrong here is only printed where the command ends with a worse `error` anyway.
    """
    try:
        for flag, source in COPIES.items():
            if file := getattr(given, flag):
                _copy(folder / source, file)
        if given.log:
            tracking.log(given.log, name, metrics, folder)
    except SuiteError as own:
        if error is None:
            raise
        print(f"error: {own}", file=sys.stderr)


def _copy(source: Path, file: Path) -> None:
    part = file.with_name(f"{file.name}.part")
    try:
        shutil.copyfile(source, part)
        part.replace(file)
    except OSError as error:
        raise disk_error(error, file) from None
