import math

import pytest

from zexp.train.divergence import Watch

HIGH = math.log(100) + 2.1


def test_a_loss_that_is_not_a_number_diverges_at_once():
    assert "loss is nan" in Watch(100).see(math.nan, 1.0)
    assert "norm is inf" in Watch(100).see(3.0, math.inf)


def test_a_spike_that_recovers_is_no_divergence():
    watch = Watch(100, steps=3)
    assert [watch.see(loss, 1.0) for loss in (HIGH, HIGH, 4.0, HIGH, HIGH)] == [None] * 5


def test_a_loss_that_stays_above_the_uniform_guess_diverges():
    watch = Watch(100, steps=3)
    assert [watch.see(HIGH, 1.0) is None for _ in range(3)] == [True, True, False]


def test_the_count_goes_on_after_an_interruption():
    assert Watch(100, steps=3, above=2).see(HIGH, 1.0) is not None


def test_an_unknown_option_is_refused():
    with pytest.raises(ValueError, match="no key 'loss_factor'"):
        Watch.from_request(100, {"loss_factor": 2})
