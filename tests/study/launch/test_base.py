"""What launch() and its options refuse."""

from __future__ import annotations

import pytest

from zexp.config.errors import ConfigError
from zexp.store.folder import Store
from zexp.study.launch import LocalOptions, launch, options_of


def test_every_wrong_option_is_named():
    with pytest.raises(ConfigError) as caught:
        options_of(
            {"backend": "local", "slots": 0, "grace_seconds": -1, "retries": -1, "max_failures": 0, "start_method": "thread"}
        )
    assert len(caught.value.problems) == 5


def test_an_unknown_launcher_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match="There are: local, slurm"):
        options_of({"backend": "cloud"})


def test_unknown_keys_are_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"hydra\.launcher\.slot: there is no such option.*slots"):
        options_of({"backend": "local", "slot": 3})


@pytest.mark.parametrize("slots", ["two", True, 1.5])
def test_slots_of_a_wrong_type_are_refused(slots):
    with pytest.raises(ConfigError, match=r"hydra\.launcher\.slots"):
        LocalOptions(slots=slots).check()


def test_no_stages_are_no_work(tmp_path):
    assert launch([], Store(tmp_path), LocalOptions()) == {}


def test_several_gpus_a_stage_and_several_stages_a_gpu_exclude_each_other():
    with pytest.raises(ConfigError, match="Leave one of the two at 1"):
        LocalOptions(gpus_per_stage=2, stages_per_gpu=2).check()


@pytest.mark.parametrize("key", ["gpus_per_stage", "stages_per_gpu"])
@pytest.mark.parametrize("value", [0, True, "all"])
def test_numbers_of_gpus_and_stages_are_whole(key, value):
    with pytest.raises(ConfigError, match=rf"hydra\.launcher\.{key} = .*from 1 on"):
        LocalOptions(**{key: value}).check()
