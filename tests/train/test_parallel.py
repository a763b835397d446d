"""Which rank a process is, read from its environment; and what ranks add up."""

from __future__ import annotations

import multiprocessing
import socket

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.train.runs import ARCHS, STEP, chain
from zexp.blocks.resolve import resolve_model
from zexp.data.stream import Segment
from zexp.train import parallel
from zexp.train.batches import Batches
from zexp.train.fingerprint import fingerprint
from zexp.train.hosts import hostnames
from zexp.train.parallel import World


@pytest.mark.parametrize(
    ("nodelist", "names"),
    [
        ("login", ["login"]),
        ("node1,node3", ["node1", "node3"]),
        ("n[2-4,07]", ["n2", "n3", "n4", "n07"]),
        ("n[08-11].cluster,gpu-a[1-2]b[3,5]", ["n08.cluster", "n09.cluster", "n10.cluster", "n11.cluster"]
         + ["gpu-a1b3", "gpu-a1b5", "gpu-a2b3", "gpu-a2b5"]),
    ],
)  # fmt: skip
def test_a_list_of_nodes_is_read_as_slurm_writes_it(nodelist, names):
    assert hostnames(nodelist) == names


@pytest.mark.parametrize("nodelist", ["", "a,,b", "n[1-", "n[1-x]", "n]"])
def test_what_is_no_list_of_nodes_is_refused(nodelist):
    with pytest.raises(ValueError, match="is no list of nodes"):
        hostnames(nodelist)


SLURM = {
    "SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "1234567", "SLURM_STEP_ID": "0",
    "SLURM_JOB_NODELIST": "n[05-08]",
}  # fmt: skip
TORCHRUN = {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "MASTER_ADDR": "head", "MASTER_PORT": "29500"}


def test_without_variables_there_is_one_process():
    assert World.from_environment({}) == World(rank=0, size=1)
    # A shell within an allocation is no task of a job.
    assert World.from_environment({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_JOB_NODELIST": "n1"}).size == 1


def test_slurms_variables_are_read_and_all_tasks_of_a_step_meet_at_one_place():
    world = World.from_environment(SLURM)
    assert (world.rank, world.size, world.local_rank, world.address) == (3, 8, 1, "n05")
    assert parallel.LOWEST_PORT <= world.port < parallel.LOWEST_PORT + parallel.PORTS
    other = World.from_environment(SLURM | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"})
    assert (other.address, other.port) == (world.address, world.port)
    assert World.from_environment(SLURM | {"SLURM_STEP_ID": "1"}).port != world.port
    step = World.from_environment(SLURM | {"SLURM_STEP_NODELIST": "n[07-08]", "SLURM_STEP_NUM_TASKS": "4"})
    assert (step.address, step.size) == ("n07", 4)
    moved = World.from_environment(SLURM | {"MASTER_ADDR": "n05-ib", "MASTER_PORT": "4000"})
    assert (moved.address, moved.port) == ("n05-ib", 4000)


def test_torchruns_variables_come_first():
    world = World.from_environment(SLURM | TORCHRUN)
    assert world == World(rank=2, size=4, local_rank=0, address="head", port=29500)
    assert World.from_environment(TORCHRUN | {"TORCHELASTIC_USE_AGENT_STORE": "True"}).hosted


@pytest.mark.parametrize(
    ("environment", "missing"), [(TORCHRUN, "MASTER_PORT"), (SLURM, "SLURM_LOCALID"), (SLURM, "SLURM_JOB_NODELIST")]
)
def test_half_a_set_of_variables_is_an_error_and_not_another_layout(environment, missing):
    with pytest.raises(ValueError, match=missing.replace("JOB_NODE", "STEP_NODE")):
        World.from_environment({key: value for key, value in environment.items() if key != missing})


@pytest.mark.parametrize(
    ("seen", "local_rank", "device"), [(0, 1, "cpu"), (1, 3, "cuda:0"), (4, 3, "cuda:3"), (2, 3, "one each, please")]
)
def test_each_rank_of_a_machine_has_a_gpu_of_its_own(monkeypatch, seen, local_rank, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: seen > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
    world = World(rank=local_rank, size=4, local_rank=local_rank)
    assert world.device("cpu") == "cpu"
    if device.startswith("c"):
        assert world.device("auto") == device
    else:
        with pytest.raises(RuntimeError, match=device):
            world.device("auto")


def test_the_shares_of_the_ranks_are_the_batch(tiny_store, tiny_corpus):
    (segment,) = chain(tiny_corpus, 4).segments
    read = [Segment(segment.id, segment.semantic)]
    whole = Batches(tiny_store, read, "cpu").read(STEP, STEP)
    for count in (1, 2, 4):
        shares = [Batches(tiny_store, read, "cpu", rank, count).read(STEP, STEP) for rank in range(count)]
        assert torch.cat([share.labels_BT for share in shares]).equal(whole.labels_BT)
        assert torch.cat([share.documents_BT for share in shares]).equal(whole.documents_BT)
    with pytest.raises(ValueError, match="4 sequences cannot be shared evenly among 3 ranks"):
        Batches(tiny_store, read, "cpu", 0, 3).read(STEP, STEP)


def test_what_was_read_ahead_is_what_is_asked_for_or_is_forgotten(tiny_store, tiny_corpus, monkeypatch):
    (segment,) = chain(tiny_corpus, 4).segments
    batches = Batches(tiny_store, [Segment(segment.id, segment.semantic)], "cpu")
    wanted = {at: batches.read(at, STEP).labels_BT for at in (0, STEP, 2 * STEP)}
    batches.prepare(STEP, STEP)
    monkeypatch.setattr(Batches, "_row", None)  # nothing is read now
    assert batches.read(STEP, STEP).labels_BT.equal(wanted[STEP])
    monkeypatch.undo()
    batches.prepare(STEP, STEP)
    assert batches.read(2 * STEP, STEP).labels_BT.equal(wanted[2 * STEP]), "another step, as after an interruption"
    assert batches.read(STEP, 2 * STEP).labels_BT.equal(torch.cat([wanted[STEP], wanted[2 * STEP]]))


@pytest.mark.parametrize(
    ("data", "nodes", "layout"), [(1, 1, "one process"), (2, 1, "data 2"), (8, 2, "data 8, nodes 2")]
)
def test_the_fingerprint_names_the_layout(data, nodes, layout):
    request = {"threads": 1, "micro_batch": 1, "kernels": "auto", "deterministic": True}
    request["ranks"] = {"data": data, "nodes": nodes, "timeout_seconds": 60.0}
    assert fingerprint(resolve_model(ARCHS["transformer"], 300), request, "cpu")["layout"] == layout


class Three(nn.Module):
    """Rank 1 alone uses `some`, nobody `none`; `big` is larger than a bucket."""

    def __init__(self) -> None:
        super().__init__()
        self.all, self.some, self.none = (nn.Parameter(torch.zeros(3)) for _ in range(3))
        self.big = nn.Parameter(torch.zeros(4, 5))


def add_up(rank: int, port: int, found: multiprocessing.Queue) -> None:
    parallel.BUCKET_ELEMENTS = 16
    world, model = World(rank, 2, rank, "localhost", port), Three()
    with world.connected(world.store(30.0), "cpu", 30.0):
        model.all.grad = torch.full((3,), 1.0 + rank)
        model.big.grad = torch.arange(20.0).view(5, 4).t() * (1 + rank)  # not contiguous
        if rank == 1:
            model.some.grad = torch.full((3,), 5.0)
        figures = world.sum_gradients(model, torch.tensor([0.5, float(rank)]))
        counts = [torch.tensor([1, 2**40]), torch.tensor([rank])]
        world.sum_counts(counts)
        model.all.data += rank
        world.broadcast([model.all.data])
        grads = {name: None if p.grad is None else p.grad.tolist() for name, p in model.named_parameters()}
        found.put((figures.tolist(), grads, [count.tolist() for count in counts], model.all.tolist()))
        dist.barrier()


@pytest.mark.dist
def test_gradients_figures_and_counts_are_sums_and_what_no_rank_uses_has_none():
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    spawn = multiprocessing.get_context("spawn")
    found = spawn.Queue()
    processes = [spawn.Process(target=add_up, args=(rank, port, found)) for rank in range(2)]
    for process in processes:
        process.start()
    one, other = found.get(timeout=60), found.get(timeout=60)
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    assert one == other
    figures, grads, counts, broadcast = one
    assert figures == [1.0, 1.0]
    assert (grads["all"], grads["some"], grads["none"]) == ([3.0] * 3, [5.0] * 3, None)
    assert grads["big"] == (3 * torch.arange(20.0).view(5, 4).t()).tolist()
    assert (counts, broadcast) == ([[2, 2**41], [1]], [0.0] * 3)
