"""A model with random weights says nothing but what its grammar allows, and its neighbours do not notice."""

from __future__ import annotations

import asyncio
import json
import re
import string
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from serve import grammar
from serve.generation import Request, Sampling
from serve.grammar import Constraint, Grammar, Grammars, allowed
from serve.json_calls import HERMES
from serve.text import special_ids
from serve.torch.engine import Engine
from suite.errors import SuiteError
from tests.tiny.tiny_models import tiny_model, tiny_tokenizer

NANO = Path(__file__).parents[2] / "examples" / "nano" / "model"
GRAMMARS = Grammars()


def byte_fallback() -> Any:
    """A tokenizer as sentencepiece makes them: pieces with a mark for the space, and a token for each byte."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [
        "\u2581",
        *string.ascii_letters,
        *string.digits,
        '{"',
        '":',
        '"}',
        "\u2581true",
        "tr",
        "ue",
        "\u2581\u2581",
    ]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    made = Tokenizer(models.BPE(vocabulary, [("t", "r"), ("u", "e")], byte_fallback=True, unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


TOKENIZERS = {
    "byte level": tiny_tokenizer(),
    "added tokens": AutoTokenizer.from_pretrained(NANO),
    "byte fallback": byte_fallback(),
}
each_tokenizer = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)


def compiled(constraint: Constraint, tokenizer: Any, hidden: frozenset[int] | None = None) -> Grammar:
    stops = frozenset({tokenizer.eos_token_id})
    hidden = special_ids(tokenizer) if hidden is None else hidden
    return asyncio.run(GRAMMARS.compile(constraint, tokenizer, stops, hidden))


def written(constraint: Constraint, tokenizer: Any, seed: int = 0, most: int = 2000) -> str:
    """A text that the grammar allows, each token taken at random."""
    matcher, random, taken = compiled(constraint, tokenizer).matcher(), np.random.default_rng(seed), []
    while len(taken) < most:
        options = np.flatnonzero(allowed([matcher])[0])
        # what is long is less likely, or texts would seldom end
        taken.append(int(random.choice(options)))
        if matcher.take(taken[-1]) or taken[-1] == tokenizer.eos_token_id:
            break
    else:
        pytest.fail(f"no end after {most} tokens: {tokenizer.decode(taken)[:200]}")
    ids = [token for token in taken if token != tokenizer.eos_token_id]
    assert not set(ids) & special_ids(tokenizer)
    # a first token keeps its space only behind another one
    mark = tokenizer.encode("a", add_special_tokens=False)
    return str(tokenizer.decode([*mark, *ids])).removeprefix(tokenizer.decode(mark))


names = st.text('abcxyz _-"\\é中', min_size=1, max_size=5)
leaves = st.one_of(
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.builds(lambda low, more: {"type": "integer", "minimum": low, "maximum": low + more}, st.integers(-99, 99), st.integers(0, 500)),
    st.just({"type": "number", "minimum": 0, "maximum": 1}),
    st.builds(lambda low, more: {"type": "string", "minLength": low, "maxLength": low + more}, st.integers(0, 3), st.integers(0, 5)),
    st.sampled_from([{"type": "string", "pattern": "^[a-f]{2,4}$"}, {"type": "string", "format": "date"}]),
    st.lists(st.one_of(names, st.integers(-(2**53), 2**53), st.none(), st.booleans()), min_size=1, max_size=4).map(lambda values: {"enum": values}),
    # llguidance reads numbers of 17 digits to within their last one
    st.one_of(names, st.floats(-1e6, 1e6).map(lambda number: round(number, 4)), st.lists(st.integers(-(2**53), 2**53), max_size=2)).map(lambda value: {"const": value}),
)  # fmt: skip


def objects(inside: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    def built(properties: dict[str, Any], optional: int) -> dict[str, Any]:
        required = [*properties][optional % (len(properties) + 1) :]
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}

    arrays = st.builds(
        lambda items, most: {"type": "array", "items": items, "maxItems": most}, inside, st.integers(0, 3)
    )
    either = st.lists(inside, min_size=1, max_size=3).map(lambda options: {"anyOf": options})
    return st.one_of(st.builds(built, st.dictionaries(names, inside, max_size=4), st.integers(0, 4)), arrays, either)


schemas = st.recursive(leaves, objects, max_leaves=8)


@each_tokenizer
@settings(max_examples=40, deadline=None)
@given(schema=schemas, seed=st.integers(0, 1000))
def test_a_schema_allows_only_what_it_accepts(tokenizer: Any, schema: dict[str, Any], seed: int) -> None:
    text = written(grammar.json_schema(schema, "schema"), tokenizer, seed)
    jsonschema.validate(json.loads(text), schema)


@each_tokenizer
def test_references_and_recursion(tokenizer: Any) -> None:
    tree = {"$ref": "#/$defs/tree", "$defs": {"tree": {"type": "object", "properties": {"v": {"type": "boolean"}, "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/tree"}]}}, "required": ["v", "next"], "additionalProperties": False}}}  # fmt: skip
    for seed in range(5):
        jsonschema.validate(json.loads(written(grammar.json_schema(tree, "x"), tokenizer, seed)), tree)


@each_tokenizer
@pytest.mark.parametrize(
    "pattern", ["[a-c]{3,5}", "(yes|no), [0-9]{4}", "é?中+x", "a/b\\nc", "<tool_call>[01]</tool_call>", ""]
)
def test_regular_expressions(tokenizer: Any, pattern: str) -> None:
    for seed in range(4):
        assert re.fullmatch(pattern, written(grammar.regex(pattern, "x"), tokenizer, seed))


@each_tokenizer
def test_choices(tokenizer: Any) -> None:
    options = ["red", "reddish", 'with "quotes"\n', "中文 😀", "\\", "<tool_call>", "<|im_end|>", "\t"]
    said = {written(grammar.choice(options, "x"), tokenizer, seed) for seed in range(40)}
    assert said <= set(options)
    assert len(said) > 4
    assert written(grammar.choice(["<|im_end|>"], "x"), tokenizer) == "<|im_end|>", "spelled, not the token itself"


@each_tokenizer
def test_context_free_grammars(tokenizer: Any) -> None:
    lark = 'start: sum\nsum: NUMBER ("+" sum)?\nNUMBER: /[1-9]/'
    gbnf = 'root ::= [1-9] ("+" [1-9])*'
    for text in (lark, gbnf):
        for seed in range(4):
            assert re.fullmatch(r"[1-9](\+[1-9])*", written(grammar.grammar(text, "x"), tokenizer, seed))


FUNCTIONS: list[dict[str, Any]] = [
    {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer", "maximum": 9, "minimum": 0}}, "required": ["a"], "additionalProperties": False}},
    {"name": "now"},
]  # fmt: skip


@each_tokenizer
@pytest.mark.parametrize("parallel", [False, True])
def test_calls_of_tools(tokenizer: Any, parallel: bool) -> None:
    counts = set()
    for seed in range(8):
        text = written(grammar.tool_calls(FUNCTIONS, HERMES, tokenizer, "tools", parallel=parallel), tokenizer, seed)
        calls = [json.loads(call) for call in re.findall(r"<tool_call>\n(.*?)\n</tool_call>", text, re.DOTALL)]
        counts.add(len(calls))
        for call in calls:
            jsonschema.validate(
                call["arguments"], FUNCTIONS[0]["parameters"] if call["name"] == "add" else {"maxProperties": 0}
            )
    assert (max(counts) > 1) == parallel


def test_marks_of_calls_are_tokens_where_the_model_has_them() -> None:
    tokenizer = TOKENIZERS["added tokens"]
    text = '<tool_call>\n{"name": "add", "arguments": {"a": 5}}\n</tool_call>'
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids[0] == tokenizer.convert_tokens_to_ids("<tool_call>")
    matcher = compiled(grammar.tool_calls(FUNCTIONS, HERMES, tokenizer, "tools"), tokenizer).matcher()
    assert [matcher.take(token) for token in ids] == [False] * (len(ids) - 1) + [True]


def follows(constraint: Constraint, tokenizer: Any, text: str) -> bool:
    """Whether the grammar allows `text`, and an end behind it."""
    matcher, ended = compiled(constraint, tokenizer).matcher(), False
    try:
        for token in tokenizer.encode(text, add_special_tokens=False):
            ended = matcher.take(token)
    except ValueError:
        return False
    return ended or bool(allowed([matcher])[0, tokenizer.eos_token_id])


CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 5}}\n</tool_call>'


@pytest.mark.parametrize("tokenizer", [*TOKENIZERS.values()][:2], ids=[*TOKENIZERS][:2])
def test_calls_that_may_be_made_are_bound_and_other_text_is_not(tokenizer: Any) -> None:
    bound = grammar.tool_calls(FUNCTIONS, HERMES, tokenizer, "tools", parallel=True, among_text=True)
    for text in ("hello, a < b", CALL, f"let me see {CALL}", f"{CALL}\n{CALL}", f"{CALL} done"):
        assert follows(bound, tokenizer, text), text
    for text in (CALL.replace('"a"', '"b"'), f"well {CALL.replace('add', 'sub')}"):
        assert not follows(bound, tokenizer, text), text


@pytest.mark.parametrize("tokenizer", [*TOKENIZERS.values()][:2], ids=[*TOKENIZERS][:2])
def test_calls_or_an_answer_of_a_form_behind_reasoning(tokenizer: Any) -> None:
    answer = grammar.json_schema({"const": {"k": True}}, "response_format")
    either = grammar.tool_calls(FUNCTIONS, HERMES, tokenizer, "tools", otherwise=answer)
    thought = grammar.after("</tool_response>", either, tokenizer)
    for text, allowed_ in (('{"k": true}', True), (CALL, True), ("hello", False), (CALL + '{"k":true}', False)):
        assert follows(either, tokenizer, text) == allowed_, text
        assert follows(thought, tokenizer, f"hm</tool_response>\n{text}") == allowed_, text
    assert not follows(thought, tokenizer, "hm")


@each_tokenizer
@pytest.mark.parametrize("mark", ["</tool_call>", "done"])
def test_reasoning_is_free_up_to_its_end(tokenizer: Any, mark: str) -> None:
    constraint = grammar.after(mark, grammar.choice(["yes", "no"], "x"), tokenizer)
    matcher = compiled(constraint, tokenizer).matcher()
    ids = tokenizer.encode(f"let me think{mark}", add_special_tokens=False)
    assert not any(matcher.take(token) for token in ids)
    rest = [*np.flatnonzero(allowed([matcher])[0])]
    assert all(re.match("[ \n]|y|n", tokenizer.decode([token]) or " ") for token in rest)


def test_a_grammar_ends_with_its_text_and_with_nothing_else() -> None:
    tokenizer = TOKENIZERS["byte level"]
    one, many = (compiled(grammar.regex(pattern, "x"), tokenizer).matcher() for pattern in ("a", "a+"))
    a = tokenizer.encode("a")[0]
    assert not allowed([one, many])[:, tokenizer.eos_token_id].any()
    assert (one.take(a), many.take(a)) == (True, False)
    assert allowed([many])[0, tokenizer.eos_token_id]
    assert many.take(tokenizer.eos_token_id)


@pytest.mark.parametrize(
    ("constraint", "says"),
    [
        (lambda: grammar.json_schema({"uniqueItems": True}, "f"), "uniqueItems"),
        (lambda: grammar.json_schema({"type": "object", "properties": {"a": False}, "required": ["a"]}, "f"), "unsatisfiable"),
        (lambda: grammar.json_schema({"$ref": "#/none"}, "f"), "none"),
        (lambda: grammar.json_schema({"$ref": "#"}, "f"), "cannot be used"),
        (lambda: grammar.json_schema({"$ref": "file:///etc/hostname"}, "f"), "not"),
        (lambda: grammar.json_schema({"allOf": [{"multipleOf": 9973}, {"multipleOf": 9967}]}, "f"), "multipleOf"),
        (lambda: grammar.json_schema({"multipleOf": 0.000131071}, "f"), "multipleOf"),
        (lambda: grammar.json_schema({"enum": [1, 2**53 + 1]}, "f"), "beyond"),
        (lambda: grammar.json_schema({"const": float("nan")}, "f"), "JSON"),
        (lambda: grammar.json_schema(json.loads('{"not":' * 200 + "true" + "}" * 200), "f"), "levels"),
        (lambda: grammar.json_schema({"enum": [f"value {i}" for i in range(10_000)]}, "f"), "characters"),
        (lambda: grammar.json_schema({"allOf": [{"anyOf": [{"minLength": i + 9 * j} for j in range(6)]} for i in range(9)]}, "f"), "large"),
        (lambda: grammar.regex("((", "f"), "unclosed|invalid"),
        (lambda: grammar.regex("(?<=a)b", "f"), "regex"),
        (lambda: grammar.regex("\ud800", "f"), "surrogate"),
        (lambda: grammar.choice(["\ud800"], "f"), "cannot be used"),
        (lambda: grammar.grammar("what is this", "f"), "GBNF"),
        (lambda: grammar.grammar('start: a\na: "x" a', "f"), "cannot be used"),
        (lambda: grammar.grammar("start: <|im_start|>", "f"), "no text"),
    ],
)  # fmt: skip
def test_what_is_no_grammar_or_too_much_work_is_refused(constraint: Any, says: str) -> None:
    with pytest.raises(SuiteError, match=says) as error:
        compiled(constraint(), TOKENIZERS["byte level"])
    assert error.value.where == "f"


def test_loose_schemas_leave_out_what_cannot_be_enforced() -> None:
    loose = {"type": "array", "items": {"type": "boolean"}, "maxItems": 2, "uniqueItems": True}
    text = written(grammar.json_schema(loose, "f", strict=False), TOKENIZERS["byte level"])
    assert isinstance(json.loads(text), list)


def test_the_same_grammar_is_compiled_once() -> None:
    tokenizer = TOKENIZERS["byte level"]
    made = [compiled(grammar.regex(pattern, "f"), tokenizer) for pattern in ("ab+", "ab+", "ac+")]
    assert made[0] is made[1]
    assert made[0] is not made[2]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    engine = Engine(tiny_model(tmp_path_factory.mktemp("grammar") / "base"), max_batch=8)
    yield engine
    engine.close()


def request(constraint: Constraint | None, prompt: int, *, most: int = 400, **rule: Any) -> Request:
    """For the engine's model, which has the byte-level tokenizer."""
    tokenizer = TOKENIZERS["byte level"]
    made = compiled(constraint, tokenizer) if constraint else None
    stops = frozenset({tokenizer.eos_token_id})
    return Request([3, 4, prompt], max_tokens=most, sampling=Sampling(**rule), stop_ids=stops, grammar=made)


@settings(max_examples=5, deadline=None)
@given(st.lists(schemas, min_size=1, max_size=4), st.integers(0, 99))
def test_a_random_model_keeps_to_schemas_beside_others(engine: Engine, given_: list[dict[str, Any]], seed: int) -> None:
    tokenizer = TOKENIZERS["byte level"]
    free = [request(None, 5 + i, most=20, temperature=float(i), seed=seed) for i in range(2)]
    bound = [request(grammar.json_schema(s, "x"), 9 + i, temperature=1.0, seed=seed) for i, s in enumerate(given_)]
    together = engine.generate([*free, *bound])
    assert [one.new for one in together[:2]] == [engine.generate([one])[0].new for one in free]
    for schema, one in zip(given_, together[2:], strict=True):
        assert one.finish == "stop", tokenizer.decode(one.new)[:300]
        jsonschema.validate(json.loads(tokenizer.decode(one.new, skip_special_tokens=True)), schema)


def test_what_is_cut_off_is_no_error(engine: Engine) -> None:
    cut = engine.generate([request(grammar.json_schema({"type": "object"}, "x"), 5, most=3)])[0]
    assert (cut.finish, len(cut.new)) == ("length", 3)


def test_a_complete_text_ends_without_a_stop_token_and_in_spite_of_min_tokens(engine: Engine) -> None:
    tokenizer = TOKENIZERS["byte level"]
    asked = request(grammar.choice(["red", "green"], "x"), 5, temperature=1.0, seed=1)
    plain, early = engine.generate([asked, replace(asked, min_tokens=50)])
    assert plain.finish == early.finish == "stop"
    assert tokenizer.decode(plain.new) == tokenizer.decode(early.new) in ("red", "green")
    longer = replace(request(grammar.regex("a{2,40}", "x"), 5, temperature=1.0, seed=1), min_tokens=12)
    assert len(engine.generate([longer])[0].new) >= 12 or len(tokenizer.decode(engine.generate([longer])[0].new)) == 40


def test_logprobs_are_the_models_own(engine: Engine) -> None:
    asked = replace(request(grammar.choice(["red", "green"], "x"), 5), logprobs=2)
    bound, free = engine.generate([asked, replace(asked, grammar=None)])
    for (token, logprob), (wanted, model) in zip(bound.scores[0].top, free.scores[0].top, strict=True):
        assert (token, logprob) == (wanted, pytest.approx(model))
    assert bound.scores[0].token == bound.new[0] != free.new[0]
    assert bound.scores[0].logprob < free.scores[0].logprob


def test_a_text_that_is_read_again_goes_on_in_its_grammar(engine: Engine) -> None:
    constraint = grammar.regex("([a-z]{3} ){100}", "x")
    requests = [request(constraint, 5 + i, temperature=1.0, seed=i) for i in range(6)]
    wanted = [one.new for one in engine.generate(requests)]
    cells, before = engine.scheduler.max_cells, engine.scheduler.preemptions
    engine.scheduler.max_cells = 512
    try:
        got = engine.generate(requests)
    finally:
        engine.scheduler.max_cells = cells
    assert engine.scheduler.preemptions > before
    assert [one.new for one in got] == wanted
    assert all(one.finish == "stop" for one in got)


@pytest.mark.parametrize(
    "lark",
    [
        "start: /[ab]/ <|im_start|>",
        'start: /[ab]/ a\na: "x" a',
        "start: /[ab]/ "
        + " ".join(f"(o{i})?" for i in range(600))
        + "".join(f'\no{i}: "{i}" | /x{i}+/' for i in range(600)),
    ],
)
def test_a_grammar_that_leads_nowhere_fails_its_request_only(engine: Engine, lark: str) -> None:
    dead = grammar.grammar(lark, "x")
    failed, other = engine.generate([request(dead, 5), request(None, 6, most=4)])
    assert failed.finish == "error"
    assert "grammar" in failed.error
    assert other.finish == "length"
