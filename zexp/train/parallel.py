"""The processes that train one segment together, and what they add up.

Plain data parallelism. A *rank* holds the whole model and optimizer, reads its contiguous share of every global batch,
and divides its loss by the labels of the *whole* batch; gradients are then sums over ranks, in fp32, and every rank
clips and updates alike. So layouts differ in the order of a sum, as cuts into micro-batches do, and in nothing else.
One process is a world of size 1, where every operation here does nothing.

Gloo on CPUs, NCCL on GPUs. Gradients travel when the backward pass is over (no overlap), in pieces of 32 MB; what a
step has to agree on besides (its loss, who was told to stop, which parameters have gradients) travels with the first.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from zexp.train.hosts import hostnames

BUCKET_ELEMENTS = 8 * 2**20  # fp32: 32 MB of gradients in one all_reduce
LOWEST_PORT, PORTS = 15_000, 15_000  # below those that systems hand out by themselves


class RanksApart(RuntimeError):
    """A collective did not come about: some rank is dead, late, or somewhere else in the program."""


@dataclass(frozen=True)
class World:
    """Which of how many ranks this process is.

    local_rank: among those of its machine. address, port: where rank 0 is met. hosted: somebody else (torchrun's agent)
    serves that port already.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    address: str = "localhost"
    port: int = 0
    hosted: bool = False

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> World:
        """The rank that torchrun's variables or else SLURM's say (zexp/study/ranks.py lists them); one process without.

        Raises ValueError for a set of variables that is not whole.
        """
        if "RANK" in environ and "WORLD_SIZE" in environ:
            missing = [name for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in environ]
            if missing:
                raise ValueError(f"RANK and WORLD_SIZE are set, but not {', '.join(missing)}. torchrun sets all.")
            return cls(
                rank=int(environ["RANK"]),
                size=int(environ["WORLD_SIZE"]),
                local_rank=int(environ["LOCAL_RANK"]),
                address=environ["MASTER_ADDR"],
                port=int(environ["MASTER_PORT"]),
                hosted=environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
            )
        tasks = environ.get("SLURM_STEP_NUM_TASKS", environ.get("SLURM_NTASKS"))
        if "SLURM_PROCID" not in environ or tasks is None:
            return cls()
        nodes = next((environ[name] for name in _NODELISTS if name in environ), None)
        missing = [name for name in ("SLURM_LOCALID", "SLURM_JOB_ID") if name not in environ]
        missing += ["SLURM_STEP_NODELIST"] if nodes is None else []
        if missing:
            raise ValueError(f"SLURM_PROCID is set, but not {', '.join(missing)}. srun sets all of them.")
        assert nodes is not None
        return cls(
            rank=int(environ["SLURM_PROCID"]),
            size=int(tasks),
            local_rank=int(environ["SLURM_LOCALID"]),
            address=environ.get("MASTER_ADDR") or hostnames(nodes)[0],
            port=int(environ.get("MASTER_PORT") or _port(environ["SLURM_JOB_ID"], environ.get("SLURM_STEP_ID", "0"))),
        )

    def device(self, wanted: str) -> str:
        """The device of this rank for execution.device: cpu, or its own GPU. Raises RuntimeError if it has none."""
        if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
            return "cpu"
        if not torch.cuda.is_available():
            raise RuntimeError("device=cuda, but torch sees no GPU here. Use device=cpu or device=auto.")
        seen = torch.cuda.device_count()
        if self.size == 1:
            return "cuda"
        if seen > 1 and self.local_rank >= seen:
            raise RuntimeError(f"Rank {self.local_rank} of this machine finds {seen} GPUs here: one each, please.")
        return f"cuda:{self.local_rank if seen > 1 else 0}"

    def store(self, seconds: float) -> dist.TCPStore:
        """The key-value store that rank 0 serves. Raises RuntimeError if it cannot, or is not met in that time."""
        try:
            return dist.TCPStore(
                self.address,
                self.port,
                is_master=self.rank == 0 and not self.hosted,
                wait_for_workers=False,
                timeout=timedelta(seconds=seconds),
            )
        except RuntimeError as error:
            if self.rank == 0 and not self.hosted:
                text = f"Rank 0 cannot listen on port {self.port}: {error}\n  Free it, or name another by MASTER_PORT."
            else:
                text = f"Rank {self.rank} did not meet rank 0 at {self.address}:{self.port} in {seconds:g} s: {error}"
            raise RuntimeError(text) from error

    @contextmanager
    def connected(self, store: dist.Store, device: str, seconds: float) -> Iterator[None]:
        """The process group, for as long as the training lasts. seconds: how long a collective waits for a rank."""
        if self.size == 1:
            yield
            return
        cuda = torch.device(device) if device != "cpu" else None
        if cuda is not None:
            torch.cuda.set_device(cuda)
        with _together():
            dist.init_process_group(
                "nccl" if cuda is not None else "gloo",
                store=store,
                rank=self.rank,
                world_size=self.size,
                timeout=timedelta(seconds=seconds),
                device_id=cuda,
            )
        try:
            yield
        finally:
            dist.destroy_process_group()

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Rank 0's values into the tensors of all, in place."""
        if self.size > 1:
            with _together():
                for tensor in tensors:
                    dist.broadcast(tensor, src=0)

    def sum_gradients(self, model: nn.Module, figures: Tensor) -> Tensor:
        """The model's gradients become their sums over ranks; the sum of `figures` (fp32, one dimension).

        A parameter has a gradient afterwards if it had one on some rank: without, the optimizer leaves it alone.
        """
        if self.size == 1:
            return figures
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        used = torch.tensor([float(p.grad is not None) for p in parameters], device=figures.device)
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        said = torch.cat([figures, used])
        for bucket in _buckets([said, *gradients]):
            self._sum(bucket)
        used_somewhere = said[len(figures) :].tolist()
        for parameter, gradient, uses in zip(parameters, gradients, used_somewhere, strict=True):
            parameter.grad = gradient if uses else None
        return said[: len(figures)]

    def sum_counts(self, counts: Sequence[Tensor]) -> None:
        """Integers become their sums over ranks, in place."""
        if self.size > 1 and counts:
            self._sum(counts)

    def agree(self, figures: Tensor) -> Tensor:
        """The sum over ranks."""
        if self.size > 1:
            self._sum([figures])
        return figures

    def check_same(self, tensors: Mapping[str, Tensor]) -> None:
        """Raises RuntimeError if some rank has other bits than another, naming the first such tensor.

        It compares the sums of each tensor's bits, read as 32-bit integers.
        """
        if self.size == 1:
            return
        sums = torch.stack([tensor.detach().contiguous().view(torch.int32).sum() for tensor in tensors.values()])
        most, least = sums.clone(), sums.clone()
        with _together():
            dist.all_reduce(most, op=dist.ReduceOp.MAX)
            dist.all_reduce(least, op=dist.ReduceOp.MIN)
        if differing := [name for name, equal in zip(tensors, (most == least).tolist(), strict=True) if not equal]:
            raise RuntimeError(
                f"The ranks have drifted apart: {len(differing)} of {len(tensors)} tensors differ, the first is "
                f"{differing[0]}. No state was written. A device that computes wrongly can do this; run again on other nodes."
            )

    def _sum(self, tensors: Sequence[Tensor]) -> None:
        """Each tensor becomes its sum over ranks, in place; all in one collective."""
        whole = len(tensors) == 1 and tensors[0].is_contiguous()
        flat = tensors[0].view(-1) if whole else torch.cat([tensor.reshape(-1) for tensor in tensors])
        with _together():
            dist.all_reduce(flat)
        if not whole:
            parts = flat.split([tensor.numel() for tensor in tensors])
            for tensor, part in zip(tensors, parts, strict=True):
                tensor.copy_(part.view_as(tensor))


_NODELISTS = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")


def _port(job: str, step: str) -> int:
    """Equal for all tasks of a job's step, and mostly another for those that share a node."""
    return LOWEST_PORT + (int(job) + 977 * int(step)) % PORTS


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours of together at most BUCKET_ELEMENTS; a larger one by itself."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and size + tensor.numel() > BUCKET_ELEMENTS:
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.numel()
    if bucket:
        yield bucket


@contextmanager
def _together() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # what torch raises for a broken connection and for one that is late
        raise RanksApart(str(error)) from error
