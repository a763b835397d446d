"""What launch() refuses."""

from __future__ import annotations

import pytest

from zexp.config.errors import ConfigError
from zexp.store.folder import Store
from zexp.study.launch import LauncherOptions, launch


def test_every_wrong_option_is_named():
    with pytest.raises(ConfigError) as caught:
        LauncherOptions(slots=0, grace_seconds=-1, retries=-1, backend="cloud", start_method="thread").check()
    assert len(caught.value.problems) == 5


@pytest.mark.parametrize("slots", ["two", True, 1.5])
def test_slots_of_a_wrong_type_are_refused(slots):
    with pytest.raises(ConfigError, match=r"hydra\.launcher\.slots"):
        LauncherOptions(slots=slots).check()


def test_no_stages_are_no_work(tmp_path):
    assert launch([], Store(tmp_path), LauncherOptions()) == {}
