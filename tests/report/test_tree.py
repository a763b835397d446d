from zexp.report.tree import NARROWEST, Mark, Trajectory, assign_lanes, draw


def trajectory(id, start, end, parent=None, users=("v",)):
    marks = [Mark(end, "done", f"{id}@{end}")]
    return Trajectory(id, f"trajectory/{id}", id, start, end, parent, list(users), list(users), "done", marks)


def test_two_forks_at_the_end_lie_around_their_parent():
    tree = [trajectory("p", 0, 10), trajectory("a", 10, 12, "p"), trajectory("b", 10, 12, "p")]
    assert assign_lanes(tree) == 2
    assert [t.lane for t in tree] == [0.5, 0, 1]


def test_a_trunk_that_goes_on_past_a_fork_keeps_a_lane_of_its_own():
    trunk, early, late = trajectory("t", 0, 20), trajectory("d", 9, 10, "t"), trajectory("e", 18, 20, "t")
    assert assign_lanes([trunk, early, late]) == 3
    assert len({t.lane for t in (trunk, early, late)}) == 3


def test_an_only_child_goes_on_in_its_parents_lane():
    tree = [trajectory("t", 0, 9), trajectory("d", 9, 10, "t"), trajectory("other", 0, 10)]
    assert assign_lanes(tree) == 2
    assert tree[0].lane == tree[1].lane == 0
    assert tree[2].lane == 1


def test_no_stretch_is_too_short_to_be_seen_and_the_page_is_told():
    drawing = draw([trajectory("p", 0, 1_000_000), trajectory("a", 1_000_000, 1_000_100, "p")])
    assert drawing.x[1_000_100] - drawing.x[1_000_000] == NARROWEST
    assert drawing.stretched
    assert not draw([trajectory("p", 0, 100), trajectory("a", 100, 200, "p")]).stretched


def test_a_study_without_segments_draws_nothing():
    assert draw([]).lanes == 0
