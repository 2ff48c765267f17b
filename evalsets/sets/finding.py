"""Sets by the name of a shipped one or by path."""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from evalsets import metrics
from evalsets.language import Language
from evalsets.sets import layouts, tables
from evalsets.sets.evalset import EvalSet
from evalsets.sets.layouts import Layout
from evalsets.sets.settings import FIELDS, Generation, SetFile
from evalsets.sets.subjects import categories
from suite import toml
from suite.config import Where, parse
from suite.errors import SuiteError, near

SET_FILE = "set.toml"
SHIPPED = Path(__file__).parents[1] / "shipped"
HAS_SHOTS = ("choice", "numeric")
LANGUAGES: dict[str, list[Language]] = {"C-Eval": ["zh"], "CMMLU": ["zh"], "MMLU": ["en"]}


def names() -> list[str]:
    """The sets that come with the suite."""
    return sorted(path.parent.name for path in SHIPPED.glob(f"*/{SET_FILE}"))


def load(name: str, shots: int | None = None) -> EvalSet:
    """The shipped set of that name, or the set or published data in that folder, told by a slash; raises SuiteError.

    `shots` replaces the number of solved examples, for sets of a kind that has them.
    """
    found = _found(name)
    if shots is None or found.kind not in HAS_SHOTS:
        return found
    return replace(found, file=found.file.model_copy(update={"shots": shots}))


def _found(name: str) -> EvalSet:
    folder = SHIPPED / name if name in names() else Path(name)
    if name not in names() and ("/" not in name or not folder.is_dir()):
        hint = f"for the folder write ./{name}" if folder.is_dir() else f"{near(name, names())} (or give a folder)"
        raise SuiteError(f"no question set '{name}'", hint=hint)
    path = folder / SET_FILE
    if path.is_file():
        return _described(folder, path)
    layout = layouts.find(folder)
    return EvalSet(folder.resolve().name, folder, _usual(folder, layout), layout, folder)


def _described(folder: Path, path: Path) -> EvalSet:
    """The set that a set.toml describes."""
    values, lines = toml.read(path)
    where = _Lines(path, lines)
    file = parse(SetFile, values, where)
    _check(file, where)
    data = folder / file.data
    if not data.is_dir():
        raise SuiteError(f"no folder {data}", where=where(("data",)))
    return EvalSet(folder.resolve().name, data, file, layouts.find(data, file.kind, file.split), path)


def _usual(folder: Path, layout: Layout) -> SetFile:
    """How data without a set.toml is asked: without examples, greedily, choices also by likelihood."""
    published = categories(layout.name).keys() >= {part.subset for part in layout.parts}
    several = layout.kind == "choice" and any(_several(part.path) for part in layout.parts)
    return SetFile(
        kind=layout.kind, title=f"{folder.resolve().name}, read as {layout.name}",
        languages=LANGUAGES[layout.name] if published else ["en", "zh"],
        license="see its publisher", source="a local folder",
        multiple=several, likelihood=layout.kind == "choice" and not several,
        metrics=["rouge", "bleu", "exact", "f1"], generation=Generation(max_tokens=512),
    )  # fmt: skip


def _several(path: Path) -> bool:
    """Whether a row of a choice file has more than one right letter."""
    answers = (row.get("answer") or "" for row in tables.rows(path, texts=True))
    return any(len([c for c in "".join(map(str, answer)) if c.isalpha()]) > 1 for answer in answers)


def _check(file: SetFile, where: _Lines) -> None:
    """Raise SuiteError where settings do not fit the kind."""
    for key, kinds in (
        ("shots", HAS_SHOTS),
        ("multiple", ("choice",)),
        ("likelihood", ("choice",)),
        ("split", ("choice",)),
    ):
        if getattr(file, key) and file.kind not in kinds:
            raise SuiteError(
                f"'{key}' is for {' and '.join(kinds)} sets, and this is a {file.kind} set", where=where((key,))
            )
    if file.multiple and file.likelihood:
        raise SuiteError("likelihood is for questions with one right option", where=where(("likelihood",)))
    if file.kind == "qa":
        metrics.check(file.metrics, where(("metrics",)))
    needed = FIELDS.get(file.kind, set())
    for language, text in file.prompt.items():
        try:
            fields = {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}
        except ValueError as error:
            raise SuiteError(
                f"prompt: {error}", where=where(("prompt", language)), hint="a literal brace is {{ or }}"
            ) from None
        if fields != needed:
            hint = "it needs " + " and ".join(f"{{{name}}}" for name in sorted(needed)) if needed else "remove it"
            raise SuiteError(f"prompt has the fields {sorted(fields)}", where=where(("prompt", language)), hint=hint)


@dataclass
class _Lines(Where):
    """Places of keys in one set.toml."""

    file: Path
    lines: Mapping[toml.KeyPath, int]

    def __call__(self, path: tuple[str | int, ...]) -> str:
        known = (self.lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in self.lines)
        line = next(known, None)
        return f"{self.file}:{line}" if line else str(self.file)
