"""Marked contents, and rendered text in which they have become actions of a Go template.

A model's Jinja is rendered with contents such as QxUser1Qx. Wherever one stands in the result, in whichever form (as
it was, stripped, as JSON), the Go template needs the action that prints it so. Text in which that replacement was made
is *lifted*: each action is one character of a private plane, so that lifted text can be compared, cut and joined as
text. `to_go` writes it out.
"""

from __future__ import annotations

import json
import re
from typing import Any

from export.ollama.gofunctions import quote
from suite.errors import SuiteError

END = "{{ end }}"
UNSAFE = re.compile(r'\{\{+|\{\Z|"{3,}|[^\n\t\x20-\x7e]+')
FIRST = 0xF0000
"""Where the characters that stand for actions begin (Supplementary Private Use Area-A)."""
PADDING = ("\n\n\n\n\n\t ", " \t\n\n\n\n\n")
"""White space around the marks of contents: what of it is left shows what a template strips."""
KEPT = ((PADDING[0], "kept"), (PADDING[0].lstrip("\n"), "newlines"), ("", "spaces"))
DATE = re.compile(r"QxDate\[(.*?)\]Qx")
DATE_PARTS = {
    "%Y": "{{ slice currentDate 0 4 }}",
    "%m": "{{ slice currentDate 5 7 }}",
    "%d": "{{ slice currentDate 8 10 }}",
}
MONTHS = ["January", "February", "March", "April", "May", "June", "July"]
MONTHS += ["August", "September", "October", "November", "December"]
SPACES = {
    1: [" ", "\t", "\n", "\x0b", "\x0c", "\r", "\x1c", "\x1d", "\x1e", "\x1f"],
    2: ["\x85", "\xa0"],
    3: ["\u1680", *map(chr, range(0x2000, 0x200B)), "\u2028", "\u2029", "\u202f", "\u205f", "\u3000"],
}
"""What Python's str.strip takes away, by its bytes in UTF-8."""

OUTSIDE = r"""{{ define "json" }}{{ if . }}{{ $c := slice . 0 1 }}{{ $c }}
{{- if eq $c "\"" }}{{ template "json text" (slice . 1) }}
{{- else }}{{ if eq $c "," ":" }} {{ end }}{{ template "json" (slice . 1) }}{{ end }}{{ end }}{{ end }}{{/*
*/}}"""
INSIDE = r"""{{ define "json text" }}{{ $c := slice . 0 1 }}
{{- if eq $c "\"" }}{{ $c }}{{ template "json" (slice . 1) }}
{{- else if eq $c "\\" }}{{ template "json escape" . }}
{{- else if and (gt (len .) 24) (eq (printf "%q" (slice . 0 24)) (printf "\"%s\"" (slice . 0 24))) }}
{{- slice . 0 24 }}{{ template "json text" (slice . 24) }}
{{- else }}{{ $c }}{{ template "json text" (slice . 1) }}{{ end }}{{ end }}{{/*
*/}}{{ define "json escape" }}{{ if ne (slice . 1 2) "u" }}{{ slice . 0 2 }}{{ template "json text" (slice . 2) }}
{{- else }}{{ $u := slice . 2 6 }}
{{- if eq $u "003c" }}<{{ else if eq $u "003e" }}>{{ else if eq $u "0026" }}&{{ else if eq $u "0008" }}\b
{{- else if eq $u "000c" }}\f{{ else if eq $u "2028" }}{{ "\u2028" }}{{ else if eq $u "2029" }}{{ "\u2029" }}
{{- else }}\u{{ $u }}{{ end }}{{ template "json text" (slice . 6) }}{{ end }}{{ end }}{{/*
*/}}"""
JSON = OUTSIDE + INSIDE
"""Go's JSON as Python writes it: with a space after each comma and colon, and without the escapes for HTML. "json"
reads what is outside of strings, "json text" what is inside, byte after byte; a chunk without quotes in one step."""
INDENTED = r"""{{ define "indented" }}{{ if . }}{{ $c := slice . 0 1 }}{{ $rest := slice . 1 }}
{{- if eq $c "\"" }}{{ $c }}{{ template "indented text" $rest }}
{{- else if and (eq $c "{" "[") (eq (slice $rest 0 1) "}" "]") }}
{{- slice . 0 2 }}{{ template "indented" (slice . 2) }}
{{- else if eq $c "{" "[" }}{{ $c }}{{ "\n" }}{{ $more := printf "%s\t" $rest }}
{{- template "tabs" $more }}{{ template "indented" $more }}
{{- else if eq $c "}" "]" }}{{ "\n" }}{{ $less := slice $rest 0 (len (slice $rest 1)) }}
{{- template "tabs" $less }}{{ $c }}{{ template "indented" $less }}
{{- else if eq $c "," }}{{ $c }}{{ "\n" }}{{ template "tabs" $rest }}{{ template "indented" $rest }}
{{- else if ne $c "\t" }}{{ $c }}{{ if eq $c ":" }} {{ end }}{{ template "indented" $rest }}
{{- end }}{{ end }}{{ end }}{{/*
*/}}{{ define "tabs" }}{{ if . }}{{ if eq (slice . (len (slice . 1))) "\t" }}    {{/*
*/}}{{ template "tabs" (slice . 0 (len (slice . 1))) }}{{ end }}{{ end }}{{ end }}{{/*
*/}}""" + INSIDE.replace('"json', '"indented')
"""The same with line breaks and four spaces for each level; as many tabs as levels stand after the JSON."""
INDENTED_TOOL = r"""{{ define "indented tool" }}{{ $about := "" }}{{ $required := "" }}{{ $p := .Function.Parameters }}
{{- if .Function.Description }}{{ $about = printf "\"description\":%s," (json .Function.Description) }}{{ end }}
{{- if $p.Required }}{{ $required = printf ",\"required\":%s" (json $p.Required) }}{{ end }}
{{- template "indented" (printf
 "{\"type\":\"function\",\"function\":{\"name\":%s,%s\"parameters\":{\"type\":%s,\"properties\":%s%s}}}"
 (json .Function.Name) $about (json $p.Type) (json $p.Properties) $required) }}{{ end }}{{/*
*/}}"""
PARAMETERS = """{{ define "parameters" }}{"type": {{ template "json" (json .Type) }}
{{- if .Defs }}, "$defs": {{ template "json" (json .Defs) }}{{ end }}, "properties": {{/*
*/}}{{ template "json" (json .Properties) }}
{{- if .Required }}, "required": {{ template "json" (json .Required) }}{{ end }}}{{ end }}{{/*
*/}}"""
FUNCTION = """{{ define "function" }}{"name": {{ template "json" (json .Name) }}
{{- if .Description }}, "description": {{ template "json" (json .Description) }}{{ end }}, "parameters": {{/*
*/}}{{ template "parameters" .Parameters }}}{{ end }}{{/*
*/}}"""
TOOL = """{{ define "tool" }}{"type": "function", "function": {{ template "function" .Function }}}{{ end }}{{/*
*/}}"""
DEFINITIONS = {"tool": TOOL, "function": FUNCTION, "parameters": PARAMETERS, "json": JSON}
DEFINITIONS |= {"indented tool": INDENTED_TOOL, "indented": INDENTED}


class Lifter:
    """Turns rendered text with marks into lifted text, and lifted text into Go."""

    def __init__(self) -> None:
        self.actions: dict[str, str] = {}
        self.forms: dict[str, tuple[str, str]] = {}

    def action(self, go: str) -> str:
        """The character that stands for `go`, an action of a Go template."""
        return self.actions.setdefault(go, chr(FIRST + len(self.actions)))

    def mark(self, form: str, name: str, go: str) -> None:
        """Whatever looks like `form` in rendered text belongs to the mark `name`, and is printed by `go`."""
        self.forms[form] = (name, go)

    def content(self, name: str, go: str) -> str:
        """A content to render: its mark with white space around, known in all forms that templates give it."""
        bare = f"Qx{name}Qx"
        for left, stripped_left in KEPT:
            for right, stripped_right in ((p[::-1], s) for p, s in KEPT):
                self.mark(left + bare + right, name, _stripped(go, stripped_left, stripped_right))
        full = PADDING[0] + bare + PADDING[1]
        self.value(name, full, go)
        return full

    def value(self, name: str, value: Any, go: str) -> Any:
        """A value, known as JSON in rendered text."""
        self.mark(json.dumps(value, ensure_ascii=False), name, f'{{{{ template "json" (json {go}) }}}}')
        return value

    def lift(self, text: str) -> list[tuple[str, str]]:
        """`text` as (mark, lifted text); literal text has no mark. Raises SuiteError for a mark in an unknown form."""
        found: list[tuple[str, str]] = []
        position = 0
        for start, form in self._forms_in(text):
            name, go = self.forms[form]
            found += [("", self._literal(text[position:start])), (name, self.action(go))]
            position = start + len(form)
        return [*found, ("", self._literal(text[position:]))]

    def _forms_in(self, text: str) -> list[tuple[int, str]]:
        """Where in `text` which form stands; a form inside a longer one does not count."""
        taken, found = bytearray(len(text)), []
        for form in sorted(self.forms, key=len, reverse=True):
            start = text.find(form)
            while start >= 0:
                if not any(taken[start : start + len(form)]):
                    taken[start : start + len(form)] = b"x" * len(form)
                    found.append((start, form))
                start = text.find(form, start + 1)
        return sorted(found)

    def _literal(self, text: str) -> str:
        text = DATE.sub(lambda match: self.action(_date(match[1])), text)
        if leftover := re.search("Qx[A-Z][A-Za-z0-9]*Qx", text):
            raise refused(f"it writes {text[max(0, leftover.start() - 20) : leftover.end() + 20]!r}")
        return text

    def branch(self, condition: str, yes: str, no: str) -> str:
        """Lifted text that is `yes` where the Go condition holds, else `no`; what both have is written once."""
        head = self._shared(yes, no)
        before, yes, no = yes[:head], yes[head:], no[head:]
        tail = self._shared(yes, no, from_end=True)
        after, yes, no = yes[len(yes) - tail :], yes[: len(yes) - tail], no[: len(no) - tail]
        if not yes and not no:
            return before + after
        if not yes:
            condition, yes, no = f"not ({condition})", no, yes
        otherwise = self.action("{{ else }}") + no if no else ""
        return before + self.action(f"{{{{ if {condition} }}}}") + yes + otherwise + self.action(END) + after

    def _shared(self, one: str, other: str, *, from_end: bool = False) -> int:
        """How many characters both begin (or end) with, cutting neither blocks of Go nor words of text."""
        step = -1 if from_end else 1
        blocks = {
            c for go, c in self.actions.items() if go.startswith(("{{ if ", "{{ range ")) and not go.endswith(END)
        }
        ends = {self.actions.get(END, "")}
        opening, closing = (ends, blocks) if from_end else (blocks, ends)
        depth = best = 0
        for n, (a, b) in enumerate(zip(one[::step], other[::step], strict=False), 1):
            depth += (a in opening) - (a in closing)
            if a != b or depth < 0:
                break
            whole = n == min(len(one), len(other))
            if not depth and (whole or a in ("\n", "<" if from_end else ">") or a >= chr(FIRST)):
                best = n
        return best

    def choice(self, texts: dict[str, str]) -> str:
        """Lifted text that is the one whose Go condition holds first; nothing where none does."""
        tests = [
            self.action(f"{{{{ {'else ' * (i > 0)}if {c} }}}}") + text for i, (c, text) in enumerate(texts.items())
        ]
        return "".join(tests) + self.action(END)

    def loop(self, over: str, body: str, separator: str = "") -> str:
        """Lifted text that is `body` for each item, with `separator` between them."""
        if any(map(self.is_action, separator)):
            raise refused(f"what it writes between things in a row is not always the same: {separator!r}")
        if separator:
            start = self.action('{{ $separator := "" }}')
            body = self.action("{{ $separator }}") + body
            over, after = over, self.action(f"{{{{ $separator = {quote(separator)} }}}}")
            return start + self.action(f"{{{{ {over} }}}}") + body + after + self.action(END)
        return self.action(f"{{{{ {over} }}}}") + body + self.action(END)

    def without(self, lifted: str, go: str) -> str:
        """Lifted text in which the content printed by `go` is empty."""
        actions = {
            char for action, char in self.actions.items() if action.endswith((f" {go} }}}}", f" (json {go}) }}}}"))
        }
        return "".join(char for char in lifted if char not in actions)

    def is_action(self, char: str) -> bool:
        """Whether a character of lifted text stands for an action."""
        return char >= chr(FIRST)

    def to_go(self, lifted: str) -> str:
        """The Go template, after the definitions that it needs."""
        go = {char: action for action, char in self.actions.items()}
        body = "".join(go.get(piece) or literal(piece) for piece in re.split(f"([{chr(FIRST)}-\U000ffffd])", lifted))
        return _definitions(body) + body


def literal(text: str) -> str:
    """`text` for a template inside a Modelfile, which knows no escapes and drops what cannot be printed."""

    def safe(match: re.Match[str]) -> str:
        found = match[0]
        return found if found[0] not in '{"' and found.isprintable() else f"{{{{ {quote(found)} }}}}"

    return UNSAFE.sub(safe, text)


def common_start(*texts: str) -> str:
    """The longest text with which all begin."""
    n = next((n for n, chars in enumerate(zip(*texts, strict=False)) if len(set(chars)) > 1), min(map(len, texts)))
    return texts[0][:n]


def common_end(*texts: str) -> str:
    """The longest text with which all end."""
    return common_start(*(text[::-1] for text in texts))[::-1]


def refused(reason: str) -> SuiteError:
    """No Go template is equal, because of `reason`."""
    return SuiteError(
        f"no Go template renders exactly as the model's own: {reason}",
        hint='template = "jinja" leaves it out: Ollama then renders the Jinja in the GGUF',
    )


def _date(form: str) -> str:
    """Actions that print the date of the day as strftime does."""
    parts = re.split("(%.)", form)
    return "".join(_date_part(part) if i % 2 else literal(part) for i, part in enumerate(parts))


def _date_part(directive: str) -> str:
    if directive in ("%b", "%B"):
        names = [month[:3] if directive == "%b" else month for month in MONTHS]
        tests = [f'if eq (slice currentDate 5 7) "{i:02}" }}}}{name}' for i, name in enumerate(names, 1)]
        return "{{ " + "{{ else ".join(tests) + "{{ end }}"
    if directive not in DATE_PARTS:
        raise refused(f"it writes the date of the day as {directive}, which Ollama's templates do not know")
    return DATE_PARTS[directive]


def _stripped(go: str, left: str, right: str) -> str:
    """An action that prints a text without the white space that a template strips."""
    return f"{{{{ {go} }}}}" if left == right == "kept" else f'{{{{ template "strip {left} {right}" {go} }}}}'


def _strip(name: str) -> str:
    """The definition of a template that prints its text without white space at one or both ends."""
    _, left, right = name.split()
    again = f'}}}}{{{{ template "{name}"'
    tests = []
    for what, part, rest in ((left, "0 {n}", "{n}"), (right, "(len (slice . {n}))", "0 (len (slice . {n}))")):
        sets = {1: ["\n"]} if what == "newlines" else SPACES if what == "spaces" else {}
        for n, spaces in sets.items():
            known = " ".join(map(quote, spaces))
            test = f"if and (ge (len .) {n}) (eq (slice . {part.format(n=n)}) {known})"
            tests.append(f"{test} {again} (slice . {rest.format(n=n)}) }}}}")
    chain = "\n{{- else ".join(tests)
    return (
        f'{{{{ define "{name}" }}}}\n{{{{- {chain}\n{{{{- else }}}}{{{{ . }}}}{{{{ end }}}}{{{{ end }}}}{{{{/*\n*/}}}}'
    )


def _definitions(body: str) -> str:
    """What `body` calls, and what that calls."""
    needed: dict[str, str] = {}
    waiting = re.findall('template "([^"]+)"', body)
    while waiting:
        name = waiting.pop(0)
        if name not in needed and (name in DEFINITIONS or name.startswith("strip ")):
            needed[name] = _strip(name) if name.startswith("strip ") else DEFINITIONS[name]
            waiting += re.findall('template "([^"]+)"', needed[name])
    return "".join(needed.values())
