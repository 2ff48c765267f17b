"""Lines of keys, and the promise that positions never change values."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from suite import toml
from suite.errors import SuiteError


def test_lines_of_tables_keys_arrays_and_long_strings() -> None:
    text = 'a = 1\n\n[t]\n# note\nb = [\n  1,\n  2,\n]\nc.d = """\nx = 1\n"""\n[[rows]]\nk = 1\n[[rows]]\nk = 2\n[rows.sub]\nz = 3\n'
    data, lines = toml.load(text)
    assert data == tomllib.loads(text)
    assert lines[("a",)] == 1
    assert lines[("t",)] == 3
    assert lines[("t", "b")] == lines[("t", "b", 1)] == 5
    assert lines[("t", "c", "d")] == 9
    assert lines[("rows", 1, "k")] == 15
    assert lines[("rows", 1, "sub", "z")] == 17


keys = st.text(alphabet="abcXYZ-_09", min_size=1, max_size=6)
values = st.one_of(
    st.integers(-(2**40), 2**40),
    st.booleans(),
    st.text(alphabet="ab \\n[]=#'é", max_size=8),
    st.lists(st.integers(), max_size=3),
)


def written(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    if isinstance(value, list):
        return "[\n" + "".join(f"  {v},\n" for v in value) + "]"
    return str(value)


@given(st.dictionaries(keys, st.dictionaries(keys, values, max_size=4), max_size=4), st.integers(0, 3))
def test_every_key_is_found_on_its_line(tables: dict[str, dict[str, object]], blank: int) -> None:
    text, expected = "", {}
    for table, entries in tables.items():
        text += "\n" * blank + f'["{table}"]\n'
        expected[(table,)] = text.count("\n")
        for key, value in entries.items():
            expected[(table, key)] = text.count("\n") + 1
            text += f'"{key}" = {written(value)}\n'
    data, lines = toml.load(text)
    assert data == tomllib.loads(text)
    assert {k: v for k, v in lines.items() if len(k) < 3} == expected


def test_a_file_that_is_not_there_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(SuiteError, match="no such file"):
        toml.read(tmp_path / "no.toml")
    (tmp_path / "b.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(SuiteError, match="cannot be read"):
        toml.read(tmp_path / "b.toml")
