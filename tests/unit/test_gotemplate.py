"""The renderer of Ollama's templates; tests/tiny/test_gotemplate_go.py asks real Go the same questions."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from export.gotemplate import TemplateSyntaxError, collate, quote, render

DIALOGUE = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "{{ .System }}"},
]


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
    ],
)
def test_renders_as_go_does(template: str, expected: str) -> None:
    assert render(template, DIALOGUE) == expected


@pytest.mark.parametrize(
    "template",
    [
        "{{ .System",
        "{{ if .System }}",
        "{{ end }}",
        "{{ if .System }}a{{ else }}b",
        "{{ printf `%s` .System }}",
        "{{ .Nothing }}",
        "{{ $x }}",
        "{{ $x := .System }}{{ $x }}",
        "{{ .System | len }}",
        "{{ (eq .System .System }}",
        "{{ .System .System }}",
        "{{ eq .System 3 }}",
        "{{ .Messages }}",
        '{{ "\\q" }}',
        "{{ if .System }}a{{ else with .System }}b{{ end }}",
    ],
)
def test_refuses_what_it_does_not_know(template: str) -> None:
    with pytest.raises(TemplateSyntaxError):
        render(template, DIALOGUE)


@given(st.text())
def test_a_quoted_text_prints_itself(text: str) -> None:
    assert render("<{{ " + quote(text) + " }}>", DIALOGUE) == f"<{text}>"


@given(st.text(alphabet='ab{}-" \n\t.', max_size=30))
def test_text_without_actions_is_kept(text: str) -> None:
    if "{{" not in text:
        assert render(text, DIALOGUE) == text


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
