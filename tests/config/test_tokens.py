import pytest
from hypothesis import given
from hypothesis import strategies as st

from zexp.config.errors import ConfigError
from zexp.config.tokens import parse_length, parse_tokens, round_up


@pytest.mark.parametrize(
    ("said", "tokens"),
    [("96K", 96_000), ("1.5B", 1_500_000_000), ("1e6", 10**6), (1e6, 10**6), (4096, 4096), ("10M", 10**7), (0, 0)],
)
def test_token_counts_are_powers_of_a_thousand(said, tokens):
    assert parse_tokens(said, "tokens") == tokens


@pytest.mark.parametrize("said", ["ten", "-5", "1.5", "96k", True, None, [1], "nan", 2.5])
def test_what_is_no_token_count_is_refused_by_its_key(said):
    with pytest.raises(ConfigError, match=r"phases\.pretrain\.tokens"):
        parse_tokens(said, "phases.pretrain.tokens")


def test_a_share_is_of_the_parent_and_needs_one():
    assert parse_length("10%", 577_536, "anneal.tokens") == 57_754
    with pytest.raises(ConfigError, match="no parent"):
        parse_length("10%", None, "phases.pretrain.tokens")


@given(st.integers(0, 10**15), st.integers(1, 10**7))
def test_lengths_are_rounded_up_to_whole_steps(tokens, step):
    rounded = round_up(tokens, step)
    assert rounded % step == 0
    assert tokens <= rounded < tokens + step
