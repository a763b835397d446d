"""Finding GPUs and cores without torch."""

import sys

import pytest

from zexp.config.errors import ConfigError
from zexp.study.launch import machine

LISTING = """GPU 0: NVIDIA H200 (UUID: GPU-01234567-89ab-cdef-0123-456789abcdef)
GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-11111111-89ab-cdef-0123-456789abcdef)
  MIG 3g.20gb     Device  0: (UUID: MIG-aaaaaaaa-1111-5115-b30e-1a2a7a4e1d7f)
  MIG 3g.20gb     Device  1: (UUID: MIG-bbbbbbbb-1111-5115-b30e-1a2a7a4e1d7f)
"""


def test_a_divided_gpu_counts_as_its_instances():
    assert [uuid[:12] for uuid in machine.parse_gpus(LISTING)] == ["GPU-01234567", "MIG-aaaaaaaa", "MIG-bbbbbbbb"]


@pytest.mark.parametrize(
    ("preset", "expected"),
    [("0,2", ["0", "2"]), ("", []), ("-1", []), ("1,-1,2", ["1"]), ("GPU-1, MIG-2", ["GPU-1", "MIG-2"])],
)
def test_a_preset_is_read_as_cuda_reads_it(preset, expected):
    assert machine.gpus({"CUDA_VISIBLE_DEVICES": preset}) == expected


def test_cpu_slots_share_the_cores_by_threads(monkeypatch):
    monkeypatch.setattr(machine, "cores", lambda: 8)
    none = {"CUDA_VISIBLE_DEVICES": ""}
    assert machine.slots("auto", 3, environ=none) == ["", ""]
    assert machine.slots("auto", 16, environ=none) == [""]
    assert machine.slots("cuda", 1, environ=none) == []
    assert machine.slots("auto", 1, environ={"CUDA_VISIBLE_DEVICES": "0,1"}) == ["0", "1"]
    assert machine.slots("cpu", 4, environ={"CUDA_VISIBLE_DEVICES": "0,1"}) == ["", ""]
    assert machine.slots("cpu", 2, 2, none) == ["", ""]


def test_a_slot_of_several_ranks_has_a_gpu_for_each():
    three = {"CUDA_VISIBLE_DEVICES": "0,1,2"}
    assert machine.slots("auto", 1, 2, three) == ["0,1"]
    assert machine.slots("cuda", 1, 3, three) == ["0,1,2"]
    assert machine.slots("cuda", 1, 2, {"CUDA_VISIBLE_DEVICES": ""}) == []
    with pytest.raises(ConfigError, match=r"parallelism.data = 4: .* this machine shows 3.\n  Set parallelism.data to 3"):
        machine.slots("auto", 1, 4, three)


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
