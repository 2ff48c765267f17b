"""The Modelfile: what is written is what Ollama reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from export.ollama import modelfile
from suite.errors import SuiteError

PRINTABLE = st.text(st.characters(codec="utf-8").filter(lambda c: c.isprintable() or c in "\n\t"), max_size=20)
VALUES = (PRINTABLE | st.text(alphabet='a"\n \t#', max_size=12)).filter(lambda text: '"""' not in text)
NAMES = st.sampled_from(["TEMPLATE", "SYSTEM", "LICENSE", "PARAMETER stop", "MESSAGE user", "MESSAGE assistant"])


@given(st.lists(st.tuples(NAMES, VALUES), max_size=6), st.lists(PRINTABLE, max_size=2))
def test_what_is_written_is_read_back(commands: list[tuple[str, str]], notes: list[str]) -> None:
    given_commands = [("FROM", "./model.gguf"), *commands]
    assert modelfile.parse(modelfile.write(given_commands, notes)) == given_commands


@pytest.mark.parametrize("value", ['three """ quotes', "zero width \u200b", "bell \x07", "carriage \r return"])
def test_what_a_modelfile_cannot_hold_is_refused(value: str) -> None:
    with pytest.raises(SuiteError, match="SYSTEM holds"):
        modelfile.write([("FROM", "./m.gguf"), ("SYSTEM", value)])


def test_reads_what_ollama_reads() -> None:
    text = """\
# a comment with FROM nothing
from ./m.gguf
parameter  temperature 0.5
PARAMETER stop "<|end|>"
SYSTEM \"\"\"two
"lines"\"\"\"
MESSAGE user what is "this"?

TEMPLATE "a
b"
"""
    assert modelfile.parse(text) == [
        ("FROM", "./m.gguf"),
        ("PARAMETER temperature", "0.5"),
        ("PARAMETER stop", "<|end|>"),
        ("SYSTEM", 'two\n"lines"'),
        ("MESSAGE user", 'what is "this"?'),
        ("TEMPLATE", "a\nb"),
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("SYSTEM x\n", "no FROM"),
        ('FROM x\nSYSTEM "open\n', "2: quotes"),
        ("FROM x\n\nRUN y\n", "3: no command"),
        ("FROM x\nMESSAGE tool y\n", "2: no command"),
    ],
)
def test_mistakes_are_named_with_their_line(text: str, said: str) -> None:
    with pytest.raises(SuiteError, match=said):
        modelfile.parse(text)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    settings = {"do_sample": True, "temperature": 0.7, "top_p": 0.9}
    (tmp_path / "generation_config.json").write_text(json.dumps(settings), "utf-8")
    return tmp_path


def test_all_commands_of_a_model(model: Path) -> None:
    (model / "LICENSE").write_text('Use it.\f\n"""Freely."""\n', "utf-8")
    found = modelfile.commands(
        model,
        "m.gguf",
        stops=["<|end|>", "a"],
        longest=4096,
        template="{{ .Prompt }}",
        adapter="adapter.gguf",
        system="Be kind.",
        messages=[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}],
        license_name="mit",
        context=2048,
    )
    assert found == [
        ("FROM", "./m.gguf"),
        ("ADAPTER", "./adapter.gguf"),
        ("TEMPLATE", "{{ .Prompt }}"),
        ("SYSTEM", "Be kind."),
        ("PARAMETER stop", "<|end|>"),
        ("PARAMETER stop", "a"),
        ("PARAMETER temperature", "0.7"),
        ("PARAMETER top_p", "0.9"),
        ("PARAMETER num_ctx", "2048"),
        ("MESSAGE user", "Hi"),
        ("MESSAGE assistant", "Hello"),
        ("LICENSE", "Use it.\n'''Freely.'''"),
    ]
    assert modelfile.parse(modelfile.write(found)) == found


def test_only_what_is_known_is_written(model: Path) -> None:
    (model / "generation_config.json").unlink()
    found = modelfile.commands(model, "m.gguf", stops=["<|end|>"], longest=4096, license_name="apache-2.0")
    assert modelfile.write(found, ["Two\nlines"]) == (
        '# Two\n# lines\nFROM ./m.gguf\nPARAMETER stop "<|end|>"\nPARAMETER temperature 0\nPARAMETER num_ctx 4096\n'
        'LICENSE "apache-2.0"\n'
    )
