"""Traffic split: shares come out as asked, users stay where they are, and no more move than must."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.aliases import Aliases, pick
from suite.config import Where, parse
from suite.errors import SuiteError
from suite.serving import Options, check_aliases

WEIGHTS = st.dictionaries(st.sampled_from("abcdef"), st.floats(0.05, 10), min_size=1, max_size=5)
USERS = [f"user {number}" for number in range(400)]


@settings(max_examples=20)
@given(WEIGHTS)
def test_shares_converge(weights: dict[str, float]) -> None:
    counts = Counter(pick(weights, user) for user in USERS)
    total = sum(weights.values())
    for target, weight in weights.items():
        share = weight / total
        # five standard deviations of a binomial
        assert abs(counts[target] / len(USERS) - share) <= 5 * (share * (1 - share) / len(USERS)) ** 0.5 + 1e-9


@settings(max_examples=30)
@given(WEIGHTS, WEIGHTS)
def test_no_user_moves_between_targets_that_stayed(before: dict[str, float], after: dict[str, float]) -> None:
    for user in USERS[:100]:
        was, now = pick(before, user), pick(after, user)
        if was != now:
            assert after.get(was, 0) < before[was] or after[now] > before.get(now, 0)


@settings(max_examples=30)
@given(WEIGHTS, st.text())
def test_a_user_stays_and_what_weighs_nothing_gets_nobody(weights: dict[str, float], user: str) -> None:
    with_nothing = {**weights, "never": 0.0}
    assert pick(with_nothing, user) == pick(dict(reversed(with_nothing.items())), user) != "never"


def test_requests_without_a_user_are_spread() -> None:
    aliases = Aliases({"prod": {"a": 1, "b": 1}})
    assert {aliases.pick("prod") for _ in range(100)} == {"a", "b"}
    assert len({aliases.pick("prod", "someone") for _ in range(100)}) == 1


def test_going_back() -> None:
    aliases = Aliases({"prod": {"a": 3, "b": 1}})
    assert aliases.shares("prod") == {"a": 0.75, "b": 0.25}
    assert aliases.before("prod") is None
    aliases.put("prod", {"b": 2})
    aliases.put("prod", {"c": 1})
    assert (aliases.of("c"), aliases.of("a")) == (["prod"], [])
    for wanted in ({"b": 1.0}, {"a": 0.75, "b": 0.25}):
        aliases.rollback("prod")
        assert aliases.shares("prod") == wanted
    with pytest.raises(IndexError):
        aliases.rollback("prod")
    aliases.remove("prod")
    assert "prod" not in aliases


@pytest.mark.parametrize(
    ("alias", "said"),
    [
        ("prod=law:0.9,lwa:0.1", "did you mean 'law'"),
        ("prod=law:-1", "law cannot weigh -1.0"),
        ("prod=law:nan", "law cannot weigh nan"),
        ("prod=law:inf", "law cannot weigh inf"),
        ("prod=law:0", "nothing has a weight"),
        ("prod=", "nothing has a weight"),
        ("law=style", "there is a model 'law'"),
        ("a/b=law", "letters, digits"),
        ("a b=law", "letters, digits"),
    ],
)
def test_wrong_aliases(alias: str, said: str) -> None:
    name, _, weights = alias.partition("=")
    options = parse(Options, {"alias": {name: weights}}, Where())
    with pytest.raises(SuiteError) as error:
        check_aliases(options.alias, ["law", "style", "law@v2"])
    assert said in str(error.value)


def test_an_alias_as_a_flag_says_it() -> None:
    given = {"prod": "law@v2:0.9, law@v3:0.1", "odd": "a:b", "table": {"x": 1}}
    options = parse(Options, {"alias": given}, Where())
    assert options.alias == {"prod": {"law@v2": 0.9, "law@v3": 0.1}, "odd": {"a:b": 1.0}, "table": {"x": 1.0}}
