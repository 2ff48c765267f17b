"""Which folders a client may name: none outside those of the operator, whatever the path looks like."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serve.offers import inside, offers
from suite.errors import SuiteError


def adapter(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")
    return folder


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    adapter(tmp_path / "loras" / "law")
    adapter(tmp_path / "loras" / "team" / "deep")
    adapter(tmp_path / "outside")
    adapter(tmp_path / "loras-too" / "near")
    (tmp_path / "loras" / "out").symlink_to(tmp_path / "outside")
    (tmp_path / "loras" / "up").symlink_to("..")
    (tmp_path / "loras" / "alike").symlink_to("law")
    (tmp_path / "loras" / "circle").symlink_to("circle")
    return tmp_path


PIECES = ["law", "team", "deep", "out", "up", "alike", "circle", "outside", "loras", "loras-too", "near", "..", ".", "", " ",
          "~", "\0", "\\", "..\\", "%2e%2e", "\ud800", "x" * 300, "file:", "C:", "....", "\u2024\u2024", "法律", "\n"]  # fmt: skip


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    pieces=st.lists(st.sampled_from(PIECES) | st.text(max_size=4), max_size=6), root=st.sampled_from(["", "/", "TREE/"])
)
def test_nothing_outside_is_ever_found(tree: Path, pieces: list[str], root: str) -> None:
    text = root.replace("TREE", str(tree)) + "/".join(pieces)
    try:
        found = inside(text, [str(tree / "loras")])
    except SuiteError:
        return
    assert found is None or found.resolve().is_relative_to(tree / "loras")


@pytest.mark.parametrize("path", ["law", "./law", "team/deep", "alike", "TREE/loras/law", "team//deep/"])
def test_what_may_be_named(tree: Path, path: str) -> None:
    found = inside(path.replace("TREE", str(tree)), [str(tree / "elsewhere"), str(tree / "loras")])
    assert found
    assert (found / "adapter_config.json").is_file()


@pytest.mark.parametrize(
    "path",
    ["../outside", "law/../../outside", "/", "/etc", "out", "up/outside", "TREE/outside", "TREE/loras-too/near", "circle/x",
     "TREE/loras/../outside", "law\0", "", " ", "\ud800", "law/" + "x" * 5000],
)  # fmt: skip
def test_what_may_not(tree: Path, path: str) -> None:
    with pytest.raises(SuiteError, match="does not lie"):
        inside(path.replace("TREE", str(tree)), [str(tree / "loras")])


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "a\0b", "a/../b"])
def test_a_wrong_text_never_reaches_the_file_system(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def touched(*_: object, **__: object) -> None:
        raise AssertionError("the file system was asked")

    for function in ("resolve", "is_dir", "stat", "exists"):
        monkeypatch.setattr(Path, function, touched)
    with pytest.raises(SuiteError):
        inside(path, ["/srv/loras"])


def test_what_is_not_there_is_not_found(tree: Path) -> None:
    assert inside("nothing", [str(tree / "loras")]) is None
    assert inside("law/adapter_config.json", [str(tree / "loras")]) is None


def test_all_folders_are_offered_by_name(tree: Path) -> None:
    found = offers([str(tree / "loras"), str(tree / "loras-too")])
    assert list(found) == ["alike", "law", "out", "near"]  # the operator's own links count


@pytest.mark.parametrize(
    ("folders", "taken", "said"),
    [
        (["nowhere"], [], "no such folder"),
        (["outside"], [], "is itself an adapter"),
        (["loras"], ["law"], "two adapters are named 'law'"),
        (["loras", "loras"], [], "two adapters are named"),
    ],
)
def test_wrong_folders(tree: Path, folders: list[str], taken: list[str], said: str) -> None:
    with pytest.raises(SuiteError, match=said):
        offers([str(tree / folder) for folder in folders], taken)
