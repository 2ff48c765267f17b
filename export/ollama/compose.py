"""Composes a Go template from pieces found in a model's prompts: what stands where, and on what it depends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from export.ollama.marks import Lifter, common_end, common_start

Parts = dict[str, str]
"""Pieces of the template by what they are, as lifted text."""
AFTER_RESULT = 'eq $before "tool"'
NOW = "gt $i $last"
"""The message comes after the last question."""
END = "eq (len (slice $.Messages $i)) 1"
"""The message is the last."""


_EACH = "{{ range $i, $m := .Messages }}{{ if "
VARIABLES = {
    "$first": f'{{{{ $first := -1 }}}}{_EACH}and (lt $first 0) (eq .Role "user") }}}}{{{{ $first = $i }}}}',
    "$last": f'{{{{ $last := -1 }}}}{_EACH}eq .Role "user" }}}}{{{{ $last = $i }}}}',
    "$system": f'{{{{ $system := "" }}}}{_EACH}eq .Role "system" }}}}{{{{ $system = .Content }}}}',
    "$given": f'{{{{ $given := false }}}}{_EACH}eq .Role "system" }}}}{{{{ $given = true }}}}',
}
"""What a template has to know before its first message, by the variables that it then uses."""


Given = Literal["none", "empty", "given"]


class Case(NamedTuple):
    """What a request gives beside its questions and answers."""

    tools: bool
    system: Given
    think: bool | None


class System(NamedTuple):
    """Where a template finds the system text: its text, and whether there is one."""

    text: str
    given: str


FIRST = System("(index $.Messages 0).Content", 'eq (index $.Messages 0).Role "system"')
LAST = System("$system", "$given")
ALL = System("$.System", "$given")


class Series(NamedTuple):
    """What stands before, around, between and after things in a row."""

    before: str
    opening: str
    separator: str
    closing: str
    after: str

    @classmethod
    def of(cls, before: str, between: str, after: str) -> Series:
        """The series with these texts before the first thing, between two, and after the last."""
        opening = common_end(before, between)
        rest = between.removesuffix(opening)
        closing = common_start(rest, after)
        separator = rest.removeprefix(closing)
        return cls(before.removesuffix(opening), opening, separator, closing, after.removeprefix(closing))


def merged(lifter: Lifter, system: System, values: dict[Case, str]) -> str:
    """One piece for all cases: where they differ, it branches on what the request gives."""
    by_system: dict[tuple[bool, str], str] = {}
    for tools, given in sorted({(case.tools, case.system) for case in values}):
        think = {c.think: text for c, text in values.items() if (c.tools, c.system) == (tools, given)}
        by_system[tools, given] = _by_think(lifter, think)
    by_tools: dict[bool, str] = {}
    for tools in sorted({tools for tools, _ in by_system}):
        by_tools[tools] = _by_system(lifter, system, {s: text for (t, s), text in by_system.items() if t == tools})
    if len(by_tools) == 1:
        return next(iter(by_tools.values()))
    return lifter.branch("$.Tools", by_tools[True], by_tools[False])


def _by_think(lifter: Lifter, texts: dict[bool | None, str]) -> str:
    unset = texts.get(None, next(iter(texts.values())))
    on, off = texts.get(True, unset), texts.get(False, unset)
    if on == unset:
        return lifter.branch("and $.IsThinkSet (not $.Think)", off, unset)
    return lifter.branch("$.Think", on, lifter.branch("$.IsThinkSet", off, unset))


def _by_system(lifter: Lifter, system: System, texts: dict[str, str]) -> str:
    present = texts.get("given", texts.get("empty"))
    if present is None or "none" not in texts:
        return present or texts["none"]
    empty, none = texts.get("empty", present), texts["none"]
    if empty in (present, lifter.without(present, system.text)):
        return lifter.branch(system.given, present, none)
    if empty == none:
        return lifter.branch(f"and ({system.given}) {system.text}", present, none)
    return lifter.branch(system.given, lifter.branch(system.text, present, empty), none)


def compose(lifter: Lifter, parts: Parts) -> str:
    """The Go template made of `parts`."""
    return lifter.to_go(_Writer(lifter, parts).template())


@dataclass
class _Writer:
    """Puts the pieces together."""

    lifter: Lifter
    parts: Parts

    def template(self) -> str:
        """The whole template, as lifted text."""
        action, branch = self.lifter.action, self.lifter.branch
        grouped, result, generate = self.results()
        roles = {'eq .Role "user"': self.question(), 'eq .Role "assistant"': self.answer()}
        roles |= {'eq .Role "tool"': result} if result else {}
        roles |= {'and (eq .Role "system") $i': self.parts.get("later system", "")}
        body = self.lifter.choice({condition: text for condition, text in roles.items() if text})
        if grouped:
            tail = self.parts["result tail"]
            body = branch(f'and ({AFTER_RESULT}) (ne .Role "tool")', tail, "") + body
        text = self.parts["opening"] + action("{{ range $i, $m := .Messages }}") + body
        uses = self.lifter.to_go(text + generate)
        variables = ""
        if "$before" in uses:
            variables += action('{{ $before := "" }}')
            text += action("{{ $before = .Role }}")
        variables += "".join(action(go + 2 * "{{ end }}") for name, go in VARIABLES.items() if name in uses)
        return variables + text + action("{{ end }}") + generate

    def question(self) -> str:
        """A question, whose beginning may depend on where in the dialogue it stands."""
        parts, branch = self.parts, self.lifter.branch
        first, later = (
            branch(
                END,
                parts[f"{name} end"],
                branch("eq $i $last", parts.get(f"{name} last", parts[f"{name} end"]), parts[name]),
            )
            for name in ("question first", "question")
        )
        return branch("eq $i $first", first, later) + parts["question text"] + parts["question tail"]

    def answer(self) -> str:
        """An answer, or calls with what stands before them."""
        parts, branch = self.parts, self.lifter.branch
        plain = branch(".Thinking", parts.get("answer thinking", parts["answer"]), parts["answer"])
        if "call" not in parts:
            return plain + parts["answer tail"]
        opener, loop, tail = self.calls()
        leads = {name: text[: len(text) - len(opener)] for name, text in parts.items() if name.startswith("lead")}

        def lead(name: str) -> str:
            return branch(".Thinking", leads.get(f"{name} thinking", leads[name]), leads[name])

        now, earlier = (branch(".Content", lead(f"{name} content"), lead(name)) for name in ("lead now", "lead"))
        head = branch("(len .ToolCalls)", branch(NOW, now, earlier), plain)
        return head + branch(".ToolCalls", loop + tail, parts["answer tail"])

    def calls(self) -> tuple[str, str, str]:
        """What opens the calls in all messages that have some, the loop over them, and what ends the message."""
        parts, lifter = self.parts, self.lifter
        shared = common_end(*(text for name, text in parts.items() if name.startswith("lead")))
        shared = shared[next((i for i in range(len(shared), 0, -1) if lifter.is_action(shared[i - 1])), 0) :]
        lead, tail = parts["lead"], parts["call tail"]
        new = lead[len(common_start(lead, parts["answer"])) :]
        between = parts.get("calls between", lead + tail)
        found = [(o, Series.of(o, between, tail)) for o in (shared, new if shared.endswith(new) else shared)]
        opener, series = found[0] if not found[0][1].separator else found[1]
        each = series.opening + parts["call"] + series.closing
        return opener, series.before + lifter.loop("range .ToolCalls", each, series.separator), series.after

    def results(self) -> tuple[bool, str, str]:
        """Whether results of one message are grouped, a result, and what opens the next answer."""
        parts, branch = self.parts, self.lifter.branch
        if "result" not in parts:
            return False, "", parts["generate"]
        head, between, tail, generate = (
            parts[name] for name in ("result head", "result between", "result tail", "generate after result")
        )
        if between == tail + head and generate.startswith(tail):
            after = branch(AFTER_RESULT, generate.removeprefix(tail), parts["generate"])
            return False, head + parts["result"] + tail, after
        after = branch(AFTER_RESULT, generate, parts["generate"])
        return True, branch(AFTER_RESULT, between, head) + parts["result"], after
