"""Question sets: a folder with a `set.toml` and data, or data alone in a layout that is known.

    finding.py   sets by name, path or address at a hub, and what is wrong with a set.toml
    settings.py  the keys of a set.toml, and the prompts where it has none
    layouts.py   which files hold what: C-Eval, CMMLU, MMLU, GSM8K, the folders of ms-swift and EvalScope
    tables.py    rows of csv, tsv, jsonl and parquet
    record.py    one row, read field by field
    readers.py   from a row to a question, for each kind
    options.py   the options of a multiple-choice row, and which are right
    subjects.py  categories of published subjects

Every value is read as a string: `1.10` stays `1.10` and `NA` stays `NA`.
"""

from evalsets.language import Language, language_of
from evalsets.sets.evalset import EvalSet, contradictions
from evalsets.sets.finding import SET_FILE, Remote, at_hub, find, load, names
from evalsets.sets.options import LETTERS
from evalsets.sets.question import Question
from evalsets.sets.settings import Generation, Kind, SetFile

__all__ = [
    "LETTERS", "SET_FILE", "EvalSet", "Generation", "Kind", "Language", "Question", "Remote", "SetFile", "at_hub",
    "contradictions", "find", "language_of", "load", "names",
]  # fmt: skip
