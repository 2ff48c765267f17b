"""Where a folder keeps its questions: the layouts of published sets and of other tools, told by names and columns.

    by split    {dev,val,test}/{subject}_{split}.csv    C-Eval, and MMLU whose files have no header
                {dev,test}/{subject}.csv                CMMLU
    by config   {config}/{split}-00000-of-00001.SUFFIX  hubs, where the folder itself may be the one configuration;
                {config}/{split}/0000.SUFFIX            the same as a hub converts it; of several parts, all
    flat        {subset}_{dev,val,test}.SUFFIX          multiple choice of ms-swift (custom_ceval) and EvalScope (mcq)
                {train,test}.jsonl                      GSM8K
                {subset}.SUFFIX                         qa of both (custom_general_qa), tools, texts, and all else

SUFFIX is csv, tsv, jsonl or parquet. Solved examples come from the dev or train file, which is not asked.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from evalsets.sets import tables
from evalsets.sets.options import ANSWERS, WITHHELD
from evalsets.sets.settings import Kind
from evalsets.sets.subjects import CATEGORIES, categories
from suite.errors import SuiteError

ASKED = ("val", "test")
SOLVED = ("dev", "train")
EXPECTED = (
    "expected {val,test}/SUBJECT_{val,test}.csv, {dev,test}/SUBJECT.csv, or SUBSET[_val].{csv,tsv,jsonl,parquet} with "
    "question,A,B,...,answer or question,choices,answer (choice), query,response (qa), question,answer ending in "
    "'#### 72' (numeric), messages,tools,calls (tools), messages,tools,target (ToolBench) or text (perplexity)"
)
SHARD = re.compile(r"-(\d{5})-of-(\d{5})(?:-[0-9a-f]{16})?")
"""Which part of how many; older versions of `datasets` add a hash."""
SPLITS = {"train": "train", "dev": "dev", "validation": "val", "val": "val", "test": "test"}
"""Splits as hubs name them."""
WHOLE = "all"
"""How hubs name a configuration that holds the rows of all others once more."""
SHOWN = 8
"""Files that a message lists at most."""


@dataclass(frozen=True)
class Part:
    """The files with the questions of a subset, in order, and those with solved examples, if there are any."""

    subset: str
    paths: tuple[Path, ...]
    solved: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Layout:
    """What was found: whose layout, which kind of questions, and the files in order of subset."""

    name: str
    kind: Kind
    parts: tuple[Part, ...]

    @property
    def files(self) -> list[Path]:
        """Everything that decides what is asked."""
        return sorted({path for part in self.parts for path in (*part.paths, *part.solved)})


def find(folder: Path, kind: Kind | None = None, split: str | None = None) -> Layout:
    """The layout of a folder, of a known kind or of any; raises SuiteError with what was found and what expected."""
    if kind in (None, "choice") and (found := _by_split(folder, split)):
        return found
    configs = _by_config(folder, split)
    parts = configs or _flat(folder, split)
    if not parts:
        raise SuiteError(f"the set has no data to ask: {_listing(folder)}", where=str(folder), hint=_hint(folder))
    found = Layout("", kind, parts) if kind else _told_by_rows(parts)
    published = _publisher({part.subset for part in configs}) if found.kind == "choice" else ""
    return replace(found, name=published) if published else found


def _by_split(folder: Path, split: str | None) -> Layout | None:
    files = {name: sorted((folder / name).glob("*.csv")) for name in ASKED}
    if not any(files.values()):
        return None
    first = next(paths[0] for paths in files.values() if paths)
    name = "CMMLU" if not first.stem.endswith(ASKED) else "C-Eval" if tables.names_columns(first) else "MMLU"
    asked = split or ("val" if name == "C-Eval" else "test")
    if not files[asked]:
        if split:
            raise SuiteError(f"no {split}/SUBJECT_{split}.csv", where=str(folder))
        asked = next(other for other in ASKED if files[other])
    parts = []
    for path in files[asked]:
        subject = path.stem.removesuffix(f"_{asked}")
        solved = folder / "dev" / path.name.replace(f"{subject}_{asked}", f"{subject}_dev")
        parts.append(Part(subject, (path,), (solved,) if solved.is_file() else ()))
    return Layout(name, "choice", tuple(parts))


def _by_config(folder: Path, split: str | None) -> tuple[Part, ...]:
    """The configurations of a data set as hubs keep them; none where a file does not fit that."""
    configs: dict[str, dict[str, list[Path]]] = {}
    at = (path for pattern in ("*", "*/*", "*/*/*") for path in folder.glob(pattern))
    paths = sorted(path for path in at if path.suffix in tables.SUFFIXES and path.is_file())
    for path in paths:
        *above, last = path.relative_to(folder).with_suffix("").parts
        if last.isdigit() and above:
            last = above.pop()
        found = SPLITS.get(SHARD.sub("", last))
        if not found or len(above) > 1:
            return ()
        config = "default" if above in ([], ["data"]) else above[0]
        configs.setdefault(config, {}).setdefault(found, []).append(path)
    if not any(path.parent != folder or SHARD.search(path.stem) or path.stem == "validation" for path in paths):
        return ()
    parts = []
    for config, splits in sorted(configs.items()):
        if asked := _asked(splits, split):
            solved = next((splits[name] for name in SOLVED if name in splits), [])
            parts.append(Part(config, _whole(asked), _whole(solved)))
    return tuple(part for part in parts if part.subset != WHOLE or len(parts) == 1)


def _asked(splits: dict[str, list[Path]], split: str | None) -> list[Path]:
    """The files of a configuration that are asked: of that split, else of the test split where it has answers."""
    wanted = [split] if split else [name for name in reversed(ASKED) if name in splits]
    if not split and len(wanted) > 1 and (first := next(tables.rows(splits["test"][0]), None)):
        withheld = any(name in first.values and first.get(name) in WITHHELD for name in ANSWERS)
        wanted = wanted[1:] if withheld else wanted
    return splits.get(wanted[0], []) if wanted else []


def _whole(paths: list[Path]) -> tuple[Path, ...]:
    """The files of a split in their order; raises SuiteError where one is missing, or they are not of one table."""
    parts = {_part(path): path for path in paths}
    if len({(path.parent, name, of) for (name, _, of), path in parts.items()}) > 1 or len(parts) < len(paths):
        raise SuiteError(
            f"{paths[0].name} and {paths[-1].name} are both of one split", where=str(paths[0].parent),
            hint="keep one of them",
        )  # fmt: skip
    expected = max((of or number + 1 for _, number, of in parts), default=0)
    for missing in sorted({*range(expected)} - {number for _, number, _ in parts}):
        said = f"{paths[0].name} is one of {expected} parts, and number {missing} is not there"
        raise SuiteError(said, where=str(paths[0].parent), hint="put the other parts beside it")
    return tuple(parts[part] for part in sorted(parts))


def _part(path: Path) -> tuple[str, int, int]:
    """What a file of a split is called without its number, its number from 0, and of how many, 0 if it does not say."""
    if found := SHARD.search(path.stem):
        return SHARD.sub("", path.name), int(found[1]), int(found[2])
    return (path.suffix, int(path.stem), 0) if path.stem.isdigit() else (path.name, 0, 1)


def _flat(folder: Path, split: str | None) -> tuple[Part, ...]:
    asked: dict[str, dict[str, Path]] = {}
    solved: dict[str, Path] = {}
    for path in sorted(p for p in folder.iterdir() if p.suffix in tables.SUFFIXES and p.is_file()):
        subset, _, role = path.stem.rpartition("_")
        if role in SOLVED:
            files, name = solved, subset
        elif role in ASKED:
            files, name = asked.setdefault(subset or role, {}), role
        else:
            files, name = asked.setdefault(path.stem, {}), ""
        if name in files:
            raise _same_subset(files[name], path)
        files[name] = path
    if split and not any(split in files for files in asked.values()):
        raise SuiteError(f"no SUBSET_{split} or {split} file", where=str(folder))
    chosen = {name: _chosen(files, split) for name, files in sorted(asked.items())}
    parts = ((name, path, solved.get(name, solved.get(""))) for name, path in chosen.items() if path)
    return tuple(Part(name, (path,), (examples,) if examples else ()) for name, path, examples in parts)


def _chosen(files: dict[str, Path], split: str | None) -> Path | None:
    """The file of a subset that is asked: that of the split, else the val file before the test file."""
    if "" in files and len(files) > 1:
        raise _same_subset(*files.values())
    return files.get(split) if split else next(files[role] for role in (*ASKED, "") if role in files)


def _same_subset(one: Path, other: Path, *_: Path) -> SuiteError:
    return SuiteError(
        f"{one.name} and {other.name} are the same subset", where=str(one.parent), hint="keep one of them"
    )


def _publisher(subsets: set[str]) -> str:
    """Whose subjects these are, if they are most of somebody's; some are in two sets."""
    known = {name: categories(name).keys() for name in CATEGORIES}
    return next((name for name, all_ in known.items() if subsets <= all_ and 2 * len(subsets) > len(all_)), "")


def _told_by_rows(parts: tuple[Part, ...]) -> Layout:
    first = parts[0].paths[0]
    row = next(tables.rows(first), None)
    if row is None:
        raise SuiteError("the file has no rows", where=str(first))
    known = kind_of(row.values)
    if known is None:
        raise row.error(f"rows have {', '.join(row.values)}: no kind of question", EXPECTED)
    kind, name = known
    return Layout(name, kind, parts)


def kind_of(row: dict[str, Any]) -> tuple[Kind, str] | None:
    """The kind of question that a row holds and the usual name of its layout, by the columns that it has."""
    columns = {name for name, value in row.items() if value is not None}
    forms: tuple[tuple[set[str], Kind, str], ...] = (
        ({"messages", "tools", "target"}, "toolbench", "ToolBench"),
        ({"tools", "calls"}, "tools", "tool calls"),
        ({"tools", "should_call_tool"}, "tools", "general_fc"),
        ({"checks"}, "instructions", "instructions"),
        ({"refuse"}, "refusals", "refusals"),
        ({"question", "A", "B"}, "choice", "multiple choice"),
        ({"question", "choices"}, "choice", "multiple choice"),
    )
    found = next(((kind, name) for needed, kind, name in forms if needed <= columns), None)
    if found:
        return found
    if "question" in columns and "####" in str(row.get("answer")):
        return "numeric", "GSM8K"
    if columns & {"query", "question", "messages"}:
        return "qa", "questions and answers"
    return ("perplexity", "texts") if "text" in columns else None


def _listing(folder: Path) -> str:
    names = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir() if not path.name.startswith("."))
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"found {', '.join(names[:SHOWN])}{more}" if names else "the folder is empty"


def _hint(folder: Path) -> str:
    """A folder inside that has data, or what was expected."""
    for inside in sorted(path for path in folder.iterdir() if path.is_dir()):
        if any(True for pattern in ("*_val.*", "*.jsonl", "val/*.csv", "test/*.csv") for _ in inside.glob(pattern)):
            return f"give the folder inside that has the data: {inside}"
    if any(path.stem.rpartition("_")[2] in SOLVED and path.suffix in tables.SUFFIXES for path in folder.iterdir()):
        return "dev and train files hold solved examples; files to ask are SUBSET, SUBSET_val or SUBSET_test"
    return EXPECTED
