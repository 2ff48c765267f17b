"""What every backend's endpoint does, seen with OpenAI's own client and with plain HTTP."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import openai
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.contract.conftest import Served

QUESTION: list[Any] = [{"role": "user", "content": "Who are you?"}]
PROMPT_IDS = [40, 41, 42, 43, 44]


def chat(served: Served, model: str = "base", **more: Any) -> Any:
    settings = {"max_tokens": 12, "temperature": 0, "messages": QUESTION, **more}
    return served.openai.chat.completions.create(model=model, **settings)


def text(served: Served, model: str = "base", **more: Any) -> Any:
    settings = {"max_tokens": 12, "temperature": 0, "prompt": "The quick brown", **more}
    return served.openai.completions.create(model=model, **settings)


def test_models(served: Served) -> None:
    cards = {card.id: card for card in served.openai.models.list()}
    assert list(cards) == served.endpoint.models == ["base", "a", "b"]
    assert served.openai.models.retrieve("a").id == "a"


def test_health(served: Served) -> None:
    answer = served.http.get("/health")
    assert answer.status_code == 200
    assert answer.json()["status"] == "ready"


def test_chat_is_the_models_own_greedy_answer(served: Served) -> None:
    tokenizer = AutoTokenizer.from_pretrained(served.base)
    prompt = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    model = AutoModelForCausalLM.from_pretrained(served.base, dtype="float32")
    wanted = model.generate(**prompt, max_new_tokens=12, do_sample=False, max_length=None)
    got = chat(served)
    length = prompt["input_ids"].shape[1]
    assert got.choices[0].message.content == tokenizer.decode(wanted[0, length:], skip_special_tokens=True)
    assert got.choices[0].finish_reason == "length"
    assert (got.usage.prompt_tokens, got.usage.completion_tokens, got.usage.total_tokens) == (length, 12, length + 12)
    assert got.model == "base"


def test_adapters_answer_by_name(served: Served) -> None:
    answers = {model: chat(served, model).choices[0].message.content for model in served.endpoint.models}
    assert len(set(answers.values())) == 3
    assert {m: chat(served, m).choices[0].message.content for m in reversed(served.endpoint.models)} == answers


def test_an_adapter_is_loaded_replaced_and_unloaded(served: Served) -> None:
    def change(what: str, **body: Any) -> httpx.Response:
        return served.http.post(f"/v1/{what}_lora_adapter", json={"lora_name": "c", **body}, timeout=300)

    def said(model: str) -> str:
        return str(chat(served, model).choices[0].message.content)

    assert change("load", lora_path="later/a").raise_for_status()
    assert [card.id for card in served.openai.models.list()] == ["base", "a", "b", "c"]
    assert said("c") == said("a")
    assert change("load", lora_path="later/b").status_code == 400  # the name is taken
    assert change("load", lora_path=str(served.offered / "later" / "b"), load_inplace=True).raise_for_status()
    assert said("c") == said("b")
    assert change("load", lora_path=str(served.adapters["a"]), load_inplace=True).status_code == 400  # lies elsewhere
    assert change("unload").raise_for_status()
    with pytest.raises(openai.NotFoundError):
        said("c")
    assert change("unload").status_code == 404
    assert [card.id for card in served.openai.models.list()] == ["base", "a", "b"]
    assert len({said(model) for model in served.endpoint.models}) == 3


def test_stream_is_the_same_text(served: Served) -> None:
    whole = chat(served, "a")
    chunks = list(chat(served, "a", stream=True, stream_options={"include_usage": True}))
    *parts, last = chunks
    assert "".join(chunk.choices[0].delta.content or "" for chunk in parts) == whole.choices[0].message.content
    assert parts[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in parts if chunk.choices[0].finish_reason] == ["length"]
    assert last.choices == []
    # but for how much of the prompt was known
    assert (last.usage.prompt_tokens, last.usage.total_tokens) == (whole.usage.prompt_tokens, whole.usage.total_tokens)
    assert len({chunk.id for chunk in chunks}) == 1


def test_the_stream_ends_with_done(served: Served) -> None:
    body = {"model": "base", "messages": QUESTION, "max_tokens": 3, "temperature": 0, "stream": True}
    answer = served.http.post("/v1/chat/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in answer.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    assert all(json.loads(line.removeprefix("data: "))["object"] == "chat.completion.chunk" for line in lines[:-1])


def test_completions_stream_is_the_same_text(served: Served) -> None:
    whole = text(served).choices[0].text
    assert "".join(chunk.choices[0].text for chunk in text(served, stream=True)) == whole


def test_stop_strings_across_token_borders(served: Served) -> None:
    free = text(served, max_tokens=40).choices[0].text
    stop = free[7:10]
    cut = free[: free.index(stop)]
    got = text(served, max_tokens=40, stop=[stop, "never there"]).choices[0]
    assert (got.text, got.finish_reason) == (cut, "stop")
    assert "".join(chunk.choices[0].text for chunk in text(served, max_tokens=40, stop=stop, stream=True)) == cut


def test_chat_logprobs(served: Served) -> None:
    content = chat(served, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    assert len(content) == 12
    for entry in content:
        assert entry.logprob <= 0
        assert len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].logprob == pytest.approx(entry.logprob)  # greedy took the likeliest
        assert entry.bytes is None or bytes(entry.bytes).decode() == entry.token
    streamed = [c.choices[0].logprobs for c in chat(served, logprobs=True, stream=True)]
    assert sum(len(part.content) for part in streamed if part) == 12


def test_echo_scores_the_prompt(served: Served) -> None:
    """As lm-evaluation-harness asks for the likelihood of a text."""
    got = text(served, prompt=PROMPT_IDS, max_tokens=0, echo=True, logprobs=1)
    logprobs = got.choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.text_offset) == len(PROMPT_IDS)
    assert logprobs.token_logprobs[0] is None
    assert all(value <= 0 for value in logprobs.token_logprobs[1:])
    for token, value, top in zip(
        logprobs.tokens[1:], logprobs.token_logprobs[1:], logprobs.top_logprobs[1:], strict=True
    ):
        assert top[token] == pytest.approx(value)
    assert got.usage.completion_tokens == (served.backend == "vllm")  # which makes one, and keeps it to itself
    both = text(served, prompt=PROMPT_IDS, max_tokens=2, echo=True, logprobs=1).choices[0].logprobs
    assert both.token_logprobs[:5] == pytest.approx(logprobs.token_logprobs)
    assert len(both.tokens) == 7


def test_several_prompts_keep_their_order(served: Served) -> None:
    prompts = ["The quick", "Who are", "Seven plus five"]
    got = text(served, prompt=prompts)
    assert [choice.index for choice in got.choices] == [0, 1, 2]
    assert [choice.text for choice in got.choices] == [text(served, prompt=p).choices[0].text for p in prompts]
    ids = text(served, prompt=[PROMPT_IDS, PROMPT_IDS[:2]])
    assert len(ids.choices) == 2


def test_n_and_seed(served: Served) -> None:
    def drawn() -> list[str]:
        return [choice.message.content for choice in chat(served, n=3, temperature=1.5, seed=7).choices]

    first = drawn()
    assert len(set(first)) > 1
    assert drawn() == first


def test_max_completion_tokens(served: Served) -> None:
    got = chat(served, max_tokens=openai.omit, max_completion_tokens=4)
    assert got.usage.completion_tokens == 4


def test_content_parts_and_system(served: Served) -> None:
    parts: list[Any] = [
        {"role": "user", "content": [{"type": "text", "text": "Who are "}, {"type": "text", "text": "you?"}]}
    ]
    assert chat(served, messages=parts).choices == chat(served).choices
    assert (
        chat(served, messages=[{"role": "system", "content": "Be brief."}, *QUESTION]).choices != chat(served).choices
    )


def test_tools_enter_the_prompt(served: Served) -> None:
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
    plain, with_tools = chat(served), chat(served, tools=[tool])
    assert with_tools.usage.prompt_tokens > plain.usage.prompt_tokens + 10
    assert chat(served, tools=[tool], tool_choice="none").usage == plain.usage
    streamed = "".join(c.choices[0].delta.content or "" for c in chat(served, tools=[tool], stream=True))
    assert streamed == with_tools.choices[0].message.content


def test_unknown_model(served: Served) -> None:
    with pytest.raises(openai.NotFoundError) as error:
        chat(served, "gpt-4")
    assert error.value.code == "model_not_found"
    assert error.value.param == "model"
    assert all(f"'{name}'" in str(error.value) for name in served.endpoint.models)


@pytest.mark.parametrize(
    ("path", "body", "says"),
    [
        ("chat/completions", b"{", "JSON"),
        ("chat/completions", b"\xff\xfe", "JSON"),
        ("chat/completions", b"[]", ""),
        ("chat/completions", {"model": "base"}, "messages"),
        ("chat/completions", {"model": "base", "messages": []}, "messages"),
        ("chat/completions", {"messages": QUESTION}, "model"),
        ("chat/completions", {"model": "base", "messages": QUESTION, "temperature": -1}, "temperature"),
        ("chat/completions", {"model": "base", "messages": QUESTION, "top_p": 0}, "top_p"),
        ("chat/completions", {"model": "base", "messages": QUESTION, "n": 0}, "n"),
        ("chat/completions", {"model": "base", "messages": QUESTION, "max_tokens": -1}, "max_tokens"),
        ("chat/completions", {"model": "base", "messages": QUESTION, "logit_bias": {"5": 900}}, "logit_bias"),
        (
            "chat/completions",
            {"model": "base", "messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "text",
        ),
        ("completions", {"model": "base", "prompt": []}, "prompt"),
        ("completions", {"model": "base", "prompt": ""}, "empty"),
        ("completions", {"model": "base", "prompt": [99999]}, "token ids"),
        ("completions", {"model": "base", "prompt": [-1]}, "token ids"),
        ("completions", {"model": "base", "prompt": [1] * 3000}, "2048"),
        ("completions", b'{"model": "base", "prompt": "\\ud800"}', "JSON"),
        ("chat/completions", b'{"model": "base", "messages": [{"role": "user", "content": "\\ud800"}]}', ""),
        ("chat/completions", b"[" * 100_000, ""),
    ],
)
def test_bad_bodies(served: Served, path: str, body: Any, says: str) -> None:
    sent = {"content": body} if isinstance(body, bytes) else {"json": body}
    answer = served.http.post(f"/v1/{path}", headers={"Content-Type": "application/json"}, **sent)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert says in error["message"] or served.backend != "torch"  # another engine's words are its own
    assert set(error) == {"message", "type", "param", "code"}


def test_odd_names_and_texts(served: Served) -> None:
    body = {"model": "../\u202e\x00", "messages": QUESTION}
    assert served.http.post("/v1/chat/completions", json=body).status_code == 404
    assert (
        chat(served, messages=[{"role": "user", "content": "\x00\u202e\n"}], max_tokens=1).usage.completion_tokens == 1
    )


def test_unknown_paths_and_methods(served: Served) -> None:
    assert served.http.get("/v1/nothing").json()["error"]["message"]
    assert served.http.get("/v1/nothing").status_code == 404
    assert served.http.get("/v1/chat/completions").status_code == 405


def test_a_huge_body_is_refused(served: Served) -> None:
    body = {"model": "base", "messages": [{"role": "user", "content": "x" * (17 * 2**20)}]}
    assert served.http.post("/v1/chat/completions", json=body).status_code == 413

    def pieces() -> Any:  # without a Content-Length
        for _ in range(17):
            yield b" " * 2**20

    headers = {"Content-Type": "application/json"}
    assert served.http.post("/v1/chat/completions", content=pieces(), headers=headers).status_code == 413


def test_64_at_once_with_adapters_mixed(served: Served) -> None:
    questions = [[{"role": "user", "content": f"What is {i} plus {i}?"}] for i in range(64)]
    models = [served.endpoint.models[i % 3] for i in range(64)]

    async def ask_all() -> list[Any]:
        limits = httpx.Limits(max_connections=64)
        async with httpx.AsyncClient(base_url=served.endpoint.url, timeout=120, limits=limits) as client:
            bodies = [
                {"model": model, "messages": messages, "max_tokens": 24, "temperature": 0}
                for model, messages in zip(models, questions, strict=True)
            ]
            return await asyncio.gather(*(client.post("/v1/chat/completions", json=body) for body in bodies))

    answers = asyncio.run(ask_all())
    assert [answer.status_code for answer in answers] == [200] * 64
    for index in (0, 1, 2, 31, 63):
        alone = chat(served, models[index], messages=questions[index], max_tokens=24)
        assert answers[index].json()["choices"][0]["message"]["content"] == alone.choices[0].message.content


def test_clients_that_go_away_leave_nothing_behind(served: Served) -> None:
    body = {"model": "base", "messages": QUESTION, "max_tokens": 2000, "temperature": 0, "ignore_eos": True}
    for _ in range(80):  # more than the server computes at once
        with served.http.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as answer:
            next(answer.iter_lines())
    with pytest.raises(httpx.ReadTimeout):
        served.http.post("/v1/chat/completions", json=body, timeout=0.2)
    assert chat(served, max_tokens=2).usage.completion_tokens == 2
    health = served.http.get("/health").json()
    assert (health["running"], health["waiting"], health["failed_steps"]) == (0, 0, 0)
