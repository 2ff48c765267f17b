"""What an answer must be, as a request says it: `response_format`, `structured_outputs` and `tool_choice`."""

from __future__ import annotations

from serve import grammar
from serve.errors import ApiError
from serve.grammar import Constraint
from serve.json_calls import CallForm
from serve.protocol import Body, ChatBody, JsonFormat, NamedTool, StructuredOutputs
from serve.served import Served
from suite.errors import SuiteError

_ANY_OBJECT = {"type": "object"}


def constraint(body: Body, served: Served, thinking: str = "") -> Constraint | None:
    """The constraint of `body`, which begins behind the mark `thinking` where the prompt has opened reasoning.

    Raises ApiError 422, naming the field, for what is no grammar or too much work.
    """
    try:
        found = _format(body.response_format) or _structured(body.structured_outputs)
        if isinstance(body, ChatBody):
            found = _calls(body, served, found) or found
    except SuiteError as error:
        raise ApiError(422, error.message, param=error.where) from None
    return grammar.after(thinking, found, served.tokenizer) if found and thinking else found


def _calls(body: ChatBody, served: Served, otherwise: Constraint | None) -> Constraint | None:
    """Calls that have to be made, or that may be made and are bound: beside a form of answers, or for a strict tool."""
    functions = [tool["function"] for tool in body.usable_tools or []]
    form = served.dialect.held(must=body.must_call)
    strict = any(function.get("strict") for function in functions)
    if form is None or not functions or not (body.must_call or otherwise or strict):
        return None
    if otherwise and not body.must_call and isinstance(form, CallForm) and not form.opening:
        return None  # both would begin with the same brace, and nothing tells them apart
    if isinstance(body.tool_choice, NamedTool):
        functions = [function for function in functions if function["name"] == body.tool_choice.function.name]
    return grammar.tool_calls(
        functions,
        form,
        served.tokenizer,
        "tools",
        parallel=body.parallel_tool_calls is not False and not isinstance(body.tool_choice, NamedTool),
        otherwise=None if body.must_call else otherwise,
        among_text=not body.must_call and not otherwise,
    )


def _format(given: JsonFormat | None) -> Constraint | None:
    if given is None or given.type == "text":
        return None
    if given.json_schema is None:
        return grammar.json_schema(_ANY_OBJECT, "response_format")
    # OpenAI follows a schema to the letter only where it is strict
    strict = bool(given.json_schema.strict)
    return grammar.json_schema(given.json_schema.schema_ or _ANY_OBJECT, "response_format", strict=strict)


def _structured(given: StructuredOutputs | None) -> Constraint | None:
    field = "structured_outputs"
    if given is None:
        return None
    if given.regex is not None:
        return grammar.regex(given.regex, field)
    if given.choice is not None:
        return grammar.choice(given.choice, field)
    if given.grammar is not None:
        return grammar.grammar(given.grammar, field)
    return grammar.json_schema(given.schema_ or _ANY_OBJECT, field)
