"""`suite predict` against a server: killed at any time it goes on; served for the time of the command it cleans up."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from suite.cli import main
from suite.references import nano
from tests.contract.conftest import Served
from tests.tiny.tiny_models import tiny_adapter

ROOT = Path(__file__).parents[2]
ROWS = 120


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("predict") / "data.jsonl"
    turns = [[{"role": "user", "content": f"Say {i}"}, {"role": "assistant", "content": str(i)}] for i in range(ROWS)]
    path.write_text("\n".join(json.dumps({"messages": messages}) for messages in turns), "utf-8")
    return path


def lines_of(file: Path) -> list[dict[str, Any]]:
    whole = file.read_text("utf-8").rpartition("\n")[0] if file.is_file() else ""
    return [json.loads(line) for line in whole.splitlines()]


def test_killed_and_continued_is_as_if_nothing_happened(
    served: Served, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.jsonl"
    arguments = ["predict", str(rows), "--out", str(out), "--url", served.endpoint.url, "--model", "a"]
    arguments += ["--max-tokens", "24", "--concurrency", "4", "--json"]
    command = [sys.executable, "-m", "suite.cli", *arguments]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(lines_of(out)) < 10 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = {line["digest"]: line for line in lines_of(out)}
    assert 10 <= len(kept) < ROWS
    with out.open("a", encoding="utf-8") as file:
        file.write('{"index": 99, "predict": "tor')
    assert main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["speed"]["questions"] == ROWS - len(kept)
    lines = lines_of(out)
    assert [line["index"] for line in lines] == list(range(ROWS))
    assert all(kept.get(line["digest"], line) == line for line in lines)
    for line in lines[:: ROWS // 6]:
        got = served.openai.chat.completions.create(model="a", messages=line["prompt"], temperature=0, max_tokens=24)
        assert line["predict"] == got.choices[0].message.content
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["speed"] == {}
    assert lines_of(out) == lines


def test_an_adapter_is_served_for_the_command(rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter, out = tiny_adapter(nano(), tmp_path / "adapter"), tmp_path / "out.jsonl"
    arguments = ["predict", str(rows), "--out", str(out), "--model", "nano", "--max-tokens", "8", "--limit", "6"]
    assert main([*arguments, "--lora", str(adapter)]) == 0
    assert "ROUGE-L" in capsys.readouterr().out
    lines, metrics = lines_of(out), json.loads((tmp_path / "out.metrics.json").read_text("utf-8"))
    assert len(lines) == metrics["metrics"]["n"] == 6
    assert set(metrics["model"]) == {"model", "adapter"}
    assert main(arguments) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert lines_of(out) == lines


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "nothing to ask"),
        (["--url", "URL", "--model", "x"], "no model 'x'"),
        (["--url", "URL", "--lora", "x"], "--lora is for a server of our own"),
        (["--url", "http://127.0.0.1:9"], "no answer from"),
        (["--model", "nowhere"], "--model: no such file"),
        (["--url", "URL", "--concurrency", "0"], "must be at least 1"),
        (["--url", "URL", "--extra", "x"], "expected KEY=VALUE"),
        (["--url", "URL", "--out", "FOLDER"], "is a directory"),
    ],
)
def test_mistakes_are_one_message(
    served: Served, rows: Path, tmp_path: Path, flags: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [flag.replace("URL", served.endpoint.url).replace("FOLDER", str(tmp_path)) for flag in flags]
    assert main(["predict", str(rows), "--out", str(tmp_path / "out.jsonl"), *words]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert said in message
    assert not (tmp_path / "out.jsonl").exists()


def test_failed_rows_are_an_exit_code(served: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "data.json"
    path.write_text(
        json.dumps([{"instruction": "far too long " * 2000, "output": "x"}, {"instruction": "a", "output": "b"}])
    )
    out = tmp_path / "out.jsonl"
    assert main(["predict", str(path), "--out", str(out), "--url", served.endpoint.url, "--max-tokens", "4"]) == 1
    assert "1 of 2 rows failed" in capsys.readouterr().err
    assert [line["error"][:8] for line in lines_of(out)] == ["HTTP 400", ""]
