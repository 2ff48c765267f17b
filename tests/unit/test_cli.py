"""The command itself: quick, quiet about its insides, and torch-free until work begins."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from export.package import Export
from suite import references
from suite.cli import VERBS, main
from suite.commands.flags import Parser, add_settings, values_of
from suite.errors import SuiteError
from suite.stages import KINDS, kind
from tests.unit.kinds import pipeline_file

HEAVY = ("torch", "transformers", "peft", "trl", "datasets", "matplotlib")


def imported_by(code: str) -> set[str]:
    """Which heavy libraries a fresh interpreter has loaded after `code`."""
    script = f"import sys\n{code}\nprint('loaded:', *[m for m in {HEAVY!r} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    return set(run.stdout.splitlines()[-1].split()[1:])


def test_help_loads_nothing_but_the_standard_library() -> None:
    script = (
        "from suite.cli import main; main(['--help'])\nassert not {'pydantic', 'rich', 'fastapi'} & set(sys.modules)"
    )
    assert imported_by(script) == set()


@pytest.mark.parametrize("name", KINDS)
def test_kinds_are_read_without_torch(name: str) -> None:
    module = KINDS[name].partition(":")[0]
    assert imported_by(f"import {module}") == set()
    assert (kind(name).__doc__ or "").strip()
    for field in kind(name).model_fields.values():
        assert field.description


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([verb, "--help"])
    assert left.value.code == 0
    assert f"suite {verb}" in capsys.readouterr().out


def test_planning_the_quickstart_needs_no_torch() -> None:
    file = Path(__file__).parents[2] / "examples" / "quickstart.toml"
    assert imported_by(f"from suite.cli import main; assert main(['plan', {str(file)!r}]) == 0") == set()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["rnu"], "did you mean 'run'?"),
        (["run"], "required: pipeline"),
        (["run", "no.toml"], "no such file: no.toml"),
        (["run", "PIPELINE", "--job", "2"], "did you mean '--jobs'?"),
        (["run", "PIPELINE", "--jobs", "0"], "--jobs must be at least 1"),
        (["run", "PIPELINE", "--force", "strat"], "did you mean 'start'?"),
        (["run", "PIPELINE", "--serve"], "needs a [serve] table"),
        (["show", "nothing"], "no run or artifact 'nothing'"),
        (["merge", "--adapter", "nowhere"], "--adapter: no such file or folder: nowhere"),
        (["merge", "--adaptor", "x"], "did you mean '--adapter'?"),
        (["merge"], "'adapter' is missing"),
        (["quantize", "--model", "MODEL", "--bits", "five"], "--bits: bits: "),
        (["serve", "--model", "nowhere"], "--model: no such file or folder: nowhere"),
        (["serve", "--model", "MODEL", "--backend", "trch"], "torch"),
        (["eval", "--model", "MODEL", "--sets", "ceval-mni"], "ceval-mini"),
    ],
)
def test_wrong_input_is_one_message_and_exit_code_2(
    tmp_path: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = pipeline_file(tmp_path, '[stage.start]\nuse = "make"\n')
    replaced = [a.replace("PIPELINE", str(file)).replace("MODEL", str(references.nano())) for a in arguments]
    assert main(replaced) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert said in message
    assert "Traceback" not in message


def test_runs_and_artifacts_are_shown(tmp_path: Path, suite_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = pipeline_file(tmp_path, '[stage.start]\nuse = "make"\n[stage.t]\nuse = "tune"\nbase = "@start"\n')
    assert main(["runs"]) == 0
    assert "no runs yet" in capsys.readouterr().out
    assert main(["run", str(file)]) == 0
    assert main(["plan", str(file), "--json"]) == 0
    planned = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [p["then"] for p in planned] == ["cached", "cached"]
    assert main(["runs", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["verdict"] == "ok"
    assert main(["show"]) == 0
    assert "Stages" in capsys.readouterr().out
    for name in (planned[1]["key"][:10], "@t"):
        assert main(["show", name]) == 0
        assert "base: start (model" in capsys.readouterr().out


def test_a_store_without_write_permission(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SUITE_HOME", str(tmp_path / "file" / "below"))
    assert main(["runs"]) == 2
    assert "SUITE_HOME" in capsys.readouterr().err


def test_json_events_are_one_object_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = pipeline_file(tmp_path, '[stage.start]\nuse = "make"\n')
    assert main(["run", str(file), "--json"]) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {
        "event": "progress",
        "stage": "start",
        "step": 1,
        "total": 1,
        "what": "writing",
        "values": {"loss": 0.5},
    } in events
    assert events[-1]["ok"] is True


def test_a_switch_needs_no_value() -> None:
    parser = Parser("suite export", "")
    add_settings(parser, Export)
    given = (["--create"], ["--create", "false", "--name", "x"], ["--no-create"], ["--no-create", "--create"])
    values = [values_of(Export, parser.read(words)) for words in given]
    assert values == [{"create": True}, {"create": False, "name": "x"}, {"create": False}, {"create": True}]
    assert "--no-create:false" in "".join(parser.format_help().split())  # lines break at hyphens
    assert "--no-name" not in parser.format_help()
    with pytest.raises(SuiteError, match="ignored explicit argument 'true'"):
        parser.read(["--no-create=true"])
    with pytest.raises(SuiteError) as unknown:
        parser.read(["--no-crate"])
    assert "--no-create" in unknown.value.hint
