"""`suite serve` says what is wrong before anything is loaded; a pipeline's `[serve]` table takes the same settings."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from serve.server import run
from serve.settings import Settings
from suite import pipeline
from suite.cli import main
from suite.errors import SuiteError
from suite.references import nano
from tests.unit.kinds import pipeline_file

STAGES = '[stage.start]\nuse = "make"\n[stage.tuned]\nuse = "tune"\nbase = "@start"\n'


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--host", "0.0.0.0"], "anybody who reaches 0.0.0.0 could use this server"),
        (["--host", "::", "--alias", "prod=nano"], "--api-key-file or SUITE_API_KEYS"),
        (["--host", "0.0.0.0", "--api-key-file", "nowhere"], "No such file"),
        (["--lora-dir", "nowhere"], "no such folder: nowhere"),
        (["--lora-dir", "LORAS", "--name", "law"], "the base and an adapter are both named 'law'"),
        (["--alias", "prod=nano:0.9,lwa:0.1", "--lora-dir", "LORAS"], "did you mean 'law'"),
        (["--alias", "nano=nano"], "there is a model 'nano'"),
        (["--alias", "prod"], "expected KEY=VALUE"),
        (["--tls-cert", "cert.pem"], "give both --tls-cert and --tls-key"),
        (["--tls-cert", "cert.pem", "--tls-key", "key.pem"], "--tls-cert cert.pem: cannot be used"),
        (["--max-queue", "0"], "--max-queue"),
        (["--port", "99999"], "--port"),
        (["--dtype", "float64"], "--dtype"),
        (["--timeout", "soon"], "--timeout"),
        (["--max-body", "lots"], "--max-body"),
        (["--max-que", "3"], "did you mean '--max-queue'?"),
    ],
)
def test_mistakes_are_told_at_once(
    tmp_path: Path,
    arguments: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loras" / "law").mkdir(parents=True)
    (tmp_path / "loras" / "law" / "adapter_config.json").write_text("{}")
    given = [a.replace("LORAS", str(tmp_path / "loras")) for a in arguments]
    assert main(["serve", "--model", str(nano()), "--name", "nano", *given]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert said in message


def test_a_log_that_cannot_be_written(tmp_path: Path) -> None:
    settings = Settings(model=tmp_path, log=str(tmp_path / "no" / "log"))
    with pytest.raises(SuiteError, match="cannot be written"):
        run(settings, None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("host", "local"), [("127.0.0.1", True), ("localhost", True), ("::1", True), ("0.0.0.0", False), ("::", False)]
)
def test_what_only_this_machine_reaches(tmp_path: Path, host: str, local: bool) -> None:
    assert Settings(model=tmp_path, host=host).local is local


def test_a_pipeline_serves_with_the_same_settings(tmp_path: Path) -> None:
    table = (
        '[serve]\nbase = "@start"\nadapters = { "law@v2" = "@tuned" }\nlora_dir = ["loras"]\nmax_queue = 7\n'
        'api_key_file = "keys.toml"\ncache_memory = "2GiB"\nalias.prod = { "law@v2" = 0.9, "law@v3" = 0.1 }\n'
    )
    serve = pipeline.read(pipeline_file(tmp_path, STAGES + table)).serve
    assert serve
    assert (serve.max_queue, serve.cache_memory, serve.name) == (7, 2 * 2**30, "start")
    assert serve.alias == {"prod": {"law@v2": 0.9, "law@v3": 0.1}}
    assert (serve.lora_dir, serve.api_key_file) == ([str(tmp_path / "loras")], str(tmp_path / "keys.toml"))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('alias.prod = { "law@v2" = 0.9, "law@v3" = 0.1 }', "pipeline.toml:8: there is no model 'law@v3'"),
        ('alias.prod = { "law@v2" = -1 }', "pipeline.toml:8: law@v2 cannot weigh -1.0"),
        ("alias.start = { start = 1 }", "there is a model 'start'"),
        ('alias.prod = { "law@v2" = "much" }', "pipeline.toml:8"),
        ("max_queue = 0", "pipeline.toml:8: max_queue"),
        ("max_que = 1", "did you mean 'max_queue'?"),
    ],
)
def test_mistakes_in_the_table_have_a_line(tmp_path: Path, line: str, said: str) -> None:
    table = f'[serve]\nbase = "@start"\n{line}\nadapters = {{ "law@v2" = "@tuned" }}\n'
    with pytest.raises(SuiteError) as error:
        pipeline.read(pipeline_file(tmp_path, STAGES + table))
    assert said in str(error.value)


def test_the_flags_need_neither_torch_nor_a_web_framework() -> None:
    code = (
        "import sys\nfrom suite.cli import main\n"
        "assert main(['serve', '--host', '0.0.0.0']) == 2\n"
        "print(*[m for m in ('torch', 'transformers', 'fastapi', 'uvicorn', 'prometheus_client') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == ""
