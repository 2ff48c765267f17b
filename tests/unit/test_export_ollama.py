"""Go templates derived from Jinja: equal for every plain dialogue, or refused with the dialogue that differs.

tests/tiny/test_ollama_templates.py does the same for tools and thinking, with real templates.
"""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from export import ollama
from export.ollama.derive import derive
from export.ollama.dialogues import Dialogue, call, collate, settled
from suite.errors import SuiteError
from tests.unit.jinja_templates import CHATML, PLAIN, reference


@pytest.mark.parametrize("jinja", PLAIN)
def test_a_derived_template_renders_every_plain_dialogue_as_the_jinja_does(jinja: str) -> None:
    template = ollama.compared(reference(jinja), derive(reference(jinja), tools=False, thinking=False))
    assert template.equal["plain"] >= 7
    assert not [name for name in template.differs if name.startswith("plain")]
    assert '"""' not in template.text


def test_dialogues_without_tools_that_differ_stop_the_export_unless_told_otherwise() -> None:
    model = reference(CHATML.replace("m.content", "(m.content | replace('{', '('))"))
    with pytest.raises(SuiteError, match="plain: braces") as caught:
        ollama.go_template(model)
    assert 'unequal = "warn"' in caught.value.hint
    assert 'template = "jinja"' in caught.value.hint
    assert [name for name in ollama.go_template(model, "warn").differs if name.startswith("plain")] == ["plain: braces"]


@pytest.mark.parametrize(
    ("jinja", "named"),
    [
        (CHATML.replace("m.content", "(m.content | upper)"), "QXUSER1QX|does not write User1"),
        (CHATML.replace("{% for m in messages %}", "{% for m in messages %}{{ loop.index }}"), "question"),
        (CHATML.replace("m.content", "(m.content if loop.last else '')"), "does not write User1"),
        (CHATML.replace("{% for", "{{ strftime_now('%H:%M') }}{% for", 1), "%H"),
        (CHATML.replace("m.content", "(m.content | tojson if loop.first else m.content)"), "QxUser1Qx|plain"),
        ("{{ raise_exception('never') }}", "refuses every question"),
    ],
)
def test_a_template_that_go_cannot_match_is_refused_with_the_difference(jinja: str, named: str) -> None:
    with pytest.raises(SuiteError, match=named) as caught:
        ollama.go_template(reference(jinja))
    assert "jinja" in caught.value.hint


@given(st.lists(st.tuples(st.sampled_from(["system", "user", "assistant", "tool"]), st.text(max_size=5)), max_size=12))
def test_collate_merges_neighbours_and_keeps_every_text(turns: list[tuple[str, str]]) -> None:
    system, merged = collate([{"role": role, "content": text} for role, text in turns])
    assert system == "\n\n".join(text for role, text in turns if role == "system")
    roles = [m["role"] for m in merged]
    assert all(a != b or a == "tool" for a, b in itertools.pairwise(roles))
    for role in ("user", "assistant"):
        together = "\n\n".join(m["content"] for m in merged if m["role"] == role)
        assert together == "\n\n".join(text for r, text in turns if r == role)
    assert sum(role == "tool" for role, _ in turns) == roles.count("tool")


def test_what_ollama_changes_before_a_template_sees_it() -> None:
    given_tool = {
        "type": "function",
        "strict": True,
        "function": {
            "name": "f",
            "parameters": {
                "properties": {"b": {"minimum": 1, "description": "B", "type": "number"}, "a": {"type": "string"}},
                "type": "object",
            },
        },
    }
    asked = {"role": "assistant", "content": "", "tool_calls": [call("f", b=2.0, a={"d": 1, "c": 0.5})]}
    seen = settled(Dialogue([asked], [given_tool]))
    assert list(seen.tools[0]["function"]["parameters"]["properties"]) == ["a", "b"]
    assert list(seen.tools[0]["function"]["parameters"]["properties"]["b"].items()) == [
        ("type", "number"),
        ("description", "B"),
    ]
    assert str(seen.messages[0]["tool_calls"][0]["function"]["arguments"]) == "{'a': {'c': 0.5, 'd': 1}, 'b': 2}"
    assert settled(seen) == seen
