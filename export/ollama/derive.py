"""Derives a Go template for Ollama from a model's Jinja, by rendering marked contents and looking what stands around.

The text between two contents belongs to the end of one message and the beginning of the next. Comparing dialogues
tells where one ends and the other begins, and whether that depends on tools being offered, on the system text, on
thinking, or on where in the dialogue a message stands. Each difference becomes a branch of the template.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any, get_args

from export.ollama.compose import ALL, FIRST, LAST, Case, Given, Parts, Series, System, compose, merged
from export.ollama.dialogues import Dialogue, Message, Reference, Tool, call, tool
from export.ollama.marks import Lifter, common_start, refused
from suite.errors import SuiteError

ARGUMENTS = "range $name, $value := .Function.Arguments"
IS_TEXT = 'eq (printf "%T" $value) "string"'


def derive(reference: Reference, tools: bool, thinking: bool) -> str:
    """A Go template, with tools and thinking or without; raises SuiteError when the Jinja cannot be taken apart."""
    lifter = Lifter()
    plain = _Probe(reference, lifter, Case(False, "none", None), tools=False, thinking=False)
    system = plain.system_place()
    found: dict[Case, Parts] = {}
    thinks = (None, True, False) if thinking and plain.heeds_think(tools) else (None,)
    for case in (Case(*given) for given in product((False, True), get_args(Given), thinks)):
        if tools or not case.tools:
            with suppress(_RefusedByJinjaError):
                found[case] = _Probe(reference, lifter, case, tools, thinking, system.text).parts()
    if not any(not case.tools for case in found):
        raise refused("it refuses a question without tools" if found else "it refuses every question")
    names = sorted({name for parts in found.values() for name in parts})
    cases = {name: {case: parts[name] for case, parts in found.items() if name in parts} for name in names}
    return compose(lifter, {name: merged(lifter, system, values) for name, values in cases.items()})


@dataclass
class _Probe:
    """Renders marked dialogues for one case, and takes them apart."""

    reference: Reference
    lifter: Lifter
    case: Case
    tools: bool
    thinking: bool
    system: str = ""
    spans: dict[str, str] = field(default_factory=dict)

    def parts(self) -> Parts:
        """All pieces that the template needs in this case; raises _RefusedByJinjaError."""
        alone = self.split([self.user(1)], "User1")
        turns = [self.user(1), self.answer(1), self.user(2), self.answer(2), self.user(3)]
        before, to_answer, to_user, _, to_last, _ = self.split(turns, "User1 Answer1 User2 Answer2 User3")
        question, answer = self.spans["User1"], self.spans["Answer1"]
        ended = self.split([self.user(1)], "User1", generate=False)[1]
        answered = self.split([self.user(1), self.answer(1)], "User1 Answer1", generate=False)[2]
        question_end = self.end(ended, to_answer, alone[1])
        answer_end = self.end(answered, to_user, to_last)
        head = to_user.removeprefix(answer_end)
        if head not in before:
            raise refused(f"the first question begins with {before!r}, a later one with {head!r}")
        opening = before[: before.rindex(head)]
        lead = _without(to_answer, question_end, "a question's end")
        parts = {
            "opening": opening,
            "question": head,
            "question first": before.removeprefix(opening),
            "question end": to_last.removeprefix(answer_end),
            "question first end": _without(alone[0], opening, "a dialogue"),
            "question text": question,
            "question tail": question_end,
            "answer lead": lead,
            "answer": lead + answer,
            "answer tail": answer_end,
            "generate": alone[1].removeprefix(question_end),
        }
        self.add(parts, self.later_system)
        if self.thinking:
            self.add(parts, self.thought)
        if self.tools:
            self.add(parts, self.last_question)
        if self.tools and self.case.system == "none":
            self.add(parts, self.calls)
            self.add(parts, self.parallel)
            self.add(parts, self.results)
        return parts

    def add(self, parts: Parts, more: Callable[[Parts], Parts]) -> None:
        """Add pieces, unless the Jinja refuses such dialogues."""
        with suppress(_RefusedByJinjaError):
            parts.update(more(parts))

    def system_place(self) -> System:
        """Which system texts stand before the first question: that of the first message, the last, or all."""
        probe = replace(self, case=self.case._replace(system="given"), system=FIRST.text)
        try:
            marks = [mark for mark, _ in probe.lift([self.user(1), self.later(), self.user(2)]) if mark]
        except _RefusedByJinjaError:
            return FIRST
        return ALL if marks[:2] == ["System", "Later"] else LAST if marks[:1] == ["Later"] else FIRST

    def heeds_think(self, tools: bool) -> bool:
        """Whether switching thinking on or off changes anything."""
        called = [self.user(1), self.calling(1, thinking=True), self.result(1)]
        for offered, talk in product({False, tools}, ([self.user(1)], [self.later(), self.user(1)], called)):
            with suppress(_RefusedByJinjaError):
                cases = (Case(offered, "none", think) for think in (None, True, False))
                if len({str(replace(self, case=case).lift(talk)) for case in cases}) > 1:
                    return True
        return False

    def later(self) -> Message:
        return {"role": "system", "content": self.lifter.content("Later", ".Content")}

    def later_system(self, parts: Parts) -> Parts:
        """What a system text becomes that is not the first message."""
        turns = [self.user(1), self.later(), self.user(2)]
        if [mark for mark, _ in self.lift(turns) if mark in ("Later", "User1")] != ["User1", "Later"]:
            return {}
        _, before, after, _ = self.split(turns, "User1 Later User2")
        if not after.endswith(parts["question end"]):
            raise refused(f"a question after a later system text begins with {after!r}")
        text = _without(before, parts["question tail"], "a question's end") + self.spans["Later"]
        return {"later system": text + after.removesuffix(parts["question end"])}

    def thought(self, parts: Parts) -> Parts:
        """An answer before the last question, with its thinking."""
        found = self.split([self.user(1), self.answer(1, thinking=True), self.user(2)], "User1 Answer1 User2")
        lead = _without(found[1], parts["question tail"], "a question's end")
        return {"answer thinking": lead + self.spans["Answer1"]}

    def last_question(self, parts: Parts) -> Parts:
        """What stands before the last question when calls follow it."""
        turns = [self.user(2), self.calling(1), self.result(1)]
        first = self.split(turns, "User2")[0]
        later = self.split([self.user(1), self.answer(2), *turns], "User1 Answer2 User2")[2]
        return {
            "question first last": _without(first, parts["opening"], "a dialogue"),
            "question last": _without(later, parts["answer tail"], "an answer's end"),
        }

    def calls(self, parts: Parts) -> Parts:
        """What stands before the first call, by what else its message has; the call; what ends the message."""
        if not self.writes("Call1", [self.user(1), self.calling(1), self.result(1)]):
            return {}
        found: Parts = {}
        for now, content, thinking in product((True, False), (False, True), (False, True)[: 1 + self.thinking]):
            message = self.calling(1, content=content, thinking=thinking)
            rest = [] if now else [self.answer(2), self.user(2)]
            turns = self.split([self.user(1), message, self.result(1), *rest], "User1 Call1 Result1")
            lead = _without(turns[1], parts["question tail"], "a question's end")
            found[f"lead{' now' * now}{' content' * content}{' thinking' * thinking}"] = lead
        _, _, after, _ = self.split([self.user(1), self.calling(1), self.result(1)], "User1 Call1 Result1")
        ended = self.split([self.user(1), self.calling(1)], "User1 Call1", generate=False)[2]
        return {**found, "call": self.with_constants(self.spans["Call1"]), "call tail": self.end(ended, after)}

    def with_constants(self, call: str) -> str:
        """A call whose arguments are written one by one, and perhaps True, False and None as Python does."""
        as_json = self.lifter.action('{{ template "json" (json $value) }}')
        if as_json not in call:
            return call
        python = {True: self.lifter.branch("$value", "True", "False"), None: "None"}
        found = as_json
        for value, kind in ((True, "bool"), (None, "<nil>")):
            self.split([self.user(1), self.calling(1, second=value), self.result(1)], "User1 Call1 Result1")
            if self.spans["Call1"] == call.replace(as_json, str(value)):
                found = self.lifter.branch(f'eq (printf "%T" $value) "{kind}"', python[value], found)
        return call.replace(as_json, found)

    def parallel(self, parts: Parts) -> Parts:
        """What stands between two calls of one message."""
        if "call" not in parts:
            return {}
        turns = [self.user(1), self.calling(1, 2, 3), *map(self.result, (1, 2, 3))]
        found = self.split(turns, "User1 Call1 Call2 Call3 Result1 Result2 Result3")
        if found[2] != found[3]:
            raise refused(f"between calls it writes {found[2]!r} once and {found[3]!r} another time")
        return {"calls between": found[2]}

    def results(self, parts: Parts) -> Parts:
        """What stands around results, between them, and what opens the answer after them."""
        calling, called, tail = self.answer(1), "Answer1", parts["answer tail"]
        if "call" in parts:
            calling, called, tail = self.calling(1), "Call1", parts["call tail"]
        if "calls between" in parts:
            calling, called = self.calling(1, 2, 3), "Call1 Call2 Call3"
        turns = [self.user(1), calling, *map(self.result, (1, 2, 3))]
        if not self.writes("Result1", turns):
            return {}
        names = f"User1 {called} Result1 Result2 Result3"
        *_, before, between, again, generate = self.split(turns, names)
        if between != again:
            raise refused(f"between results it writes {between!r} once and {again!r} another time")
        *_, to_answer, _, _ = self.split([*turns, self.answer(2), self.user(2)], f"{names} Answer2 User2")
        if not to_answer.endswith(parts["answer lead"]):
            raise refused(f"an answer after a result begins with {to_answer!r}, another with {parts['answer lead']!r}")
        return {
            "result head": _without(before, tail, "a call's end"),
            "result between": between,
            "result": self.spans["Result1"],
            "result tail": to_answer.removesuffix(parts["answer lead"]),
            "generate after result": generate,
        }

    def writes(self, mark: str, turns: Sequence[Message]) -> bool:
        """Whether anything of what bears `mark` is written."""
        return mark in {found for found, _ in self.lift(turns)}

    def end(self, ended: str, *texts: str) -> str:
        """The end of a message, of which `ended` is the text when it is the last; templates may end that otherwise."""
        for end in (ended, ended.removesuffix(self.reference.eos)):
            if all(text.startswith(end) for text in texts):
                return end
        return common_start(*texts)

    def user(self, n: int) -> Message:
        return {"role": "user", "content": self.lifter.content(f"User{n}", ".Content")}

    def answer(self, n: int, thinking: bool = False) -> Message:
        more = {"thinking": self.lifter.content("Thinking", ".Thinking")} if thinking else {}
        return {"role": "assistant", "content": self.lifter.content(f"Answer{n}", ".Content"), **more}

    def calling(self, *numbers: int, content: bool = False, thinking: bool = False, **second: Any) -> Message:
        """An answer that calls tools; names, ids and arguments are marked, the latter as a whole and one by one."""
        calls = []
        for n in numbers:
            values: dict[str, Any] = {f"QxName{n}{i}Qx": f"QxValue{n}{i}Qx" for i in range(1, 5)}
            values[f"QxName{n}2Qx"] = second.get("second", {f"QxInner{n}Qx": [1]})
            made = call(f"QxCall{n}Qx", f"QxCallId{n}", **values)
            self.lifter.mark(f"QxCall{n}Qx", f"Call{n}", "{{ .Function.Name }}")
            self.lifter.mark(f"QxCallId{n}", f"Call{n}", "{{ .ID }}")
            self.lifter.value(f"Call{n}", made["function"]["arguments"], ".Function.Arguments")
            for name, value in made["function"]["arguments"].items():
                argument = f"Argument{name[6:8]}"
                self.lifter.mark(name, argument, "{{ $name }}")
                if not isinstance(value, bool | None):
                    self.lifter.value(argument, value, "$value")
                if isinstance(value, str):
                    self.lifter.mark(value, argument, "{{ $value }}")
            calls.append(made)
        message = self.answer(1, thinking)
        return {**message, "content": message["content"] if content else "", "tool_calls": calls}

    def result(self, n: int) -> Message:
        """A result of a tool; its name and id are marked too."""
        self.lifter.mark(f"QxResultName{n}Qx", f"Result{n}", "{{ .ToolName }}")
        self.lifter.mark(f"QxBackId{n}", f"Result{n}", "{{ .ToolCallID }}")
        content = self.lifter.content(f"Result{n}", ".Content")
        return {"role": "tool", "content": content, "tool_name": f"QxResultName{n}Qx", "tool_call_id": f"QxBackId{n}"}

    def lift(self, turns: Sequence[Message], generate: bool = True) -> list[tuple[str, str]]:
        """The dialogue in this case, as (mark, lifted text), with the tools as one loop."""
        tools = [*map(_offered, (1, 2, 3, 4))] if self.case.tools else []
        content = self.lifter.content("System", self.system) if self.case.system == "given" else ""
        first = [] if self.case.system == "none" else [{"role": "system", "content": content}]
        dialogue = Dialogue([*first, *turns], tools, self.case.think)
        try:
            text = self.reference.text(dialogue, generate, lambda form: f"QxDate[{form}]Qx")
        except SuiteError as error:
            raise _RefusedByJinjaError(error.message) from error
        self.mark_tools(tools, text)
        found = self.lifter.lift(text)
        for n in (1, 2, 3):
            found = _with_loop(self.lifter, found, f"Argument{n}", f"Call{n}", ARGUMENTS, IS_TEXT)
        return _with_loop(self.lifter, found, "Tool", "", "range $.Tools", ".Function.Description")

    def mark_tools(self, tools: Sequence[Tool], text: str) -> None:
        """What the tools are known by in `text`: as a whole, or by their pieces, and the second as the first."""
        for n, made in enumerate(tools, 1):
            for (go, form), (_, first) in zip(_forms(made), _forms(tools[0]), strict=False):
                if first in text:
                    self.lifter.mark(form, f"Tool{n}", go)

    def split(self, turns: Sequence[Message], marks: str, generate: bool = True) -> list[str]:
        """The lifted text around each of the marks, in their order; remembers what stands for each in `spans`."""
        found = self.lift(turns, generate)
        pieces, position = [], 0
        for name in marks.split():
            at = [i for i, (mark, _) in enumerate(found) if mark == name]
            if not at or at[0] < position:
                raise refused(f"it does not write {name} where that message stands")
            pieces.append(_text(found[position : at[0]]))
            self.spans[name] = _text(found[at[0] : at[-1] + 1])
            position = at[-1] + 1
        return [*pieces, _text(found[position:])]


class _RefusedByJinjaError(Exception):
    """The model's own template refuses a dialogue."""


def _text(found: list[tuple[str, str]]) -> str:
    return "".join(text for _, text in found)


def _without(text: str, start: str, what: str) -> str:
    if not text.startswith(start):
        raise refused(f"{what} is {start!r} once and {text!r} another time")
    return text.removeprefix(start)


def _offered(n: int) -> Tool:
    """A marked tool; the second has no description."""
    made = tool(f"QxTool{n}Qx", f'QxAbout{n}Qx "&"', **{f"QxParameter{n}Qx": {"type": "string"}})
    if n == 2:
        del made["function"]["description"]
    return made


def _forms(made: Tool) -> list[tuple[str, str]]:
    """How a Go template prints a tool or a piece of it, and how it then looks; larger pieces first."""
    function = made["function"]
    pieces = {
        '{{ template "tool" . }}': made,
        '{{ template "function" .Function }}': function,
        '{{ template "parameters" .Function.Parameters }}': function["parameters"],
    }
    forms = [('{{ template "indented tool" . }}', json.dumps(made, ensure_ascii=False, indent=4))]
    forms += [(go, json.dumps(value, ensure_ascii=False)) for go, value in pieces.items()]
    forms.append(("{{ .Function.Name }}", function["name"]))
    if "description" in function:
        text = function["description"]
        forms.append(('{{ template "json" (json .Function.Description) }}', json.dumps(text)))
        forms.append(("{{ .Function.Description }}", text))
    return forms


def _with_loop(
    lifter: Lifter, found: list[tuple[str, str]], name: str, mark: str, over: str, condition: str
) -> list[tuple[str, str]]:
    """Lifted text in which four things marked `name` have become a loop, which bears `mark`.

    All but the second fulfil the Go `condition` and look alike; the second may look otherwise.
    """
    places = [[i for i, (marked, _) in enumerate(found) if marked == f"{name}{n}"] for n in range(1, 5)]
    if not any(places):
        return found
    if not all(places):
        raise refused(f"it leaves out one {name} of four")
    (one, to_one), _, (three, to_three), (four, to_four) = ((at[0], at[-1] + 1) for at in places)
    each, between = _text(found[one:to_one]), _text(found[to_three:four])
    other = _text(found[to_one:three])
    alike = each == _text(found[three:to_three]) == _text(found[four:to_four])
    if not alike or len(other) < 2 * len(between) or not (other.startswith(between) and other.endswith(between)):
        raise refused(f"it writes one {name} otherwise than another")
    other = other[len(between) : len(other) - len(between)]
    left, right = found[:one], found[to_four:]
    series = Series.of(left[-1][1], between, right[0][1])
    left[-1], right[0] = (left[-1][0], series.before), (right[0][0], series.after)
    body = series.opening + lifter.branch(condition, each, other) + series.closing
    return [*left, (mark, lifter.loop(over, body, series.separator)), *right]
