"""`suite chat`: lines in, answers out, against the server and against an endpoint that a test controls."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from suite.cli import main
from suite.commands.answers import Answer, beside
from suite.commands.chat import Talk
from tests.contract.conftest import Served
from tests.contract.streaming_fake import Delta, endless, streaming

ROOT = Path(__file__).parents[2]
CALL = {"index": 0, "id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city"'}}
REST = {"index": 0, "function": {"arguments": ': "Rome"}'}}


@pytest.fixture
def talk(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Types lines into `suite chat`; returns its exit code, what it printed, and its errors."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)

    def run(url: str, *lines: str, flags: tuple[str, ...] = ()) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
        code = main(["chat", "--url", url, *flags])
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return run


def said(served: Served, model: str, *messages: str) -> str:
    turns: Any = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(messages)]
    got = served.openai.chat.completions.create(model=model, messages=turns, temperature=0, max_tokens=8)
    return got.choices[0].message.content or ""


def test_a_conversation_with_a_server(served: Served, tmp_path: Path, talk: Any) -> None:
    first = said(served, "base", "Hi")
    then = said(served, "a", "Hi", first, "And you?")
    lines = ("Hi", "/model a", "And you?", f"/save {tmp_path / 'kept.jsonl'}")
    code, out, _ = talk(served.endpoint.url, *lines, flags=("--max-tokens", "8"))
    assert code == 0
    assert first in out
    assert then in out
    (row,) = (tmp_path / "kept.jsonl").read_text("utf-8").splitlines()
    assert [m["content"] for m in json.loads(row)["messages"]] == ["Hi", first, "And you?", then]


def test_models_side_by_side(served: Served, talk: Any) -> None:
    flags = ("--compare", "base,a,b", "--max-tokens", "8")
    _, out, _ = talk(served.endpoint.url, "Hi", flags=flags)
    assert out == "".join(f"[{name}]\n{said(served, name, 'Hi')}\n" for name in ("base", "a", "b"))


def echo(body: dict[str, Any]) -> Iterator[Delta]:
    """Says what it was asked, by whom, and how long the conversation is."""
    messages = body["messages"]
    yield {"role": "assistant", "content": ""}
    yield {"content": f"{body['model']} {len(messages)} "}
    yield {"content": messages[-1]["content"]}


def test_orders(talk: Any) -> None:
    with streaming(echo) as fake:
        code, out, _ = talk(
            fake.url,
            "one", "two", "/undo", "/retry", "/system Be brief.", "three", "/new", "four", "/system", "five", "/compare a,b",
            "six", "/model b", "seven", "/models",
        )  # fmt: skip
        asked = [[m["content"] for m in body["messages"]] for body in fake.asked]
    assert code == 0
    assert asked[2] == ["one"]  # after /undo, /retry asks the first again
    assert asked[3] == ["Be brief.", "one", "a 1 one", "three"]
    assert asked[4] == ["Be brief.", "four"]
    assert asked[5] == ["four", "a 2 four", "five"]
    assert asked[-1] == ["four", "a 2 four", "five", "a 3 five", "six", "b 5 six", "seven"]
    assert "[a]\na 5 six\n[b]\nb 5 six\n" in out
    assert out.endswith("a, b\n")


@pytest.mark.parametrize("failure", [400, iter(())], ids=["refused", "empty"])
def test_an_answer_is_kept_until_there_is_another(talk: Any, monkeypatch: pytest.MonkeyPatch, failure: Any) -> None:
    monkeypatch.setattr(Talk, "interactive", True)  # a person goes on after a mistake
    with streaming(lambda body: failure if len(fake.asked) == 2 else echo(body)) as fake:
        code, _, _ = talk(fake.url, "one", "/retry", "two", "/retry")
        asked = [[m["content"] for m in body["messages"]] for body in fake.asked]
    assert code == 0
    assert asked == [["one"], ["one"], *[["one", "a 1 one", "two"]] * 2]


def test_reasoning_and_tools(talk: Any, tmp_path: Path) -> None:
    def rule(body: dict[str, Any]) -> Iterator[Delta]:
        if body["messages"][-1]["role"] == "tool":
            yield {"content": "It is sunny."}
            return
        yield {"reasoning_content": "Where? "}
        yield {"reasoning_content": "Rome."}
        yield {"tool_calls": [CALL]}
        yield {"tool_calls": [REST]}

    (tmp_path / "tools.json").write_text('[{"name": "weather"}]', "utf-8")
    with streaming(rule) as fake:
        code, out, _ = talk(fake.url, "Weather?", "sun", flags=("--tools", str(tmp_path / "tools.json")))
        assert fake.asked[0]["tools"] == [{"type": "function", "function": {"name": "weather"}}]
        _, assistant, result = fake.asked[1]["messages"]
    assert code == 0
    assert out.startswith('Where? Rome.\nweather({"city": "Rome"})\n')
    assert out.endswith("It is sunny.\n")
    assert assistant["tool_calls"][0]["function"] == {"name": "weather", "arguments": '{"city": "Rome"}'}
    assert result == {"role": "tool", "tool_call_id": "c1", "content": "sun"}


def test_mistakes_are_one_message(talk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with streaming(lambda body: 400) as fake:
        for lines, flags, message in (
            (("Hi",), (), "HTTP 400: refused by the test"),
            (("Hi",), ("--compare", "a,b"), "HTTP 400: refused by the test"),
            ((), ("--model", "x"), "no model 'x'"),
            (("/model x",), (), "no model 'x'"),
            (("/save",), (), "needs a file"),
            (("/modle b",), (), "did you mean '/model'?"),
            (("/undo",), (), "nothing was said yet"),
            ((), ("--tools", "nowhere.json"), "cannot be read"),
            ((), ("--api-key-env", "NO_SUCH_KEY"), "NO_SUCH_KEY is not set"),
        ):
            code, _, err = talk(fake.url, *lines, flags=flags)
            assert (code, err.count("error:"), message in err, "Traceback" in err) == (2, 1, True, False), err
        monkeypatch.setenv("KEY", "wrong")
        assert "refuses the API key" in talk(fake.url, flags=("--api-key-env", "KEY"))[2]
    code, _, err = talk(fake.url)
    assert code == 2
    assert "suite serve" in err


def test_columns_on_a_terminal() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=60, height=8, color_system=None)
    answers = [Answer("left"), Answer("right")]
    with beside(console, answers) as shown:
        for number in range(30):
            for answer in answers:
                answer.add({"content": f"{answer.model}{number} "}, shown)
    shown_last = console.file.getvalue().rpartition("\x1b[2K")[2]  # type: ignore[attr-defined]
    first = next(line for line in shown_last.splitlines() if "left0" in line)
    assert "right0" in first
    assert "left29" in shown_last
    assert max(map(len, shown_last.splitlines())) <= 60


def test_ctrl_c_stops_the_answer_and_not_the_chat() -> None:
    with streaming(lambda body: endless("word ") if body["messages"][-1]["content"] == "go" else echo(body)) as fake:
        ours, theirs = pty.openpty()
        process = subprocess.Popen(
            [sys.executable, "-m", "suite.cli", "chat", "--url", fake.url],
            cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
            env={**os.environ, "TERM": "xterm"},
            # what runs in the background ignores Ctrl-C, and so would what it starts
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        os.close(theirs)
        try:
            seen = until(ours, "a> ")
            os.write(ours, b"go\n")
            seen = until(ours, "word word word")
            process.send_signal(signal.SIGINT)
            seen = until(ours, "(stopped)")
            os.write(ours, b"still there?\n")
            seen = until(ours, "a 3 still there?")
            os.write(ours, b"/quit\n")
            assert process.wait(20) == 0, seen
        finally:
            process.kill()
            process.wait()
            os.close(ours)
        deadline = time.monotonic() + 10
        while not fake.broken_off and time.monotonic() < deadline:
            time.sleep(0.05)
        assert fake.broken_off == 1


def until(terminal: int, text: str) -> str:
    """What the terminal shows, up to `text`."""
    seen, deadline = "", time.monotonic() + 30
    while text not in seen:
        ready = select.select([terminal], [], [], max(0.0, deadline - time.monotonic()))[0]
        assert ready, seen
        seen += os.read(terminal, 4096).decode("utf-8", "replace")
    return seen
