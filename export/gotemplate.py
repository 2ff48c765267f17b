"""Renders Ollama's chat templates as an Ollama server does: the part of Go's text/template that exports use.

Known: text, `{{ expression }}`, `if / else if / else`, `range` with variables, `with`, trim marks, comments; fields,
variables, string and whole-number literals, parentheses, and the functions eq ne lt le gt ge and or not len index.
Anything else is a TemplateSyntaxError, never a guess. Checked against real Go in the tests.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any, TypeAlias

Scope: TypeAlias = dict[str, Any]
"""The variables by name, `$` among them, and the dot under "."."""
Expression: TypeAlias = Callable[[Scope], Any]

ACTION = re.compile(
    r"""\{\{(-(?=\s))? (\s*/\*.*?\*/\s* | (?:"(?:[^"\\\n]|\\.)*"|`[^`]*`|[^"`])*?) ((?<=\s)-)?\}\}""",
    re.DOTALL | re.VERBOSE,
)
TOKEN = re.compile(
    r"""\s*(?: "(?:[^"\\\n]|\\.)*" | `[^`]*`             # text
             | -?\d+                                     # number
             | \$?[A-Za-z_]\w*(?:\.\w+)* | \$(?:\.\w+)*  # function, variable, and fields of one
             | (?:\.\w+)+ | \.                           # field of the dot
             | \)(?:\.\w+)*                              # end of a parenthesis, and fields of its value
             | := | [(,] )""",
    re.VERBOSE,
)
MESSAGE_FIELDS = {
    "role": "Role",
    "content": "Content",
    "thinking": "Thinking",
    "tool_name": "ToolName",
    "tool_call_id": "ToolCallID",
}


class TemplateSyntaxError(ValueError):
    """The template uses what this renderer does not know, or is no template."""


def collate(messages: Sequence[Mapping[str, Any]]) -> tuple[str, list[dict[str, Any]]]:
    """Messages as Ollama gives them to a template: the joined system texts, and neighbours of one role merged.

    >>> collate([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}])
    ('', [{'role': 'user', 'content': 'a\\n\\nb'}])
    """
    system: list[str] = []
    merged: list[dict[str, Any]] = []
    for message in messages:
        if message["role"] == "system":
            system.append(message["content"])
        if merged and merged[-1]["role"] == message["role"] != "tool":
            merged[-1]["content"] += "\n\n" + message["content"]
        else:
            merged.append(dict(message))
    return "\n\n".join(system), merged


def render(template: str, messages: Sequence[Mapping[str, Any]]) -> str:
    """The prompt that Ollama makes of `messages`; raises TemplateSyntaxError."""
    system, merged = collate(messages)
    shown = [{new: m.get(old, "") for old, new in MESSAGE_FIELDS.items()} for m in merged]
    data = {"System": system, "Messages": shown, "Tools": [], "Response": "", "Think": False, "IsThinkSet": False}
    return parse(template).render({"$": data, ".": data})


def quote(text: str) -> str:
    """`text` as a Go string literal.

    >>> quote('say "{{"')
    '"say \\\\"{{\\\\""'
    """
    return '"' + "".join(_escaped(c) for c in text) + '"'


def _escaped(char: str) -> str:
    if char in '"\\':
        return "\\" + char
    if char.isprintable():
        return char
    short = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}
    return short.get(char) or (f"\\u{ord(char):04x}" if ord(char) < 0x10000 else f"\\U{ord(char):08x}")


@dataclass
class Node:
    """A piece of template: text, a value to print, or a branch or loop over other pieces."""

    kind: str
    text: str = ""
    value: Expression = itemgetter(".")
    variables: tuple[str, ...] = ()
    body: Block = field(default_factory=lambda: Block())
    otherwise: Block = field(default_factory=lambda: Block())


@dataclass
class Block:
    """Pieces in order."""

    nodes: list[Node] = field(default_factory=list)

    def render(self, scope: Scope) -> str:
        """The text of all pieces."""
        return "".join(piece for node in self.nodes for piece in _render(node, scope))


def _render(node: Node, scope: Scope) -> Iterator[str]:
    if node.kind == "text":
        yield node.text
        return
    value = node.value(scope)
    if node.kind == "print":
        yield _printed(value)
    elif not value:
        yield node.otherwise.render(dict(scope))
    elif node.kind == "if":
        yield node.body.render(dict(scope))
    elif node.kind == "with":
        yield node.body.render({**scope, ".": value})
    else:
        for i, item in enumerate(value):
            own = (i, item)[-len(node.variables) :] if node.variables else ()
            yield node.body.render({**scope, **dict(zip(node.variables, own, strict=True)), ".": item})


def _printed(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str | int):
        return str(value)
    raise TemplateSyntaxError("only text and whole numbers can be printed")


def parse(template: str) -> Block:
    """The template as pieces; raises TemplateSyntaxError."""
    parser = _Parser(list(_pieces(template)))
    block, end = parser.block()
    if end:
        raise TemplateSyntaxError(f"{{{{ {end} }}}} without a beginning")
    return block


def _pieces(template: str) -> Iterator[tuple[bool, str]]:
    """(is an action, its text), with the white space taken away that trim marks ask for."""
    position, trim = 0, False
    for match in ACTION.finditer(template):
        text = template[position : match.start()]
        text = text.lstrip(" \t\r\n") if trim else text
        yield False, text.rstrip(" \t\r\n") if match[1] else text
        inside = match[2].strip()
        if not inside.startswith("/*"):
            yield True, inside
        position, trim = match.end(), bool(match[3])
    rest = template[position:]
    if "{{" in rest:
        raise TemplateSyntaxError("an action is not closed")
    yield False, rest.lstrip(" \t\r\n") if trim else rest


class _Parser:
    """Reads pieces into blocks, and the words of an action into an expression."""

    def __init__(self, pieces: list[tuple[bool, str]]) -> None:
        self.pieces = iter(pieces)

    def block(self) -> tuple[Block, str]:
        """Pieces up to the action that ends this block, and that action (`end`, `else ...`, or nothing)."""
        block = Block()
        for is_action, text in self.pieces:
            word, _, rest = text.partition(" ")
            if not is_action:
                block.nodes.append(Node("text", text))
            elif word in ("end", "else"):
                return block, text
            elif word in ("if", "range", "with"):
                block.nodes.append(self.branch(word, rest))
            else:
                block.nodes.append(Node("print", value=_expression(_words(text))))
        return block, ""

    def branch(self, kind: str, condition: str) -> Node:
        words = _words(condition)
        variables: tuple[str, ...] = ()
        if ":=" in words:
            at = words.index(":=")
            variables, words = tuple(w for w in words[:at] if w != ","), words[at + 1 :]
            if kind != "range":
                raise TemplateSyntaxError(f"variables in {kind}")
        body, end = self.block()
        node = Node(kind, value=_expression(words), variables=variables, body=body)
        word, _, rest = end.partition(" ")
        if word == "else" and rest:
            inner, _, condition = rest.partition(" ")
            if inner != "if":
                raise TemplateSyntaxError(f"else {inner}")
            node.otherwise = Block([self.branch("if", condition)])
        elif word == "else":
            node.otherwise, end = self.block()
            word = end
        if not word or (word != "end" and not rest):
            raise TemplateSyntaxError(f"{{{{ {kind} }}}} is not closed")
        return node


def _words(text: str) -> list[str]:
    words, position = [], 0
    while text[position:].strip():
        match = TOKEN.match(text, position)
        if not match:
            raise TemplateSyntaxError(f"unknown: {text[position:].strip()}")
        words.append(match[0].strip())
        position = match.end()
    return words


def _expression(words: list[str]) -> Expression:
    """A function with its arguments, or one operand."""
    operands: list[Expression] = []
    rest = list(words)
    name = rest.pop(0) if rest and rest[0] in FUNCTIONS else ""
    while rest:
        word = rest.pop(0)
        operands.append(_parenthesis(rest) if word == "(" else _operand(word))
    if name:
        function = FUNCTIONS[name]
        return lambda scope: function(*(operand(scope) for operand in operands))
    if len(operands) != 1:
        raise TemplateSyntaxError(f"unknown: {' '.join(words)}")
    return operands[0]


def _parenthesis(rest: list[str]) -> Expression:
    """The expression up to the matching ")" and fields of its value; takes its words from `rest`."""
    inside: list[str] = []
    depth = 1
    while rest:
        word = rest.pop(0)
        depth += {"(": 1, ")": -1}.get(word[0], 0)
        if not depth:
            value, path = _expression(inside), word[1:]
            return lambda scope: _follow(value(scope), path)
        inside.append(word)
    raise TemplateSyntaxError("a parenthesis is not closed")


def _operand(word: str) -> Expression:
    if word[0] == '"':
        text = _unquote(word)
        return lambda _: text
    if word[0] == "`":
        return lambda _: word[1:-1]
    if re.fullmatch(r"-?\d+", word):
        number = int(word)
        return lambda _: number
    if word in ("true", "false"):
        return lambda _: word == "true"
    if word.startswith("."):
        return lambda scope: _follow(scope["."], word)
    if word.startswith("$"):
        name, point, path = word.partition(".")
        return lambda scope: _follow(_variable(scope, name), point + path)
    raise TemplateSyntaxError(f"unknown: {word}")


def _unquote(word: str) -> str:
    eight = re.sub(r"\\U([0-9a-fA-F]{8})", lambda m: json.dumps(chr(int(m[1], 16)))[1:-1], word)
    try:
        return str(json.loads(eight))
    except json.JSONDecodeError:
        raise TemplateSyntaxError(f"unknown escape in {word}") from None


def _variable(scope: Scope, name: str) -> Any:
    if name not in scope:
        raise TemplateSyntaxError(f"undefined variable {name}")
    return scope[name]


def _follow(value: Any, path: str) -> Any:
    for name in path.strip(".").split(".") if path.strip(".") else ():
        if not isinstance(value, dict) or name not in value:
            raise TemplateSyntaxError(f"no field .{name}")
        value = value[name]
    return value


def _equal(first: Any, *others: Any) -> bool:
    if not others or any(type(first) is not type(other) for other in others):
        raise TemplateSyntaxError("eq compares values of one type")
    return any(first == other for other in others)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "eq": _equal,
    "ne": lambda a, b: not _equal(a, b),
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "and": lambda *values: next((v for v in values if not v), values[-1]),
    "or": lambda *values: next((v for v in values if v), values[-1]),
    "not": lambda value: not value,
    "len": lambda value: len(value.encode()) if isinstance(value, str) else len(value),
    "index": lambda value, i: value[i],
}
