"""Renders Ollama's chat templates as an Ollama server does: the part of Go's text/template that exports use.

Known: text, `{{ expression }}`, `if / else if / else`, `range` with variables, `with`, variables set by `:=` and `=`,
`define` and `template`, trim marks, comments; fields, variables, string and whole-number literals, parentheses, and
the functions eq ne lt le gt ge and or not len index slice json printf currentDate. Anything else is a
TemplateSyntaxError, never a guess. Checked against real Go in the tests.

As in Go, text is bytes: `slice` may cut a character, whose pieces then stand as surrogate escapes until the end.
"""

from __future__ import annotations

import json
import re
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from operator import itemgetter
from typing import Any, TypeAlias

from export.ollama.gofunctions import FUNCTIONS, Struct, TemplateSyntaxError, go_json, whole

Scope: TypeAlias = "ChainMap[str, Any]"
"""The variables by name, `$` among them, and the dot under "."; an inner block has its own in front."""
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
             | := | [=(,] )""",
    re.VERBOSE,
)


def render(template: str, data: Mapping[str, Any], today: str = "") -> str:
    """The text that `template` gives for `data`; `today` is what currentDate says. Raises TemplateSyntaxError."""
    start: Scope = ChainMap({"$": data, ".": data, "currentDate": today})
    return whole("".join(_pieces_of(parse(template), start)))


@dataclass
class Node:
    """A piece of template: text, a value to print or set, a call, or a branch or loop over other pieces."""

    kind: str
    text: str = ""
    value: Expression = itemgetter(".")
    variables: tuple[str, ...] = ()
    body: list[Node] = field(default_factory=list)
    otherwise: list[Node] = field(default_factory=list)


@dataclass
class Template:
    """The nodes of a template, and of those that it defines."""

    nodes: list[Node]
    defined: dict[str, list[Node]]


def _pieces_of(template: Template, scope: Scope) -> Iterator[str]:
    """The text, piece by piece. The stack is our own: a template may call itself for every byte of a text."""
    stack = [(iter(template.nodes), scope)]
    while stack:
        nodes, scope = stack[-1]
        node = next(nodes, None)
        if node is None:
            stack.pop()
        elif node.kind == "text":
            yield node.text
        elif node.kind == "print":
            yield _printed(node.value(scope))
        elif node.kind == "set":
            _set(scope, node.variables[0], node.value(scope), new=node.text == ":=")
        elif node.kind == "template":
            if node.text not in template.defined:
                raise TemplateSyntaxError(f"no template {node.text}")
            value = node.value(scope)
            inner: Scope = ChainMap({"$": value, ".": value, "currentDate": scope["currentDate"]})
            stack.append((iter(template.defined[node.text]), inner))
        else:
            stack += [(iter(nodes), inner) for nodes, inner in reversed(list(_branches(node, scope)))]


def _branches(node: Node, scope: Scope) -> Iterator[tuple[list[Node], Scope]]:
    value = node.value(scope)
    if not value:
        yield node.otherwise, scope.new_child()
    elif node.kind == "if":
        yield node.body, scope.new_child()
    elif node.kind == "with":
        yield node.body, scope.new_child({".": value})
    else:
        for key, item in sorted(value.items()) if isinstance(value, dict) else enumerate(value):
            own = (key, item)[-len(node.variables) :] if node.variables else ()
            yield node.body, scope.new_child({**dict(zip(node.variables, own, strict=True)), ".": item})


def _set(scope: Scope, name: str, value: Any, *, new: bool) -> None:
    where = scope.maps[0] if new else next((variables for variables in scope.maps if name in variables), None)
    if where is None:
        raise TemplateSyntaxError(f"undefined variable {name}")
    where[name] = value


def _printed(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str | int):
        return str(value)
    if isinstance(value, dict) and not isinstance(value, Struct):
        return go_json(value)
    raise TemplateSyntaxError("only text, whole numbers and arguments can be printed")


@lru_cache(maxsize=4)
def parse(template: str) -> Template:
    """The template as nodes; raises TemplateSyntaxError."""
    parser = _Parser(list(_actions(template)))
    nodes, end = parser.block()
    if end:
        raise TemplateSyntaxError(f"{{{{ {end} }}}} without a beginning")
    return Template(nodes, parser.defined)


def _actions(template: str) -> Iterator[tuple[bool, str]]:
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
    """Reads pieces into nodes, and the words of an action into an expression."""

    def __init__(self, pieces: list[tuple[bool, str]]) -> None:
        self.pieces = iter(pieces)
        self.defined: dict[str, list[Node]] = {}

    def block(self) -> tuple[list[Node], str]:
        """Nodes up to the action that ends this block, and that action (`end`, `else ...`, or nothing)."""
        nodes: list[Node] = []
        for is_action, text in self.pieces:
            word, _, rest = text.partition(" ")
            if not is_action:
                nodes.append(Node("text", text))
            elif word in ("end", "else"):
                return nodes, text
            elif word in ("if", "range", "with"):
                nodes.append(self.branch(word, rest))
            elif word == "define":
                self.define(_words(rest))
            else:
                nodes.append(_simple(word, text))
        return nodes, ""

    def define(self, words: list[str]) -> None:
        body, end = self.block()
        if len(words) != 1 or end != "end":
            raise TemplateSyntaxError("{{ define }} is not closed")
        self.defined[_unquote(words[0])] = body

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
            node.otherwise = [self.branch("if", condition)]
        elif word == "else":
            node.otherwise, end = self.block()
            word = end
        if not word or (word != "end" and not rest):
            raise TemplateSyntaxError(f"{{{{ {kind} }}}} is not closed")
        return node


def _simple(word: str, text: str) -> Node:
    """An action without a block: a value to print, a variable to set, or another template to call."""
    words = _words(text)
    if word == "template" and len(words) > 2:
        return Node("template", _unquote(words[1]), _expression(words[2:]))
    if word.startswith("$") and words[1:2] in ([":="], ["="]):
        return Node("set", words[1], _expression(words[2:]), (words[0],))
    return Node("print", value=_expression(words))


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
    name = rest.pop(0) if rest and (rest[0] in FUNCTIONS or rest[0] in ("and", "or")) else ""
    while rest:
        word = rest.pop(0)
        operands.append(_parenthesis(rest) if word == "(" else _operand(word))
    if name in ("and", "or"):
        return lambda scope: _first(operands, scope, name == "or")
    if name:
        function = FUNCTIONS[name]
        return lambda scope: function(*(operand(scope) for operand in operands))
    if len(operands) != 1:
        raise TemplateSyntaxError(f"unknown: {' '.join(words)}")
    return operands[0]


def _first(operands: list[Expression], scope: Scope, wanted: bool) -> Any:
    """`and` and `or` of Go: the first value that decides, and what stands after it is not looked at."""
    value = None
    for operand in operands:
        value = operand(scope)
        if bool(value) is wanted:
            break
    return value


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
    if word == "currentDate":
        return itemgetter(word)
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
