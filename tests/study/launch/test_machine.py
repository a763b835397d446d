"""Finding GPUs and cores without torch."""

import os
import sys

import pytest

from zexp.config.errors import ConfigError
from zexp.study.launch import LocalOptions, machine
from zexp.study.launch.base import Size
from zexp.study.launch.capacity import capacity

UUIDS = ["GPU-01234567-89ab-cdef-0123-456789abcdef", "GPU-11111111-89ab-cdef-0123-456789abcdef"]
MIGS = ["MIG-aaaaaaaa-1111-5115-b30e-1a2a7a4e1d7f", "MIG-bbbbbbbb-1111-5115-b30e-1a2a7a4e1d7f"]
LISTING = f"""GPU 0: NVIDIA H200 (UUID: {UUIDS[0]})
GPU 1: NVIDIA A100-SXM4-40GB (UUID: {UUIDS[1]})
  MIG 3g.20gb     Device  0: (UUID: {MIGS[0]})
  MIG 3g.20gb     Device  1: (UUID: {MIGS[1]})
"""
TWINS = f"GPU 0: NVIDIA H200 (UUID: {UUIDS[0]})\nGPU 1: NVIDIA H200 (UUID: {UUIDS[1]})\n"


def test_a_divided_gpu_counts_as_its_instances():
    assert [uuid for _, uuid in machine.parse_gpus(LISTING)] == [UUIDS[0], *MIGS]


@pytest.mark.parametrize(
    ("preset", "expected"),
    [("0,2", ["0", "2"]), ("", []), ("-1", []), ("1,-1,2", ["1"]), ("GPU-1, MIG-2", ["GPU-1", "MIG-2"])],
)
def test_a_preset_is_read_as_cuda_reads_it(preset, expected):
    assert machine.gpus({"CUDA_VISIBLE_DEVICES": preset}) == expected


def test_a_gpu_has_one_name_whoever_made_it_visible(monkeypatch):
    monkeypatch.setattr(machine, "_listing", lambda: TWINS)
    assert machine.gpu_names(["1", "0"], {}) == [UUIDS[1], UUIDS[0]]
    assert machine.gpu_names(["GPU-1111"], {}) == [UUIDS[1]]
    assert machine.gpu_names(UUIDS, {}) == UUIDS


def test_an_index_stays_one_where_cuda_may_count_otherwise_than_nvidia_smi(monkeypatch):
    monkeypatch.setattr(machine, "_listing", lambda: LISTING)
    assert machine.gpu_names(["0"], {}) == ["GPU-number-0"]
    assert machine.gpu_names(["0"], {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}) == [UUIDS[0]]
    assert machine.gpu_names([MIGS[1]], {}) == [MIGS[1]]
    monkeypatch.setattr(machine, "_listing", lambda: "")
    assert machine.gpu_names(["3", "GPU-11"], {}) == ["GPU-number-3", "GPU-11"]


def test_the_cores_are_those_of_the_affinity_within_the_quota(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {9, 4, 5, 8}, raising=False)
    monkeypatch.setattr(machine, "_quota", lambda: float("inf"))
    assert machine.core_numbers() == [4, 5, 8, 9]
    monkeypatch.setattr(machine, "_quota", lambda: 2.5)
    assert machine.core_numbers() == [4, 5]
    monkeypatch.setattr(machine, "_quota", lambda: 0.5)
    assert machine.core_numbers() == [4]


# What stages may use


def of(monkeypatch, preset, *devices, **options):
    monkeypatch.setattr(machine, "core_numbers", lambda: list(range(8)))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", preset)
    requests = [{} if device is None else {"device": device} for device in devices]
    return capacity(requests, LocalOptions(**options))


def test_stages_on_cores_take_one_for_each_thread(monkeypatch):
    found = of(monkeypatch, "", "auto")
    assert [(found.need(Size(n)), found.slots(Size(n))) for n in (1, 3, 16)] == [(1, 8), (3, 2), (8, 1)]
    assert found.devices(found.units[:3]) == ""
    assert of(monkeypatch, "0,1", "cpu").units == found.units
    assert of(monkeypatch, "0,1", None).units == found.units, "data needs no GPU"


@pytest.mark.parametrize(
    ("options", "slots", "first"),
    [({}, 4, "3"), ({"gpus_per_stage": 2}, 2, "3,1"), ({"gpus_per_stage": 3}, 1, "3,1,0"), ({"stages_per_gpu": 2}, 8, "3")],
)
def test_gpus_of_a_preset_make_slots(monkeypatch, options, slots, first):
    found = of(monkeypatch, "3,1,0,2", "auto", **options)
    assert found.slots(Size(5)) == slots
    assert found.devices(found.units[: found.need(Size(5))]) == first


def test_a_stage_of_several_ranks_has_a_gpu_or_cores_for_each(monkeypatch):
    found = of(monkeypatch, "0,1,2", "auto")
    assert (found.need(Size(1, 2)), found.slots(Size(1, 2)), found.slots(Size(1, 3))) == (2, 1, 1)
    assert of(monkeypatch, "", "auto").need(Size(2, 3)) == 6
    wide = [{"device": "auto", "ranks": {"data": 4}}]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    with pytest.raises(ConfigError, match=r"parallelism.data = 4: .* this machine shows 3.\n  Set parallelism.data to 3"):
        capacity(wide, LocalOptions())


def test_stages_that_share_gpus_are_spread_over_them_first(monkeypatch):
    found = of(monkeypatch, "0,1", "cuda", stages_per_gpu=2)
    assert [found.devices([unit]) for unit in found.units] == ["0", "1", "0", "1"]


@pytest.mark.parametrize(
    ("preset", "device", "options", "said"),
    [
        ("", "cuda", {}, "execution.device = cuda, but this machine shows no GPU"),
        ("0,1", "auto", {"gpus_per_stage": 3}, "gpus_per_stage = 3, but this machine shows 2 GPUs"),
        ("", "auto", {"gpus_per_stage": 2}, "gpus_per_stage = 2, but this machine shows no GPU"),
        ("0,1", "cpu", {"gpus_per_stage": 2}, "gpus_per_stage = 2, but execution.device = cpu"),
    ],
)
def test_gpus_that_are_not_there_are_refused(monkeypatch, preset, device, options, said):
    with pytest.raises(ConfigError, match=said):
        of(monkeypatch, preset, device, None, **options)


def test_fused_kernels_want_a_gpu_before_anything_starts(monkeypatch):
    stages = [{"device": "auto", "kernels": "fused"}]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(ConfigError, match=r"kernels = fused: .* this machine shows no GPU"):
        capacity(stages, LocalOptions())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert capacity(stages, LocalOptions()).gpus == 1


def test_data_stages_ask_for_no_gpus(monkeypatch):
    assert of(monkeypatch, "", None, gpus_per_stage=2).gpus is None


QUERY = """GPU-aaaa, 0, NVIDIA H100 80GB HBM3, 81559
GPU-bbbb, 1, NVIDIA A100-SXM4-40GB, 40960
GPU-cccc, 2, NVIDIA GB10, [N/A]
"""


@pytest.mark.parametrize(
    ("visible", "names"),
    [
        (["GPU-bbbb", "GPU-aaaa"], ["NVIDIA A100-SXM4-40GB", "NVIDIA H100 80GB HBM3"]),
        (["0"], ["NVIDIA H100 80GB HBM3"]),
        (["0", "2"], []),
        (["GPU-dddd"], []),
    ],
)
def test_what_the_visible_gpus_are_is_known_of_all_or_of_none(visible, names):
    assert [gpu.name for gpu in machine.parse_gpu_models(QUERY, visible)] == names


def test_gpu_memory_is_in_bytes():
    assert machine.parse_gpu_models(QUERY, ["1"])[0].memory == 40 * 2**30


def test_mig_instances_are_no_known_model():
    assert machine.gpu_models({"CUDA_VISIBLE_DEVICES": "MIG-aaaa"}) == []
    assert machine.gpu_models({"CUDA_VISIBLE_DEVICES": ""}) == []


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel says it in /proc")
def test_available_memory_is_part_of_all_memory():
    found = machine.memory()
    assert found is not None and 0 < found.available <= found.total
