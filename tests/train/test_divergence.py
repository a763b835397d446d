import math

from zexp.train.divergence import Watch

HIGH = math.log(100) + 2.1


def test_a_loss_that_is_not_a_number_diverges_at_once():
    assert "loss is nan" in Watch(100, 2.0, 20).see(math.nan, 1.0)
    assert "norm is inf" in Watch(100, 2.0, 20).see(3.0, math.inf)


def test_a_spike_that_recovers_is_no_divergence():
    watch = Watch(100, 2.0, 3)
    assert [watch.see(loss, 1.0) for loss in (HIGH, HIGH, 4.0, HIGH, HIGH)] == [None] * 5


def test_a_loss_that_stays_above_the_uniform_guess_diverges():
    watch = Watch(100, 2.0, 3)
    assert [watch.see(HIGH, 1.0) is None for _ in range(3)] == [True, True, False]


def test_the_count_goes_on_after_an_interruption():
    assert Watch(100, 2.0, 3, above=2).see(HIGH, 1.0) is not None
