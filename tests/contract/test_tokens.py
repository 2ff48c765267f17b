"""/tokenize and /detokenize, which vLLM has too."""

from __future__ import annotations

from typing import Any

from transformers import AutoTokenizer

from tests.contract.conftest import Served

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who are you?"}]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}


def tokenize(served: Served, **body: Any) -> Any:
    answer = served.http.post("/tokenize", json={"model": "base", **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_a_prompt(served: Served) -> None:
    tokenizer = AutoTokenizer.from_pretrained(served.base)
    text = "The quick <|im_end|> 你好\n"
    got = tokenize(served, prompt=text)
    assert got["tokens"] == tokenizer(text)["input_ids"]
    assert got["count"] == len(got["tokens"])
    assert got["max_model_len"] == 2048
    assert got["token_strs"] is None
    strings = tokenize(served, prompt=text, return_token_strs=True)["token_strs"]
    assert strings == tokenizer.convert_ids_to_tokens(got["tokens"])
    back = served.http.post("/detokenize", json={"model": "base", "tokens": got["tokens"]})
    assert back.json() == {"prompt": text}


def test_messages_are_what_a_chat_is_asked(served: Served) -> None:
    tokenizer = AutoTokenizer.from_pretrained(served.base)
    got = tokenize(served, messages=MESSAGES)
    assert got["tokens"] == tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True)["input_ids"]
    asked = served.openai.chat.completions.create(model="base", messages=MESSAGES, max_tokens=1)  # type: ignore[arg-type]
    assert asked.usage is not None
    assert asked.usage.prompt_tokens == got["count"]
    closed = tokenize(served, messages=MESSAGES, add_generation_prompt=False)
    assert got["tokens"][: closed["count"]] == closed["tokens"]
    assert tokenize(served, messages=MESSAGES, tools=[TOOL])["count"] > got["count"] + 10


def test_an_adapter_has_tokens_too_and_no_model_is_the_base(served: Served) -> None:
    assert tokenize(served, model="a", prompt="x") == tokenize(served, prompt="x")
    answer = served.http.post("/tokenize", json={"prompt": "x"})
    assert answer.json() == tokenize(served, prompt="x")


def test_bad_bodies(served: Served) -> None:
    for path, body in [
        ("/tokenize", {"model": "base"}),
        ("/tokenize", {"model": "base", "prompt": 5}),
        ("/tokenize", {"model": "base", "messages": []}),
        ("/detokenize", {"model": "base", "tokens": [-1]}),
        ("/detokenize", {"model": "base", "tokens": [2**70]}),
        ("/detokenize", {"model": "base", "tokens": "abc"}),
    ]:
        answer = served.http.post(path, json=body)
        assert answer.status_code == 400, (path, body, answer.text)
        assert answer.json()["error"]["message"]
    assert served.http.post("/tokenize", json={"model": "none", "prompt": "x"}).status_code == 404
