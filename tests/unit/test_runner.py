"""Runs of small plans through the real worker processes: order, cache, crashes, gates."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from suite import pipeline
from suite.cli import main
from suite.commands.pipelines import execute
from suite.store import Store
from tests.namesakes import namesakes
from tests.unit.kinds import pipeline_file

CHAIN = """
[stage.start]
use = "make"
{start}

[stage.tuned]
use = "tune"
base = "@start"
{tuned}

[stage.folded]
use = "fold"
adapter = "@tuned"

[stage.packed]
use = "pack"
models = ["@start", "@folded"]
"""


def chain(folder: Path, start: str = "", tuned: str = "") -> Path:
    return pipeline_file(folder, CHAIN.format(start=start, tuned=tuned))


def contents(home: Path) -> dict[str, str]:
    """Digest of every artifact by its key."""
    return {p.name: a.digest for p in (home / "artifacts").iterdir() if (a := Store(home).get(p.name))}


def report(run_dir: Path) -> dict[str, dict[str, object]]:
    return {s["name"]: s for s in json.loads((run_dir / "report.json").read_text())["stages"]}


def test_a_chain_runs_and_the_second_run_finds_all_of_it(tmp_path: Path, suite_home: Path) -> None:
    plan = pipeline.read(chain(tmp_path))
    run_dir, error = execute(plan)
    assert error is None
    assert [s["state"] for s in report(run_dir).values()] == ["done"] * 4
    assert (run_dir / "artifacts" / "packed" / "1.json").read_text() == '{"steps": "0 1 2"}'
    log = (run_dir / "stages" / "tuned" / "log.txt").read_text().splitlines()
    assert log[0].endswith(f"-m suite.worker {run_dir / 'stages' / 'tuned' / 'stage.json'}")
    before = contents(suite_home)
    run_dir, error = execute(pipeline.read(chain(tmp_path)))
    assert error is None
    assert [s["state"] for s in report(run_dir).values()] == ["cached"] * 4
    assert contents(suite_home) == before
    assert not list((suite_home / "partial").iterdir())


def test_a_stage_can_be_run_by_hand_from_the_first_line_of_its_log(tmp_path: Path, suite_home: Path) -> None:
    run_dir, _ = execute(pipeline.read(chain(tmp_path)))
    key = report(run_dir)["folded"]["key"]
    artifact = suite_home / "artifacts" / str(key)
    artifact.rename(tmp_path / "away")
    command = (run_dir / "stages" / "folded" / "log.txt").read_text().splitlines()[0].removeprefix("# ").split()
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    assert (artifact / "config.json").read_bytes() == (tmp_path / "away" / "config.json").read_bytes()


def test_launch_settings_change_no_key_and_others_do(tmp_path: Path) -> None:
    first, _ = execute(pipeline.read(chain(tmp_path, start="threads = 1")))
    second, _ = execute(pipeline.read(chain(tmp_path, start="threads = 2")))
    third, _ = execute(pipeline.read(chain(tmp_path, start='text = "other"')))
    assert report(first)["start"]["key"] == report(second)["start"]["key"] != report(third)["start"]["key"]


def test_a_result_that_comes_out_as_before_stops_the_rebuild(tmp_path: Path) -> None:
    execute(pipeline.read(chain(tmp_path, start="score = 0.5")))
    run_dir, _ = execute(pipeline.read(chain(tmp_path, start="score = 0.6")))
    states = {name: s["state"] for name, s in report(run_dir).items()}
    assert states == {"start": "done", "tuned": "cached", "folded": "cached", "packed": "cached"}


def test_a_killed_worker_continues_from_its_steps(tmp_path: Path, suite_home: Path) -> None:
    run_dir, error = execute(pipeline.read(chain(tmp_path, tuned="die_at = 2")))
    assert error is not None
    assert error.exit_code == 1
    assert "SIGKILL" in str(error)
    states = {name: s["state"] for name, s in report(run_dir).items()}
    assert states == {"start": "done", "tuned": "failed", "folded": "blocked", "packed": "blocked"}
    run_dir, error = execute(pipeline.read(chain(tmp_path, tuned="die_at = 2")))
    assert error is None
    assert report(run_dir)["tuned"]["warnings"] == ["died once"]
    after_crash = contents(suite_home)
    os.environ["SUITE_HOME"] = str(tmp_path / "other")
    execute(pipeline.read(chain(tmp_path)))
    assert contents(tmp_path / "other") == after_crash


def test_a_setting_that_only_judges_lets_a_run_continue_what_another_left(tmp_path: Path, suite_home: Path) -> None:
    _, error = execute(pipeline.read(chain(tmp_path, tuned="most = 2")))
    assert "too many steps" in str(error)
    (left,) = (suite_home / "partial").iterdir()
    (left / "scratch" / "died").touch()
    accepted, error = execute(pipeline.read(chain(tmp_path, tuned="most = 3")))
    assert error is None
    assert report(accepted)["tuned"]["warnings"] == [
        "died once"
    ]  # as it would of the first run, whose work it went on with
    assert not list((suite_home / "partial").iterdir())
    _, error = execute(pipeline.read(chain(tmp_path, tuned="most = 2")))
    assert "too many steps" in str(error)  # what one accepts is no result for the other


def test_a_failing_stage_says_so_and_its_siblings_go_on(tmp_path: Path) -> None:
    text = (
        CHAIN.format(start="", tuned='fail = "no luck"') + '[stage.sibling]\nuse = "tune"\nbase = "@start"\nsteps = 1\n'
    )
    run_dir, error = execute(pipeline.read(pipeline_file(tmp_path, text)))
    assert error is not None
    assert "RuntimeError: no luck" in str(error)
    states = {name: s["state"] for name, s in report(run_dir).items()}
    assert states["sibling"] == "done"
    assert states["packed"] == "blocked"
    assert "Traceback" in (run_dir / "stages" / "tuned" / "log.txt").read_text()


def test_a_gate_fails_what_depends_on_it_and_nothing_else(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text = """
[stage.before]
use = "make"
score = 0.6
[stage.after]
use = "make"
text = "b"
score = 0.5
gate = ["quality.score >= @before.quality.score - 0.05", "quality.kindness > 0"]
[stage.shipped]
use = "pack"
models = ["@after"]
[stage.kept]
use = "pack"
models = ["@before"]
"""
    file = pipeline_file(tmp_path, text)
    for _ in range(2):  # a gate is judged again when its stage comes from the store
        assert main(["run", str(file)]) == 3
        assert "gate 'quality.score >= @before.quality.score - 0.05' does not hold" in capfd.readouterr().err
    latest = sorted((Path(os.environ["SUITE_HOME"]) / "runs" / "pipeline").iterdir())[-1]
    stages = report(latest)
    assert {n: s["state"] for n, s in stages.items()} == {
        "before": "cached", "after": "cached", "shipped": "blocked", "kept": "cached",
    }  # fmt: skip
    assert "was not measured" in str(stages["after"]["gates"])


def test_force_makes_a_stage_again(tmp_path: Path) -> None:
    file = chain(tmp_path)
    assert main(["run", str(file)]) == 0
    assert main(["run", str(file), "--force", "tuned"]) == 0
    latest = sorted((Path(os.environ["SUITE_HOME"]) / "runs" / "pipeline").iterdir())[-1]
    assert {n: s["state"] for n, s in report(latest).items()} == {
        "start": "cached", "tuned": "done", "folded": "cached", "packed": "cached",
    }  # fmt: skip


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def descendants(pid: int) -> set[int]:
    found = set()
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()
        except FileNotFoundError:
            continue
        if int(fields[1]) == pid:
            child = int(entry.parent.name)
            found |= {child} | descendants(child)
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_run_leaves_no_process_and_continues(
    tmp_path: Path, suite_home: Path, number: signal.Signals
) -> None:
    file = chain(tmp_path, tuned="seconds = 0.2\nsteps = 4")
    command = [sys.executable, "-m", "suite.cli", "run", str(file)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        state: Path | None = None
        while state is None and time.monotonic() < deadline:
            state = next(iter(suite_home.glob("partial/*/scratch/steps")), None)
            time.sleep(0.05)
        assert state is not None
        below = descendants(process.pid)
        assert len(below) == 2  # the warm server and the stage
        process.send_signal(number)
        assert process.wait(20) == (130 if number != signal.SIGKILL else -9)
    deadline = time.monotonic() + 5
    while any(map(alive, below)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in below if alive(pid)]
    run_dir, error = execute(pipeline.read(file))
    assert error is None
    said = (run_dir / "events.jsonl").read_text()
    assert "continuing what an interrupted run left" in said


def test_a_kind_of_ones_own_is_found_where_the_plan_found_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "our_kinds.py").write_text("from tests.unit.kinds import Make\nclass Own(Make):\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path / "own")
    file = tmp_path / "p.toml"
    file.write_text('[stage.start]\nuse = "our_kinds:Own"\n')
    assert execute(pipeline.read(file))[1] is None


def test_files_beside_a_person_are_not_taken_for_our_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = pipeline_file(tmp_path, '[stage.start]\nuse = "make"\n')
    monkeypatch.chdir(namesakes(tmp_path / "here"))
    assert execute(pipeline.read(file))[1] is None


def test_two_runs_at_once_make_each_artifact_once(tmp_path: Path, suite_home: Path) -> None:
    file = chain(tmp_path, tuned="seconds = 0.2")
    command = [sys.executable, "-m", "suite.cli", "run", str(file), "--json"]
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [run.communicate(timeout=60)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    began = [json.loads(line)["stage"] for out in outputs for line in out.splitlines() if '"began"' in line]
    assert sorted(began) == ["folded", "packed", "start", "tuned"]
    assert len(contents(suite_home)) == 4


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of one megabyte."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(place)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("mounting a small disk is not allowed here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_is_said_and_the_run_continues_with_more(
    tmp_path: Path, tiny_disk: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data").write_bytes(b"x" * 3_000_000)
    file = chain(tmp_path, start='data = "data"')
    os.environ["SUITE_HOME"] = str(tiny_disk / "home")
    assert main(["run", str(file)]) == 1
    message = capfd.readouterr().err
    assert "the disk is full" in message
    assert "SUITE_HOME" in message
    assert not list((tiny_disk / "home" / "artifacts").iterdir())
    subprocess.run(["mount", "-o", "remount,size=20m", str(tiny_disk)], check=True)
    assert main(["run", str(file)]) == 0


def test_independent_stages_run_at_the_same_time(tmp_path: Path) -> None:
    meeting = f'use = "meet"\nplace = "{tmp_path}"'
    stages = f'[stage.one]\n{meeting}\nname = "a"\nother = "b"\n[stage.two]\n{meeting}\nname = "b"\nother = "a"\n'
    run_dir, error = execute(pipeline.read(pipeline_file(tmp_path, stages)), jobs=2)
    assert error is None
    assert [s["state"] for s in report(run_dir).values()] == ["done"] * 2
