"""The renderer of Ollama's templates; tests/tiny/test_gotemplate_go.py asks real Go the same questions."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from export.ollama.dialogues import Dialogue, call, go_data, tool
from export.ollama.gofunctions import TemplateSyntaxError, quote
from export.ollama.gotemplate import render as render_data

DIALOGUE = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "{{ .System }}"},
]


DATA = go_data(Dialogue(DIALOGUE))


def render(template: str, data: dict[str, Any] = DATA) -> str:
    return render_data(template, data, today="2024-07-26")


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("plain { text }", "plain { text }"),
        ("{{ .System }}!", "Be kind.!"),
        ("a {{- `b` -}} c", "abc"),
        ("a\n{{/* a comment: }} and so on */}}b", "a\nb"),
        ('{{ "}} \\"{{\\" \\u00e9\\n" }}', '}} "{{" é\n'),
        ("{{ range .Messages }}[{{ .Role }}]{{ end }}", "[system][user][assistant][user]"),
        ("{{ range $i, $m := .Messages }}{{ $i }}{{ $m.Content }};{{ end }}", "0Be kind.;1Hi;2Hello;3{{ .System }};"),
        ("{{ range $m := .Messages }}{{ if eq $m.Role `user` }}{{ .Content }},{{ end }}{{ end }}", "Hi,{{ .System }},"),
        ("{{ (index .Messages 1).Content }}", "Hi"),
        ("{{ if .Tools }}t{{ else if .System }}s{{ else }}n{{ end }}", "s"),
        ('{{ if and .System (ne (index .Messages 0).Role "user") }}yes{{ else }}no{{ end }}', "yes"),
        ('{{ if or (eq (len .Messages) 3) (not .Response) }}{{ or "" "b" }}{{ end }}', "b"),
        ('{{ if eq (index .Messages 1).Role "tool" "user" }}one of{{ end }}', "one of"),
        (
            "{{ with .System }}{{ . }}{{ $.System }}{{ end }}{{ with .Response }}x{{ else }}none{{ end }}",
            "Be kind." * 2 + "none",
        ),
        ('{{ and (ne .System "") .Response }}{{ and (ne .System "") .System }}', "Be kind."),
        ("{{ range .Tools }}t{{ else }}no tools{{ end }}", "no tools"),
        (
            "{{ range $i, $m := .Messages }}{{ if gt $i 2 }}{{ range $.Messages }}{{ $i }}{{ end }}{{ end }}{{ end }}",
            "3333",
        ),
        ('{{ $x := "a" }}{{ range .Messages }}{{ $x }}{{ $x = .Role }}{{ end }}{{ $x }}', "asystemuserassistantuser"),
        ('{{ $x := "a" }}{{ if true }}{{ $x := "b" }}{{ $x }}{{ end }}{{ $x }}', "ba"),
        (
            '{{ define "r" }}{{ if . }}{{ slice . 0 1 }}-{{ template "r" (slice . 1) }}{{ end }}{{ end }}{{ template "r" "abc" }}',
            "a-b-c-",
        ),
        ('{{ slice "é" 0 1 }}{{ slice "é" 1 }}{{ len "é" }}', "é2"),
        ("{{ and .Response (index .Messages 9) }}{{ or .System (index .Messages 9) }}", "Be kind."),
        ("{{ slice currentDate 5 7 }}", "07"),
        (
            '{{ json "<é\\n\\u2028>" }}{{ printf "%s%q%T" "a" "b\\u200b" "c" }}',
            r'"\u003cé\n\u2028\u003e"a"b\u200b"string',
        ),
        ("{{ len (slice .Messages 1) }}{{ len (slice .Messages 1 2) }}", "31"),
    ],
)
def test_renders_as_go_does(template: str, expected: str) -> None:
    assert render(template) == expected


@pytest.mark.parametrize(
    "template",
    [
        "{{ .System",
        "{{ if .System }}",
        "{{ end }}",
        "{{ if .System }}a{{ else }}b",
        "{{ printf `%d` 3 }}",
        "{{ .Nothing }}",
        "{{ $x }}",
        "{{ .System | len }}",
        "{{ (eq .System .System }}",
        "{{ .System .System }}",
        "{{ eq .System 3 }}",
        "{{ .Messages }}",
        '{{ "\\q" }}',
        "{{ if .System }}a{{ else with .System }}b{{ end }}",
        "{{ $x = .System }}",
        '{{ template "none" . }}',
        '{{ define "x" }}a',
        "{{ index .Messages 4 }}",
        "{{ slice .System 3 2 }}",
    ],
)
def test_refuses_what_it_does_not_know(template: str) -> None:
    with pytest.raises(TemplateSyntaxError):
        render(template)


@given(st.text())
def test_a_quoted_text_prints_itself(text: str) -> None:
    assert render("<{{ " + quote(text) + " }}>") == f"<{text}>"


@given(st.text(alphabet='ab{}-" \n\t.', max_size=30))
def test_text_without_actions_is_kept(text: str) -> None:
    if "{{" not in text:
        assert render(text) == text


def test_calls_and_tools_are_what_ollama_gives() -> None:
    calls = [call("f", "id-1", b=[1.0, 0.00001, 1e21, True, None], a="<x>")]
    parameter = {"description": "A", "type": ["string", "null"], "enum": ["x"], "minimum": 1}
    data = go_data(
        Dialogue([{"role": "assistant", "content": "", "tool_calls": calls}], [tool("f", "About", z=parameter, a={})])
    )
    shown = "{{ range .Messages }}{{ range .ToolCalls }}{{ .ID }} {{ .Function.Name }} {{ .Function.Arguments }}{{ end }}{{ end }}"
    assert render(shown, data) == 'id-1 f {"a":"\\u003cx\\u003e","b":[1,0.00001,1e+21,true,null]}'
    over = "{{ range .Tools }}{{ range $name, $p := .Function.Parameters.Properties }}{{ $name }}{{ json $p }}{{ end }}{{ end }}"
    assert render(over, data) == 'a{}z{"type":["string","null"],"description":"A","enum":["x"]}'
