"""API keys: whose they are, what they may do, how much a minute, and that nothing tells them."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.keys import Bucket, Key, Keys, Meter, Rights, read_keys
from suite.errors import SuiteError


class Clock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_keys_of_a_plain_file_and_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys"
    file.write_text("# of the team\nsk-one\n\n  sk-two  \n")
    monkeypatch.setenv("SUITE_API_KEYS", "sk-three, sk-four")
    keys = Keys(read_keys(file))
    for secret in (b"sk-one", b"sk-two", b"sk-three", b"sk-four"):
        found = keys.find(secret)
        assert found
        assert not found[0].rights.admin
        assert found[0].may_use("anything")
        assert secret.decode() not in repr(found[0])
    for secret in (b"", b"sk-on", b"sk-one ", b"# of the team", "sk-öne".encode()):
        assert keys.find(secret) is None


def test_keys_with_rights(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(
        '[alice]\nkey = "sk-a"\nmodels = ["base", "law@*"]\nrequests_per_minute = 60\n[ops]\nkey = "sk-o"\nadmin = true\n'
    )
    alice, ops = read_keys(file)
    assert (alice.name, ops.name, ops.rights.admin, alice.rights.requests_per_minute) == ("alice", "ops", True, 60)
    assert [alice.may_use(name) for name in ("base", "law@v2", "lawyer", "style")] == [True, True, False, False]
    assert (alice.sees_all, ops.sees_all) == (False, True)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no key"),
        ("[a]\nmodels = []\n", "[a] needs a key"),
        ("[a]\nkey = 12345\n", "[a] needs a key"),
        ("a = 'sk-secret'\n", "[a] needs a key"),
        ('[a]\nkey = "sk-secret"\nmodel = "x"\n', "did you mean 'models'"),
        ('[a]\nkey = "sk-secret"\nconcurrent = 0\n', "keys.toml:3"),
        ('[a]\nkey = "sk-secret"\n[b]\nkey = "sk-secret"\n', "of [a] and [b] are the same"),
        ('[a]\nkey = "sk-secret', "not valid TOML"),
    ],
)
def test_wrong_key_files_are_told_without_their_secrets(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(text)
    with pytest.raises(SuiteError) as error:
        read_keys(file)
    assert said in str(error.value)
    assert "secret" not in str(error.value)
    assert "12345" not in str(error.value)


def test_a_key_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SuiteError, match="No such file"):
        read_keys(tmp_path / "keys")


@given(
    per_minute=st.integers(1, 10_000),
    pauses=st.lists(st.floats(0, 120), min_size=1, max_size=60),
)
def test_a_bucket_gives_no_more_than_its_rate_and_what_it_held(per_minute: int, pauses: list[float]) -> None:
    clock = Clock()
    bucket = Bucket(per_minute, clock)
    taken = 0
    for pause in pauses:
        clock.now += pause
        if wait := bucket.missing(1):
            clock.now += wait
            assert bucket.missing(1) < 1e-6
        else:
            bucket.take(1)
            taken += 1
        assert taken <= per_minute + clock.now * per_minute / 60 + 1e-6


def test_a_meter_refuses_and_says_when_to_come_again() -> None:
    clock = Clock()
    meter = Meter(Rights(requests_per_minute=2, concurrent=2), clock)
    for _ in range(2):
        assert meter.refused() is None
        meter.begin()
    assert meter.refused() == ("2 requests of this API key run already", 1)
    meter.end(0)
    assert meter.refused() == ("this API key may make 2 requests a minute", 30)
    clock.now = 31
    assert meter.refused() is None


def test_tokens_are_taken_when_they_are_known() -> None:
    clock = Clock()
    meter = Meter(Rights(tokens_per_minute=100), clock)
    meter.begin()
    meter.end(250)
    refused = meter.refused()
    assert refused
    assert refused[1] == 91  # 150 too many, and one for the next request, at 100 a minute
    clock.now = refused[1]
    assert meter.refused() is None


def test_the_name_of_a_plain_key_is_no_part_of_it() -> None:
    assert Key.of("abcdefgh").name not in "abcdefgh"
    assert Key.of("abcdefgh", "team").name == "team"


def test_a_file_that_changes_is_read_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "keys.toml"
    alice = '[alice]\nkey = "sk-a"\nrequests_per_minute = 2\n'
    file.write_text(alice)
    keys = Keys(read_keys(file), file)
    before = keys.find(b"sk-a")
    file.write_text(alice + '[bob]\nkey = "sk-b"\n')
    assert keys.find(b"sk-b")
    assert keys.find(b"sk-a") == before  # with what it used of its limits
    file.write_text("[alice]\nkey = ")
    assert keys.find(b"sk-b")
    assert "stay as they were" in caplog.text
    file.unlink()
    assert keys.find(b"sk-b")
    file.write_text(alice.replace("sk-a", "sk-new"))
    assert keys.find(b"sk-a") is keys.find(b"sk-b") is None
    assert keys.find(b"sk-new")
    assert "sk-" not in caplog.text
