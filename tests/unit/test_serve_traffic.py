"""What stands around the routes, around an application that is no engine: ids, keys, limits, log lines, metrics."""

from __future__ import annotations

import asyncio
import io
import json
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from serve.admission import Admission, Rate
from serve.errors import ApiError
from serve.keys import Key, Keys, Rights
from serve.metrics import Metrics
from serve.middleware import ApiKeys, BodyLimit
from serve.traffic import Answered, Exchange, Observed, RequestLog, Traffic

SECRET = "the contents of the question"


async def ask(request: Request) -> Response:
    """Stands for a route that generates; its body says what happened."""
    body = json.loads(await request.body())
    exchange = Exchange.of(request)
    exchange.model, exchange.alias = body.get("model", ""), body.get("alias", "")
    tokens = body.get("tokens", 5)
    exchange.answers.append(Answered(7, tokens, "stop", 0.25, 0.5, 0.5 + 0.01 * (tokens - 1)))
    await asyncio.sleep(body.get("seconds", 0))
    if body.get("fails"):
        raise ValueError(SECRET)
    return JSONResponse({"read": len(body.get("text", ""))})


async def health(_: Request) -> Response:
    return Response()


class Server:
    """The middleware around `ask`, in the gateway's order."""

    def __init__(self, keys: list[Key] | None = None, body_limit: int = 1000, body_seconds: float = 5) -> None:
        self.traffic, self.metrics, self.lines = Traffic(), Metrics(dict), io.StringIO()
        app = Starlette(routes=[Route("/v1/ask", ask, methods=["POST"]), Route("/health", health)])
        app.add_middleware(BodyLimit, limit=body_limit, seconds=body_seconds)
        if keys:
            app.add_middleware(ApiKeys, keys=Keys(keys))
        observers = [self.metrics, RequestLog(self.lines)]
        app.add_middleware(Observed, traffic=self.traffic, observers=observers, routes=app.routes)
        self.app = app

    def run(self, talk: Callable[[httpx.AsyncClient], Any]) -> Any:
        async def main() -> Any:
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
                return await talk(client)

        return asyncio.run(main())

    def post(self, headers: dict[str, str] | None = None, **body: Any) -> httpx.Response:
        got = self.run(lambda client: client.post("/v1/ask", json=body, headers=headers))
        assert isinstance(got, httpx.Response)
        return got

    @property
    def logged(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.lines.getvalue().splitlines()]

    def metric(self, name: str) -> dict[tuple[str, ...], float]:
        families = text_string_to_metric_families(self.metrics.text().decode())
        return {
            tuple(v for _, v in sorted(s.labels.items())): s.value
            for f in families
            for s in f.samples
            if s.name == name
        }


def bearer(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


def test_each_request_is_one_line_without_its_contents() -> None:
    server = Server([Key.of("sk-secret", "alice")])
    answer = server.post({**bearer("sk-secret"), "x-request-id": "abc-1"}, model="law@v2", alias="prod", text=SECRET)
    assert (answer.headers["x-request-id"], answer.headers["x-model"]) == ("abc-1", "law@v2")
    (line,) = server.logged
    wanted = {
        "id": "abc-1", "key": "alice", "method": "POST", "route": "/v1/ask", "alias": "prod", "model": "law@v2",
        "status": 200, "prompt_tokens": 7, "new_tokens": 5, "queue_ms": 250.0, "ttft_ms": 500.0, "finish": "stop",
        "gone": False,
    }  # fmt: skip
    assert {key: line[key] for key in wanted} == wanted
    assert line["total_ms"] > 0
    assert SECRET not in server.lines.getvalue()
    assert "sk-secret" not in server.lines.getvalue()


@pytest.mark.parametrize("given", ["", "two words", "x" * 129, '"}', "é"])
def test_an_id_that_could_break_a_log_is_replaced(given: str) -> None:
    server = Server()
    answer = server.run(lambda c: c.post("/v1/ask", json={}, headers=[(b"x-request-id", given.encode())]))
    assert server.logged[0]["id"] == answer.headers["x-request-id"] != given


def test_a_name_of_any_script() -> None:
    server = Server()
    assert server.post(model="法律@v2").headers["x-model"] == "%E6%B3%95%E5%BE%8B@v2"
    assert server.logged[0]["model"] == "法律@v2"
    assert server.metric("suite_prompt_tokens_total") == {("法律@v2",): 7.0}


def test_what_fails_is_logged_and_counted_too() -> None:
    server = Server()
    assert server.post(model="base", fails=True).status_code == 500
    assert server.logged[0]["status"] == 500
    assert server.traffic.running == set()
    assert server.metric("suite_requests_total") == {("base", "/v1/ask", "500"): 1.0}


def test_probes_are_not_logged_and_made_up_paths_become_no_label() -> None:
    server = Server()

    async def talk(client: httpx.AsyncClient) -> None:
        await client.get("/health")
        for number in range(5):
            await client.get(f"/made/up/{number}")

    server.run(talk)
    assert [line["route"] for line in server.logged] == ["other"] * 5
    assert server.metric("suite_requests_total") == {("", "/health", "200"): 1.0, ("", "other", "404"): 5.0}


def test_a_client_that_goes_away() -> None:
    server = Server()

    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    async def send(_: Any) -> None:
        raise OSError("nobody listens")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()

    observed = Observed(app, server.traffic, [RequestLog(server.lines)], [])
    asyncio.run(observed({"type": "http", "method": "POST", "path": "/", "headers": []}, receive, send))
    assert (server.logged[0]["status"], server.logged[0]["gone"]) == (499, True)


def test_keys() -> None:
    server = Server([Key.of("one", "a"), Key.of("two", "b")])
    tries = [None, bearer("three"), {"Authorization": "Basic one"}, {"Authorization": "Bearer"}, bearer("one"),
             {"Authorization": "bearer two"}]  # fmt: skip
    assert [server.post(headers).status_code for headers in tries] == [401, 401, 401, 401, 200, 200]
    assert server.post().headers["www-authenticate"] == "Bearer"
    assert server.run(lambda c: c.get("/health")).status_code == 200
    assert server.metric("suite_requests_total")["", "/v1/ask", "401"] == 5


def test_limits_of_a_key_are_its_own() -> None:
    server = Server(
        [Key.of("one", "a", Rights(requests_per_minute=2)), Key.of("two", "b", Rights(tokens_per_minute=20))]
    )
    assert [server.post(bearer("one")).status_code for _ in range(3)] == [200, 200, 429]
    refused = server.post(bearer("one"))
    assert int(refused.headers["retry-after"]) in (29, 30)
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert [server.post(bearer("two")).status_code for _ in range(3)] == [200, 200, 429]  # 12 tokens each


def test_how_many_of_a_key_may_run() -> None:
    server = Server([Key.of("one", "a", Rights(concurrent=2))])

    async def talk(client: httpx.AsyncClient) -> list[int]:
        client.headers["Authorization"] = "Bearer one"
        answers = await asyncio.gather(*(client.post("/v1/ask", json={"seconds": 0.05}) for _ in range(4)))
        return [answer.status_code for answer in [*answers, await client.post("/v1/ask", json={})]]

    assert server.run(talk) == [200, 200, 429, 429, 200]


def test_bodies_that_are_too_long_or_never_end() -> None:
    server = Server(body_limit=100, body_seconds=0.05)
    assert server.post(text="x" * 100).status_code == 413

    async def pieces(pause: float) -> Any:
        for _ in range(3):
            yield b" " * 40
            await asyncio.sleep(pause)

    assert server.run(lambda c: c.post("/v1/ask", content=pieces(0))).status_code == 413
    assert server.run(lambda c: c.post("/v1/ask", content=pieces(0.2))).status_code == 408
    assert server.post(seconds=0.1).status_code == 200  # once the body is there, time is the answer's


def test_draining_refuses_new_requests_and_says_when_to_come_again() -> None:
    server = Server()

    async def talk(client: httpx.AsyncClient) -> list[int]:
        running = asyncio.ensure_future(client.post("/v1/ask", json={"seconds": 0.05}))
        await asyncio.sleep(0.01)
        server.traffic.drain(20)
        assert not server.traffic.drained
        new, probe = await client.post("/v1/ask", json={}), await client.get("/health")
        assert new.headers["retry-after"] == "20"
        assert (await running).status_code == 200
        assert server.traffic.drained
        return [new.status_code, probe.status_code]

    assert server.run(talk) == [503, 200]


def test_draining_has_an_end() -> None:
    traffic = Traffic()
    traffic.running.add(Exchange("id", "POST", time.monotonic()))
    traffic.drain(0)
    assert traffic.drained


def test_metrics_of_two_applications_are_apart() -> None:
    one, two = Server(), Server()
    for _ in range(3):
        one.post(model="law@v2", alias="prod")
    two.post(model="base", tokens=1)
    assert one.metric("suite_requests_total") == {("law@v2", "/v1/ask", "200"): 3.0}
    assert two.metric("suite_requests_total") == {("base", "/v1/ask", "200"): 1.0}
    assert one.metric("suite_alias_requests_total") == {("prod", "law@v2"): 3.0}
    assert one.metric("suite_prompt_tokens_total") == {("law@v2",): 21.0}
    assert one.metric("suite_generation_tokens_total") == {("law@v2",): 15.0}
    assert one.metric("suite_time_to_first_token_seconds_sum") == {("law@v2",): 1.5}
    assert one.metric("suite_time_per_output_token_seconds_sum")["law@v2",] == pytest.approx(0.03)
    assert two.metric("suite_time_to_first_token_seconds_count") == {("base",): 1.0}
    assert two.metric("suite_time_per_output_token_seconds_count") == {}  # one token has no next
    one.post(model="base")
    one.metrics.forget("law@v2")
    assert "law@v2" not in one.metrics.text().decode()
    assert one.metric("suite_time_to_first_token_seconds_count") == {("base",): 1.0}


def test_the_present_rate() -> None:
    now = 0.0
    rate = Rate(lambda: now)
    assert rate.now == 0
    for _ in range(200):
        now += 0.5
        rate.note()
    assert rate.now == pytest.approx(2, rel=0.05)
    for _ in range(2000):
        now += 0.1
        rate.note()
    assert rate.now == pytest.approx(10, rel=0.05)
    now += 600
    assert rate.now < 0.001


def test_a_full_queue_says_when_it_will_be_gone() -> None:
    now = 0.0
    admission = Admission(10, ["base", "slow"], lambda: now)
    admission.check("base", 9)

    def retry_after(waiting: int, model: str = "base") -> int:
        with pytest.raises(ApiError) as refused:
            admission.check(model, waiting)
        assert refused.value.status == 429
        return int(refused.value.headers["Retry-After"])

    assert retry_after(10) == 60  # nothing is known of the rate
    done = Exchange("id", "POST", 0, base="base", answers=[Answered(1, 1, "stop", 0, 0, 0)])
    for _ in range(100):
        now += 0.25
        admission(done)
    assert 10 <= retry_after(44) <= 13  # at four a second
    assert retry_after(44, "slow") == 60  # which has a rate of its own
    admission(Exchange("id", "GET", 0))  # of no model
    assert retry_after(100_000) == 60
