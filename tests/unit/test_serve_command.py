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


SEVERAL = """
[serve]
dtype = "bfloat16"
extra = { enforce-eager = true }
lora_dir = []
alias.prod = { small = 1, far = 1 }
[serve.models.small]
model = "@start"
adapters = { law = "@tuned" }
[serve.models.big]
model = "@start"
backend = "vllm"
dtype = "float16"
replicas = 2
env_python = "bin/python"
[serve.models.far]
url = "http://127.0.0.1:9000/v1"
api_key_env = "FAR"
"""


def test_several_models_say_what_differs(tmp_path: Path) -> None:
    plan = pipeline.read(pipeline_file(tmp_path, STAGES + SEVERAL))
    assert plan.serve
    models = {name: model for _, name, model in plan.serve.each()}
    assert [*models] == ["small", "big", "far"]
    assert [(m.backend, m.dtype, m.replicas) for m in models.values()] == [
        ("torch", "bfloat16", 1), ("vllm", "float16", 2), ("torch", "auto", 1)]  # fmt: skip
    assert models["big"].extra == {"enforce-eager": True}
    assert models["big"].env_python == str(tmp_path / "bin" / "python")
    assert plan.serve_sources == {
        ("models", "small", "model"): "start",
        ("models", "small", "adapters", "law"): "tuned",
        ("models", "big", "model"): "start",
    }


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ('dtype = "float16"', 'dtype = "float17"', "pipeline.toml:18: dtype: "),
        ('dtype = "bfloat16"', 'dtype = "float17"', "pipeline.toml:8: dtype: "),
        ("replicas = 2", "replica = 2", "pipeline.toml:19: unknown key 'replica'\n  hint: did you mean 'replicas'?"),
        ('model = "@start"\nbackend', 'model = "@strat"\nbackend', "pipeline.toml:16: no stage 'strat'"),
        ('model = "@start"\nbackend', 'model = "@tuned"\nbackend', "'models.big.model' takes a model or a quantized"),
        ('model = "@start"\nbackend', "backend", "pipeline.toml:15: a model has either a `model` or a `url`"),
        ("law =", "big =", "two models or adapters are called 'big'"),
        ('api_key_env = "FAR"', "replicas = 2", "pipeline.toml:23: 'replicas' is for models that are started here"),
        ("lora_dir", 'base = "@start"\nlora_dir', "pipeline.toml:7: [serve] needs either a `base`, or tables"),
        ("lora_dir", 'adapters = { law = "@tuned" }\nlora_dir', "adapters belong to one of the models"),
        ("[serve.models.far]", "[serve.models]", "write [serve.models.<name>]"),
    ],
)
def test_mistakes_in_tables_of_models_have_a_line(tmp_path: Path, before: str, after: str, said: str) -> None:
    assert before in SEVERAL
    with pytest.raises(SuiteError) as error:
        pipeline.read(pipeline_file(tmp_path, STAGES + SEVERAL.replace(before, after, 1)))
    assert said in str(error.value)


def test_several_models_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*arguments: str) -> str:
        assert main(["serve", *arguments]) == 2
        return capsys.readouterr().err

    monkeypatch.chdir(tmp_path)
    (tmp_path / "serve.toml").write_text('[serve.models.a]\nmodel = "nano"\n[serve.models.b]\nmodel = "nowhere"\n')
    assert "serve.toml: models.b.model: no such file or folder: nowhere" in refused("--config", "serve.toml")
    assert "--config says which models" in refused("--config", "serve.toml", "--model", "nano")
    assert "the file has no [serve] table" in refused("--config", str(pipeline_file(tmp_path, STAGES)))
    assert "--lora is for one model, and there are 2" in refused(
        "--model", "a=nano", "--model", "b=nano", "--lora", "x"
    )
    assert "--alias: there is no model 'c'" in refused("--model", "a=nano", "--model", "b=nano", "--alias", "prod=c:1")
    assert "--host" in refused("--model", "a=nano", "--model", "b=nano", "--host", "0.0.0.0")


def test_the_flags_need_neither_torch_nor_a_web_framework() -> None:
    code = (
        "import sys\nfrom suite.cli import main\n"
        "assert main(['serve', '--host', '0.0.0.0']) == 2\n"
        "print(*[m for m in ('torch', 'transformers', 'fastapi', 'uvicorn', 'prometheus_client') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == ""
