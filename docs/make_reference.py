"""Writes docs/reference.md from the settings classes; `--check` only says whether it is up to date."""

from __future__ import annotations

import sys
from collections.abc import Collection
from pathlib import Path

from pydantic_core import PydanticUndefined

from suite import envs
from suite.cli import VERBS
from suite.commands.flags import type_text, walk
from suite.pipeline import Wiring
from suite.serve_table import INHERITED, Model, Serve
from suite.stages import KINDS, kind

# the words of the command line, in the words of TOML
IN_TOML = {
    "STR": "text", "INT": "integer", "FLOAT": "number", "BOOL": "true or false", "A,B": "list", "KEY=VALUE": "table",
    "VALUE": "table", "SIZE": "size", "FILE,...": "file or files",
    "PATH|@STAGE": "path or @stage", "PATH|@STAGE,...": "paths or @stages",
}  # fmt: skip
PAGE = Path(__file__).parent / "reference.md"


def table(settings: type, without: Collection[str] = ()) -> list[str]:
    """One Markdown row a field."""
    rows = ["| setting | values | default | what it does |", "| --- | --- | --- | --- |"]
    for name, info in ((name, info) for name, info in walk(settings) if name not in without):
        default = "required" if info.is_required() else info.get_default(call_default_factory=True)
        shown = (
            "" if default is None or default is PydanticUndefined or hasattr(default, "model_dump") else f"`{default}`"
        )
        cells = (f"`{name}`", _values(type_text(info)), shown, info.description or "")
        rows.append("| " + " | ".join(c.replace("|", "\\|").replace("\n", " ") for c in cells) + " |")
    return [*rows, ""]


def _values(text: str) -> str:
    return IN_TOML.get(text) or f"`{text}`"


def page() -> str:
    """The whole page."""
    lines = [
        "# Reference",
        "",
        "Made from the code by `docs/make_reference.py`; do not edit by hand.",
        "",
        "## Commands",
        "",
    ]
    lines += [
        "| command | what it does |",
        "| --- | --- |",
        *(f"| `suite {v}` | {text} |" for v, (text, _) in VERBS.items()),
        "",
    ]
    lines += ["## Every stage's table", "", *table(Wiring), "## `[serve]`", "", *table(Serve)]
    lines += [
        "## `[serve.models.NAME]`",
        "",
        f"{Model.__doc__} The settings from `{INHERITED[0]}` to `{INHERITED[-1]}` above, and:",
        "",
        *table(Model, INHERITED),
    ]
    lines += [
        "## `[env.NAME]`",
        "",
        f"What stands in for the pins of an environment that comes with the suite ({', '.join(envs.BUILT_IN)}), or is",
        "one of your own; `suite env install NAME --pipeline FILE` makes it.",
        "",
        *table(envs.Settings),
    ]
    for name in KINDS:
        stage = kind(name)
        lines += [
            f"## `{name}`",
            "",
            *(line.strip() for line in (stage.__doc__ or "").strip().splitlines()),
            "",
            *table(stage),
        ]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    if "--check" in sys.argv:
        raise SystemExit(
            "docs/reference.md is out of date: python docs/make_reference.py"
            if PAGE.read_text("utf-8") != page()
            else 0
        )
    PAGE.write_text(page(), "utf-8")
