"""Sets by the name of a shipped one, by path, or by their address at a hub."""

from __future__ import annotations

import hashlib
import re
import string
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from evalsets import metrics
from evalsets.extract import pattern
from evalsets.language import Language
from evalsets.sets import layouts, tables
from evalsets.sets.evalset import EvalSet, settings
from evalsets.sets.layouts import Layout
from evalsets.sets.settings import FIELDS, Generation, SetFile
from evalsets.sets.subjects import categories
from suite import toml
from suite.config import Where, parse
from suite.errors import SuiteError, near
from suite.references import HUBS

SET_FILE = "set.toml"
ADDRESS = re.compile(r"((?:hf|ms):)(?:datasets/)?([\w.-]+/[\w.-]+(?:/[\w./-]+)?(?:@[\w./-]+)?)")
SHIPPED = Path(__file__).parents[1] / "shipped"
HAS_SHOTS = ("choice", "numeric")
LANGUAGES: dict[str, list[Language]] = {"C-Eval": ["zh"], "CMMLU": ["zh"], "MMLU": ["en"]}


def names() -> list[str]:
    """The sets that come with the suite."""
    return sorted(path.parent.name for path in SHIPPED.glob(f"*/{SET_FILE}"))


@dataclass(frozen=True)
class Remote:
    """A set whose data is at a hub, and may not be here yet: `suite download` fetches what `address` names.

    `file` is its set.toml, at `where`; without one, rows of data tell how they are asked.
    """

    name: str
    address: str
    shots: int | None = None
    file: SetFile | None = None
    where: Path | None = None

    @property
    def digest(self) -> str:
        """Hash of how it is asked; what is asked has a digest of its own when it is here."""
        said = settings(self.file) if self.file else ""
        return hashlib.sha256(f"{said} {self.shots}".encode()).hexdigest()[:16]

    def at(self, repository: Path) -> EvalSet:
        """The set, from the files of the repository, or of that folder of it, as they were fetched."""
        folder = repository.joinpath(*_path(self.address)[3:])
        if self.file and self.where:
            layout = layouts.find(folder, self.file.kind, self.file.split)
            found = EvalSet(self.name, folder, self.file, layout, self.where)
        else:
            layout = layouts.find(folder)
            found = EvalSet(self.name, folder, _usual(self.name, self.address, layout), layout, folder)
        return _with(found, self.shots)


def address(text: str) -> str:
    """Where the data of `hf:org/name` is, as `suite download` takes it; empty where that is no address at a hub."""
    found = ADDRESS.fullmatch(text)
    return f"{found[1]}datasets/{found[2]}" if found else ""


def at_hub(name: str) -> str:
    """Where at a hub the data of a set is; empty for a set that is here, or that is none."""
    path = (SHIPPED / name if name in names() else Path(name)) / SET_FILE
    if address(name) or not path.is_file():
        return address(name)
    try:
        return address(str(toml.read(path)[0].get("data", "")))
    except SuiteError:
        return ""


def _address(text: str, where: str) -> str:
    """The address that a text with the name of a hub must be."""
    if at := address(text):
        return at
    hint = "hf:org/name, perhaps with /folder, @commit, @branch or @tag"
    raise SuiteError(f"'{text}' is no address of data at a hub", where=where, hint=hint)


def _path(at: str) -> list[str]:
    """The parts of `hf:datasets/org/name/folder@commit`."""
    return at.partition(":")[2].partition("@")[0].split("/")


def load(name: str, shots: int | None = None) -> EvalSet:
    """The set of that name; raises SuiteError, also for one whose data is at a hub."""
    found = find(name, shots)
    if isinstance(found, Remote):
        hint = f"suite download --address {found.address} --out FOLDER"
        raise SuiteError(f"the data of '{name}' is at a hub", hint=hint)
    return found


def find(name: str, shots: int | None = None) -> EvalSet | Remote:
    """The shipped set of that name, the set or published data in that folder, told by a slash, or what is at a hub.

    `shots` replaces the number of solved examples, for sets of a kind that has them. Raises SuiteError.
    """
    if name.startswith(HUBS):
        at = _address(name, "")
        return Remote("-".join(_path(at)[2:]), at, shots)
    folder = SHIPPED / name if name in names() else Path(name)
    if name not in names() and ("/" not in name or not folder.is_dir()):
        hint = f"for the folder write ./{name}" if folder.is_dir() else f"{near(name, names())} (or give a folder)"
        raise SuiteError(f"no question set '{name}'", hint=hint)
    path = folder / SET_FILE
    if path.is_file():
        return _described(folder, path, shots)
    layout = layouts.find(folder)
    known = folder.resolve().name
    return _with(EvalSet(known, folder, _usual(known, "a local folder", layout), layout, folder), shots)


def _with(found: EvalSet, shots: int | None) -> EvalSet:
    if shots is None or found.kind not in HAS_SHOTS:
        return found
    return replace(found, file=found.file.model_copy(update={"shots": shots}))


def _described(folder: Path, path: Path, shots: int | None) -> EvalSet | Remote:
    """The set that a set.toml describes."""
    values, lines = toml.read(path)
    where = _Lines(path, lines)
    file = parse(SetFile, values, where)
    _check(file, where)
    name = folder.resolve().name
    if file.data.startswith(HUBS):
        return Remote(name, _address(file.data, where(("data",))), shots, file, path)
    data = folder / file.data
    if not data.is_dir():
        raise SuiteError(f"no folder {data}", where=where(("data",)))
    return _with(EvalSet(name, data, file, layouts.find(data, file.kind, file.split), path), shots)


def _usual(name: str, source: str, layout: Layout) -> SetFile:
    """How data without a set.toml is asked: without examples, greedily, choices also by likelihood."""
    published = categories(layout.name).keys() >= {part.subset for part in layout.parts}
    several = layout.kind == "choice" and any(_several(path) for part in layout.parts for path in part.paths)
    return SetFile(
        kind=layout.kind, title=f"{name}, read as {layout.name}",
        languages=LANGUAGES[layout.name] if published else ["en", "zh"],
        license="see its publisher", source=source,
        multiple=several, likelihood=layout.kind == "choice" and not several,
        metrics=["rouge", "bleu", "exact", "f1"], generation=Generation(max_tokens=512),
    )  # fmt: skip


def _several(path: Path) -> bool:
    """Whether a row of a choice file has more than one right letter."""
    answers = (row.get("answer") or "" for row in tables.rows(path, texts=True))
    return any(
        len(answer if isinstance(answer, list) else [c for c in str(answer) if c.isalpha()]) > 1 for answer in answers
    )


def _check(file: SetFile, where: _Lines) -> None:
    """Raise SuiteError where settings do not fit the kind."""
    for key, kinds in (
        ("shots", HAS_SHOTS),
        ("multiple", ("choice",)),
        ("likelihood", ("choice",)),
        ("split", ("choice", "numeric", "qa")),
        ("shots_random", HAS_SHOTS),
        ("extract", HAS_SHOTS),
    ):
        if getattr(file, key) and file.kind not in kinds:
            raise SuiteError(
                f"'{key}' is for {' and '.join(kinds)} sets, and this is a {file.kind} set", where=where((key,))
            )
    for metric, switch in (("partial", "multiple"), ("likelihood", "likelihood")):
        if file.metric == metric and not getattr(file, switch):
            raise SuiteError(f"metric = '{metric}' needs {switch} = true in a choice set", where=where(("metric",)))
    if file.multiple and file.likelihood:
        raise SuiteError("likelihood is for questions with one right option", where=where(("likelihood",)))
    if file.extract:
        pattern.check(file.extract, where(("extract",)))
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
