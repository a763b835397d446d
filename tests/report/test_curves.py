import pytest

from zexp.report.curves import lr_points, merge, thin


def test_a_later_attempt_replaces_what_it_trained_again():
    first = [(10, 5.0), (20, 4.0), (30, 3.0)]
    assert merge([first, [(15, 4.4), (25, 3.4), (35, 2.9)]]) == [(10, 5.0), (15, 4.4), (25, 3.4), (35, 2.9)]


def test_an_attempt_that_replays_the_middle_leaves_the_end():
    first = [(10, 5.0), (20, 4.0), (30, 3.0)]
    assert merge([first, [], [(15, 4.5), (20, 4.1)]]) == [(10, 5.0), (15, 4.5), (20, 4.1), (30, 3.0)]


def test_a_thinned_curve_says_how_many_points_one_stands_for():
    points, size = thin([(i, float(i)) for i in range(1, 11)], 5)
    assert size == 2
    assert points == [(2, 1.5), (4, 3.5), (6, 5.5), (8, 7.5), (10, 9.5)]


def test_a_loss_that_is_not_finite_stays_visible():
    points, _ = thin([(1, 1.0), (2, None), (3, 1.0), (4, 1.0)], 2)
    assert points == [(2, None), (4, 1.0)]


def test_the_schedule_is_drawn_by_its_corners_and_an_open_piece_up_to_the_end():
    pieces = [
        {"from": 0, "to": 10, "shape": "linear", "start": 0.0, "end": 0.1},
        {"from": 10, "to": None, "shape": "constant", "start": 0.1, "end": 0.1},
    ]
    assert lr_points(pieces, 50) == [(0, 0.0), (10, 0.1), (10, 0.1), (50, 0.1)]
    assert lr_points(pieces, 5) == [(0, 0.0), (5, 0.05)]


def test_a_cosine_is_sampled():
    points = lr_points([{"from": 0, "to": 100, "shape": "cosine", "start": 1.0, "end": 0.0}], 100)
    assert len(points) > 20
    assert dict(points)[50] == pytest.approx(0.5, abs=1e-6)
