"""Keys, adapters and aliases at run time, limits, metrics and log of our own server, as an operator meets them."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.types.responses import ResponseStreamEvent
from prometheus_client.parser import text_string_to_metric_families
from pydantic import TypeAdapter

from tests.contract.suite_server import Running, suite_serve
from tests.tiny.tiny_models import tiny_adapter, tiny_model

KEYS = """
[ops]
key = "sk-ops"
admin = true
[team]
key = "sk-team"
models = ["base", "prod"]
[slow]
key = "sk-slow"
tokens_per_minute = 20
"""
QUESTION = [{"role": "user", "content": "Who are you?"}]
LONG = {"model": "base", "prompt": ["The"] * 64, "n": 16, "max_tokens": 300, "ignore_eos": True}
"""More than any machine computes in the time that the server gives it."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a directory of adapters, and adapters that lie elsewhere."""
    root = tmp_path_factory.mktemp("operations")
    base = tiny_model(root / "base")
    for seed, name in enumerate(("law@v2", "law@v3", "team/style", "spare"), 1):
        (root / "loras" / name).parent.mkdir(parents=True, exist_ok=True)
        tiny_adapter(base, root / "loras" / name, seed=seed)
    shutil.copytree(root / "loras" / "spare", root / "outside")
    (root / "loras" / "link").symlink_to(root / "outside")
    shutil.copytree(root / "loras" / "spare", root / "loras" / "broken")
    (root / "loras" / "broken" / "adapter_model.safetensors").write_bytes(b"no tensors")
    for name in ("late", "lost", "gone"):
        shutil.copytree(root / "loras" / "spare", root / "loras" / name)
    other = tiny_model(root / "other", hidden=64)
    tiny_adapter(other, root / "loras" / "foreign")
    (root / "keys.toml").write_text(KEYS)
    return root


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Running]:
    arguments = ["--model", folder / "base", "--lora-dir", folder / "loras", "--alias", "prod=law@v2:0.7,law@v3:0.3",
                 "--api-key-file", folder / "keys.toml", "--log", folder / "log.jsonl", "--cors", "https://chat.example",
                 "--max-prompt", "500", "--max-tokens", "300", "--timeout", "3"]  # fmt: skip
    one = (folder / "loras" / "spare" / "adapter_model.safetensors").stat().st_size
    with suite_serve(folder, *arguments, "--adapter-memory", str(one)) as running:
        yield running


def post(server: Running, path: str, key: str = "ops", **body: Any) -> httpx.Response:
    return server.http.post(f"/v1/{path}", json=body, headers={"Authorization": f"Bearer sk-{key}"})


def get(server: Running, path: str, key: str = "ops") -> httpx.Response:
    return server.http.get(path, headers={"Authorization": f"Bearer sk-{key}"})


def chat(server: Running, model: str, key: str = "ops", **more: Any) -> httpx.Response:
    settings = {"messages": QUESTION, "max_tokens": 4, "temperature": 0, **more}
    return post(server, "chat/completions", key, model=model, **settings)


def answer(server: Running, model: str) -> str:
    got = chat(server, model, max_tokens=12)
    assert got.status_code == 200, got.text
    return str(got.json()["choices"][0]["message"]["content"])


def error(response: httpx.Response, status: int) -> str:
    assert response.status_code == status, response.text
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    return str(response.json()["error"]["message"])


def metrics(server: Running) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    page = get(server, "/metrics")
    assert page.headers["content-type"].startswith("text/plain")
    families = text_string_to_metric_families(page.text)
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


def logged(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_every_folder_of_adapters_is_offered_and_answers(server: Running, folder: Path) -> None:
    listed = [card["id"] for card in get(server, "/v1/models").json()["data"]]
    assert listed == ["base", "broken", "foreign", "gone", "late", "law@v2", "law@v3", "link", "lost", "spare", "prod"]
    texts = {model: answer(server, model) for model in ("base", "law@v2", "law@v3", "spare")}
    assert len(set(texts.values())) == 4
    assert "cannot be served: not a safetensors file" in error(chat(server, "broken"), 400)
    foreign = error(chat(server, "foreign"), 400)
    assert "another base" in foreign
    assert str(folder) not in foreign
    assert answer(server, "base") == texts["base"]


def test_adapters_come_and_go_at_run_time(server: Running, folder: Path) -> None:
    load = {"lora_name": "style", "lora_path": "team/style"}
    assert error(chat(server, "style"), 404)
    assert post(server, "load_lora_adapter", **load).text == "Success: LoRA adapter 'style' added successfully."
    first = answer(server, "style")
    assert first != answer(server, "base")
    assert "has already been loaded" in error(post(server, "load_lora_adapter", **load), 400)
    other = {"lora_name": "style", "lora_path": str(folder / "loras" / "spare"), "load_inplace": True}
    assert post(server, "load_lora_adapter", **other).status_code == 200
    assert answer(server, "style") == answer(server, "spare") != first
    assert post(server, "unload_lora_adapter", lora_name="style").text.startswith(
        "Success: LoRA adapter 'style' removed"
    )
    assert error(chat(server, "style"), 404)
    assert "cannot be found" in error(post(server, "unload_lora_adapter", lora_name="style"), 404)
    assert not any(("model", "style") in labels for _, labels in metrics(server))


@pytest.mark.parametrize(
    ("name", "path", "status"),
    [
        ("x", "../outside", 400),
        ("x", "OUTSIDE", 400),
        ("x", "link", 400),
        ("x", "/etc", 400),
        ("x", "team\0style", 400),
        ("x", "..", 400),
        ("x", "", 400),
        ("", "spare", 400),
        ("base", "spare", 400),
        ("prod", "spare", 400),
        ("a name", "spare", 400),
        ("x", "broken", 400),
        ("x", "foreign", 400),
        ("x", "team", 400),
        ("x", "nothing", 404),
    ],
)
def test_paths_and_names_that_are_refused(server: Running, folder: Path, name: str, path: str, status: int) -> None:
    said = error(
        post(server, "load_lora_adapter", lora_name=name, lora_path=path.replace("OUTSIDE", str(folder / "outside"))),
        status,
    )
    assert str(folder / "outside") not in said
    assert name not in [card["id"] for card in get(server, "/v1/models").json()["data"]] or name in ("base", "prod")


@pytest.mark.parametrize("path", ["load_lora_adapter", "unload_lora_adapter", "aliases/prod"])
@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"null", b"[]", b'{"lora_name": 1}', b'{"lora_name": "\\ud800", "lora_path": "x"}',
     b'{"law@v2": NaN}', b'{"law@v2": 1e999}', b'{"law@v2": true, "lora_name": "' + b"x" * 10_000 + b'"}'],
    ids=lambda body: repr(body[:20]),
)  # fmt: skip
def test_hostile_bodies_change_nothing(server: Running, path: str, body: bytes) -> None:
    method = "PUT" if path.startswith("aliases") else "POST"
    headers = {"Authorization": "Bearer sk-ops", "Content-Type": "application/json"}
    before = get(server, "/v1/models").json()
    answer = server.http.request(method, f"/v1/{path}", content=body, headers=headers)
    assert answer.status_code in (400, 404), answer.text
    assert answer.json()["error"]["message"]
    assert get(server, "/v1/models").json() == before


def test_an_adapter_that_is_deleted(server: Running, folder: Path) -> None:
    shutil.rmtree(folder / "loras" / "late")
    assert "no such folder" in error(chat(server, "late"), 400)
    assert chat(server, "spare").status_code == 200
    assert post(server, "unload_lora_adapter", lora_name="late").status_code == 200
    assert server.http.get("/health").json()["failed_steps"] == 0


def test_an_adapter_that_is_deleted_after_it_left_memory(server: Running, folder: Path) -> None:
    assert chat(server, "lost").status_code == chat(server, "spare").status_code == 200
    shutil.rmtree(folder / "loras" / "lost")
    said = error(chat(server, "lost"), 400)
    assert "the adapter 'lost' cannot be served" in said
    assert str(folder) not in said + chat(server, "lost", stream=True).text
    assert server.http.get("/health").json()["failed_steps"] == 0


def test_a_stream_says_of_an_adapter_that_is_gone_what_an_answer_says(server: Running, folder: Path) -> None:
    assert chat(server, "gone").status_code == chat(server, "spare").status_code == 200
    shutil.rmtree(folder / "loras" / "gone")
    wanted = chat(server, "gone").json()["error"]
    streamed = chat(server, "gone", stream=True).text
    assert [json.loads(line[6:]) for line in streamed.splitlines() if '"error"' in line] == [{"error": wanted}]
    body = {"model": "gone", "input": "Say it."}
    headers = {"Authorization": "Bearer sk-ops"}
    whole = server.http.post("/v1/responses", json=body, headers=headers)
    assert (whole.status_code, whole.json()["error"]) == (400, wanted)
    text = server.http.post("/v1/responses", json={**body, "stream": True}, headers=headers).text
    types: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
    events = [types.validate_json(line[6:]) for line in text.splitlines() if line.startswith("data: ")]
    assert [event.type for event in events[-2:]] == ["error", "response.failed"]
    told, failed = events[-2], events[-1].response.error
    assert (told.code, told.message, told.param) == (wanted["type"], wanted["message"], "model")
    assert (failed.code, failed.message) == ("invalid_prompt", wanted["message"])


def test_an_alias_shares_requests_out_and_says_who_answered(server: Running) -> None:
    before = metrics(server)
    got = [chat(server, "prod", max_tokens=1, user=f"user {number}") for number in range(40)]
    models = [response.json()["model"] for response in got]
    assert set(models) == {"law@v2", "law@v3"}
    assert Counter(models)["law@v2"] > 20
    assert [response.headers["x-model"] for response in got] == models
    again = [chat(server, "prod", max_tokens=1, user=f"user {number}").json()["model"] for number in range(10)]
    assert again == models[:10]
    counted = metrics(server)
    for model in ("law@v2", "law@v3"):
        name = ("suite_alias_requests_total", frozenset({("alias", "prod"), ("model", model)}))
        assert counted[name] - before.get(name, 0) == [*models, *again].count(model)
    streamed = chat(server, "prod", stream=True)
    assert f'"model":"{streamed.headers["x-model"]}"' in streamed.text.replace(" ", "")


def test_an_alias_is_changed_and_taken_back(server: Running) -> None:
    def put(weights: Any, key: str = "ops", name: str = "prod") -> httpx.Response:
        return server.http.put(f"/v1/aliases/{name}", json=weights, headers={"Authorization": f"Bearer sk-{key}"})

    assert put({"law@v3": 1}).json()["targets"] == {"law@v3": 1.0}
    assert {chat(server, "prod", max_tokens=1).json()["model"] for _ in range(5)} == {"law@v3"}
    assert "target of the alias" in error(post(server, "unload_lora_adapter", lora_name="law@v3"), 409)
    back = post(server, "aliases/prod/rollback").json()
    assert back["targets"] == pytest.approx({"law@v2": 0.7, "law@v3": 0.3})
    assert "no split before" in error(post(server, "aliases/prod/rollback"), 409)
    assert "did you mean" in error(put({"law@v4": 1}), 400)
    assert "there is a model" in error(put({"law@v3": 1}, name="base"), 400)
    for wrong in ({}, {"law@v2": -1}, {"law@v2": "much"}, [1]):
        error(put(wrong), 400)
    assert put({"base": 1}, name="canary").status_code == 200
    assert [alias["id"] for alias in get(server, "/v1/aliases").json()["data"]] == ["prod", "canary"]
    assert server.http.delete("/v1/aliases/canary", headers={"Authorization": "Bearer sk-ops"}).json()["deleted"]
    assert error(chat(server, "canary"), 404)
    assert error(put({"base": 1}, key="team"), 403)


def test_what_a_key_may_see_and_do(server: Running) -> None:
    assert [card["id"] for card in get(server, "/v1/models", "team").json()["data"]] == ["base", "prod"]
    assert chat(server, "prod", "team").status_code == 200
    said = error(chat(server, "law@v2", "team"), 404)
    assert "'base', 'prod'" in said
    assert "law@v3" not in said
    assert error(get(server, "/v1/models/law@v2", "team"), 404)
    assert error(get(server, "/metrics", "team"), 403)
    assert error(post(server, "load_lora_adapter", "team", lora_name="x", lora_path="spare"), 403)
    assert error(post(server, "unload_lora_adapter", "team", lora_name="spare"), 403)
    for key in ("", "wrong", "ops2", "op"):
        assert error(chat(server, "base", key), 401)
    assert [server.http.get(path).status_code for path in ("/health", "/ready", "/metrics", "/v1/models")] == [
        200, 200, 401, 401]  # fmt: skip
    with (
        pytest.raises(openai.AuthenticationError),
        openai.OpenAI(base_url=f"{server.http.base_url}/v1", api_key="wrong", max_retries=0) as client,
    ):
        client.models.list()


def test_a_key_that_used_its_tokens_waits(server: Running) -> None:
    assert chat(server, "base", "slow", max_tokens=30, ignore_eos=True).status_code == 200
    with (
        pytest.raises(openai.RateLimitError) as refused,
        openai.OpenAI(base_url=f"{server.http.base_url}/v1", api_key="sk-slow", max_retries=0) as client,
    ):
        client.chat.completions.create(model="base", messages=QUESTION)  # type: ignore[arg-type]
    assert 60 < int(refused.value.response.headers["retry-after"]) < 180


def test_limits_of_prompts_tokens_and_time(server: Running) -> None:
    assert "500" in error(post(server, "completions", model="base", prompt=[5] * 501), 400)
    got = post(server, "completions", model="base", prompt="The", max_tokens=301, temperature=0, ignore_eos=True)
    assert (got.status_code, got.json()["usage"]["completion_tokens"]) == (200, 300)
    assert "longer" in error(post(server, "completions", **LONG), 504)
    assert '"code":"timeout"' in post(server, "completions", **LONG, stream=True).text.replace(" ", "")


def test_web_pages_of_the_named_origins(server: Running) -> None:
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    for origin, allowed in (("https://chat.example", "https://chat.example"), ("https://evil.example", None)):
        preflight = server.http.options("/v1/chat/completions", headers={"Origin": origin, **asks})
        assert preflight.headers.get("access-control-allow-origin") == allowed
    refused = server.http.get("/v1/models", headers={"Origin": "https://chat.example"})
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, "https://chat.example")


def test_metrics_tell_what_happened(server: Running) -> None:
    before = metrics(server)
    assert chat(server, "law@v2", max_tokens=5, ignore_eos=True).status_code == 200
    after = metrics(server)

    def grew(name: str, **labels: str) -> float:
        key = (f"suite_{name}", frozenset(labels.items()))
        return after[key] - before.get(key, 0)

    assert grew("requests_total", route="/v1/chat/completions", model="law@v2", status="200") == 1
    assert grew("generation_tokens_total", model="law@v2") == 5
    assert grew("prompt_tokens_total", model="law@v2") > 5
    for histogram in ("queue", "time_to_first_token", "time_per_output_token"):
        assert grew(f"{histogram}_seconds_count", model="law@v2") == 1
    assert grew("engine_steps_total", model="base") >= 5
    assert grew("engine_failures_total", model="base") == 0
    base = frozenset({("model", "base")})
    assert after["suite_adapters_resident", base] >= 1
    assert after["suite_engine_adapter_slots", base] >= 0
    assert after["suite_engine_running", base] == after["suite_engine_waiting", base] == 0
    assert all(len(labels) <= 4 for _, labels in after)
    assert not [labels for _, labels in after if ("model", "law@v4") in labels]


def test_the_log_names_who_asked_what_and_never_the_contents(server: Running, folder: Path) -> None:
    headers = {"Authorization": "Bearer sk-team", "x-request-id": "trace-7"}
    body = {"model": "prod", "messages": [{"role": "user", "content": "a very private matter"}], "max_tokens": 3}
    assert server.http.post("/v1/chat/completions", json=body, headers=headers).headers["x-request-id"] == "trace-7"
    with pytest.raises(httpx.ReadTimeout):
        server.http.post(
            "/v1/completions", headers={**headers, "x-request-id": "gone-1"}, timeout=0.2,
            json=LONG,
        )  # fmt: skip
    chat(server, "base")
    lines = {line["id"]: line for line in logged(folder)}
    assert (lines["trace-7"]["key"], lines["trace-7"]["alias"], lines["trace-7"]["status"]) == ("team", "prod", 200)
    assert lines["trace-7"]["model"] in ("law@v2", "law@v3")
    assert lines["trace-7"]["prompt_tokens"] > 5
    assert 0 <= lines["trace-7"]["queue_ms"] <= lines["trace-7"]["ttft_ms"] <= lines["trace-7"]["total_ms"]
    assert (lines["gone-1"]["gone"], lines["gone-1"]["status"]) == (True, 499)
    changes = [(line["key"], line["alias"] or line["adapter"]) for line in lines.values() if line["method"] == "PUT"]
    assert set(changes) == {("ops", "prod"), ("ops", "canary"), ("ops", None), ("team", None)}
    text = (folder / "log.jsonl").read_text() + server.errors.read_text()
    assert "private" not in text
    assert "sk-" not in text
    assert "Traceback" not in text
