"""Go templates for Ollama with tools and thinking: equal for every dialogue, or refused with those that differ."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from export import ollama
from export.ollama.dialogues import Dialogue, Message, call, go_prompt, probes, tool
from suite.errors import SuiteError
from tests.unit.jinja_templates import CHATML, LISTED, THINKING, XML, reference


@cache
def template_of(jinja: str) -> ollama.GoTemplate:
    return ollama.go_template(reference(jinja), "warn")


@pytest.mark.parametrize("jinja", [THINKING, LISTED, XML])
def test_a_derived_template_covers_tools_and_thinking(jinja: str) -> None:
    template = ollama.go_template(reference(jinja))
    assert template.equal == {kind: len(dialogues) for kind, dialogues in probes().items()}
    assert "$.Tools" in template.text
    assert 'eq .Role "tool"' in template.text  # Ollama looks for these words


def test_what_ollama_infers_from_the_template_is_there() -> None:
    """The tag that opens a call is the first text in `if .ToolCalls`; the tags of thinking stand around it."""
    text = template_of(THINKING).text
    assert "{{ if .ToolCalls }}{{ range .ToolCalls }}\n<tool_call>\n{" in text
    assert "{{ if .Thinking }}<think>\n{{" in text
    assert ".Thinking }}\n</think>\n\n{{" in text
    assert "{{ if and $.IsThinkSet (not $.Think) }}<think>\n\n</think>\n\n{{ end }}" in text


WORDS = st.text(st.characters(codec="utf-8"), max_size=12) | st.sampled_from(
    ['"', "\\", "{{ . }}", "<&>", "\u2028\x00", "你好", "👩‍🚀", "\n", "```", '"""', "x" * 60]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=6,
)
TOOLS = st.builds(
    lambda name, about, names: tool(name, about, **{n: {"type": "string", "description": about} for n in names}),
    st.sampled_from(["find", "look_up"]),
    WORDS,
    st.lists(WORDS.filter(lambda name: name not in ("name", "description")), max_size=2),
)


@st.composite
def dialogues(draw: Any) -> Dialogue:
    """Any texts, calls with any arguments and their results; ends with a question or a result."""
    messages: list[Message] = [{"role": "system", "content": draw(WORDS)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(WORDS)})
        for _ in range(draw(st.integers(0, 2))):
            calls = [
                {**call("find"), "function": {"name": "find", "arguments": arguments}}
                for arguments in draw(st.lists(st.dictionaries(WORDS, VALUES, max_size=3), min_size=1, max_size=2))
            ]
            messages.append({"role": "assistant", "content": draw(WORDS), "tool_calls": calls})
            messages += [{"role": "tool", "content": draw(WORDS), "tool_call_id": "a1b2c3d4e"} for _ in calls]
        messages.append({"role": "assistant", "content": draw(WORDS), "thinking": draw(WORDS.filter(str.strip))})
    end = -1 if draw(st.booleans()) or messages[-2]["role"] != "tool" else None
    messages = [*messages, {"role": "user", "content": draw(WORDS)}] if end else messages[:-1]
    return Dialogue(messages, draw(st.lists(TOOLS, max_size=2)), draw(st.sampled_from([None, True, False])))


@given(dialogues())
@settings(max_examples=60, deadline=None)
def test_a_derived_template_is_right_for_any_dialogue(dialogue: Dialogue) -> None:
    for jinja in (THINKING, XML):
        assert go_prompt(template_of(jinja).text, dialogue) == reference(jinja).prompt(dialogue)


TOOLS_AS_PYTHON = THINKING.replace("'\n' + t | tojson", "'\n' ~ t")


def test_dialogues_that_differ_stop_the_export_unless_told_otherwise() -> None:
    with pytest.raises(SuiteError, match="tools: one tool") as caught:
        ollama.go_template(reference(TOOLS_AS_PYTHON))
    assert 'unequal = "warn"' in caught.value.hint
    template = ollama.go_template(reference(TOOLS_AS_PYTHON), "warn")
    assert template.equal["plain"] == len(probes()["plain"])
    assert "$.Tools" not in template.text
    assert all(not name.startswith("plain") for name in template.differs)
    assert template.as_json()["dialogues"] == sum(template.equal.values())


def test_the_notes_say_which_template_is_used_and_what_differs(tmp_path: Path) -> None:
    def notes(jinja: str, template: ollama.GoTemplate | None) -> str:
        (tmp_path / "chat_template.jinja").write_text(jinja, "utf-8")
        return " ".join(ollama.notes(tmp_path, template))

    whole = notes(THINKING, template_of(THINKING))
    assert "for all probe dialogues (16 plain, 25 tools, 12 thinking)" in whole
    assert "render the Jinja" not in whole
    assert '"think"' in whole
    partly = notes(TOOLS_AS_PYTHON, template_of(TOOLS_AS_PYTHON))
    assert "not for: tools: one tool;" in partly
    assert "OLLAMA_GO_TEMPLATE=1" in partly
    assert "OLLAMA_GO_TEMPLATE=0" in notes(CHATML, None)
    assert '"think"' not in notes(CHATML, template_of(CHATML))
