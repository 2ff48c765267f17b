"""Our renderer of Ollama's templates against Go's own text/template."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from export import gotemplate, ollama
from suite.chat import Chat
from tests.tiny.tiny_models import CHAT_TEMPLATE, tiny_tokenizer

GO = shutil.which("go")
pytestmark = pytest.mark.skipif(GO is None, reason="Go is not installed (Debian: apt-get install golang-go)")

PROGRAM = """
package main

import (
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type Message struct{ Role, Content, Thinking, ToolName, ToolCallID string }

type Case struct {
	Template string
	Messages []Message
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

func main() {
	var cases []Case
	if err := json.NewDecoder(os.Stdin).Decode(&cases); err != nil {
		panic(err)
	}
	results := make([]string, len(cases))
	for i, c := range cases {
		parsed, err := template.New("").Option("missingkey=zero").Parse(c.Template)
		if err == nil {
			system, messages := collate(c.Messages)
			var out strings.Builder
			err = parsed.Execute(&out, map[string]any{"System": system, "Messages": messages, "Response": ""})
			results[i] = out.String()
		}
		if err != nil {
			results[i] = "error: " + err.Error()
		}
	}
	if err := json.NewEncoder(os.Stdout).Encode(results); err != nil {
		panic(err)
	}
}
"""

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
JINJA = [
    CHAT_TEMPLATE,
    (Path(__file__).parents[2] / "examples/nano/chat_template.jinja").read_text("utf-8"),
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou are \"Q\".<|im_end|>\n' }}{% endif %}" + CHATML,
    "{{ messages[0].content if messages[0].role == 'system' and messages[0].content else 'Default.' }}\n"
    "{% for m in messages %}{% if m.role != 'system' %}{{ m.role + ': ' + m.content + '\n' }}"
    "{% elif not loop.first %}{{ 'later: ' + m.content + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}",
    "{{ '\\u200b{{' }}{% for m in messages %}{{ '\"\"\"{' + m.role + '}}{' + m.content + '\"\"\"' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '{' }}{% endif %}",
]
HAND_WRITTEN = [
    '{{ range $i, $m := .Messages }}{{ $i }}{{ if eq $m.Role `user` "tool" }}[{{ .Content }}]{{ else }}-{{ end }}{{ end }}',
    "{{- if .System }} {{ .System -}} \n x{{ end }}{{/* note */}}\t{{ (index .Messages 0).Role }}",
    '{{ range .Messages }}{{ if and (ne .Role "system") .Content }}{{ or .ToolName .Content }}{{ end }}{{ end }}',
    '{{ "\\u200b\\U0001f600}} \\"" }}{{ len .System }}{{ len .Messages }}{{ if gt (len .Messages) 3 }}long{{ end }}',
    "{{ with .System }}{{ . }}{{ else }}none{{ end }}{{ range $m := .Messages }}{{ not $m.Content }}{{ end }}",
]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("go")
    (folder / "main.go").write_text(PROGRAM, "utf-8")
    (folder / "go.mod").write_text("module render\n\ngo 1.19\n", "utf-8")
    environment = {**os.environ, "GOFLAGS": "", "GOTOOLCHAIN": "local", "GOCACHE": str(folder / "cache")}
    subprocess.run([str(GO), "build", "-o", "render", "."], cwd=folder, env=environment, check=True)
    return folder / "render"


def derived(jinja: str) -> str:
    chat = Chat(tiny_tokenizer(template=jinja))
    return ollama.derive(lambda messages, generate: chat.text(messages, generate=generate))


def test_go_renders_the_same(program: Path) -> None:
    """Every template that exports derive, and some by hand, on every probe dialogue."""
    templates = [*map(derived, JINJA), *HAND_WRITTEN]
    cases = [(template, messages) for template in templates for messages in ollama.dialogues().values()]
    asked = [
        {"Template": template, "Messages": [{"Role": m["role"], "Content": m["content"]} for m in messages]}
        for template, messages in cases
    ]
    done = subprocess.run([str(program)], input=json.dumps(asked), capture_output=True, text=True, check=True)
    for (template, messages), theirs in zip(cases, json.loads(done.stdout), strict=True):
        assert gotemplate.render(template, messages) == theirs, template
