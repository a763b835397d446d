"""The variants of a multirun as Hydra's jobs: their callbacks and what they return.

Hydra runs its jobs one after the other; the variants of a study are trained together, as one tree. So every job starts
before the first stage does, and ends after the last one, both in the order of the overrides.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobRuntime, JobStatus, env_override
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from zexp.study.compose import Composition


class VariantReturn(JobReturn):
    """A JobReturn with all that Hydra fills in. cfg and hydra_cfg are made when they are first read: most runs read none."""

    def __init__(self, job: Composition, status: JobStatus, value: Any) -> None:
        self._job = job
        super().__init__(
            overrides=[str(one.input_line) for one in job.task_overrides],
            working_dir=os.getcwd(),
            task_name=JobRuntime.instance().get("name"),
            status=status,
            _return_value=value,
        )
        del self.__dict__["cfg"], self.__dict__["hydra_cfg"]  # the None that JobReturn puts there

    @cached_property
    def cfg(self) -> DictConfig:  # type: ignore[override]
        return copy.deepcopy(self._job.composed.config)

    @cached_property
    def hydra_cfg(self) -> DictConfig:  # type: ignore[override]
        with _current(self._job):
            made = copy.deepcopy(HydraConfig.instance().cfg)
        assert isinstance(made, DictConfig)
        return made


class Jobs:
    """The jobs of one call of a launcher, and whom Hydra wants to be told of them."""

    def __init__(self, jobs: Sequence[Composition], context: HydraContext, task_function: TaskFunction) -> None:
        self._jobs = jobs
        self._callbacks = context.callbacks
        self._task_function = task_function

    def start(self) -> None:
        """Call on_job_start of Hydra's callbacks for each job."""
        for job in self._jobs if self._callbacks.callbacks else ():
            with _current(job) as config:
                Path(config.hydra.runtime.output_dir).mkdir(parents=True, exist_ok=True)
                self._callbacks.on_job_start(config=config, task_function=self._task_function)

    def end(self, returns: Sequence[JobReturn]) -> list[JobReturn]:
        """Call on_job_end for each job; what the jobs return, filled in. returns: status and value of each, in order."""
        filled: list[JobReturn] = [
            VariantReturn(job, one.status, one._return_value) for job, one in zip(self._jobs, returns, strict=True)
        ]
        for job, made in zip(self._jobs, filled, strict=True) if self._callbacks.callbacks else ():
            with _current(job) as config:
                self._callbacks.on_job_end(config=config, job_return=made)
        return filled


@contextmanager
def _current(job: Composition) -> Iterator[DictConfig]:
    """The job's whole config, with HydraConfig and the environment set to it as in Hydra's run_job."""
    config = job.whole()
    before = HydraConfig.instance().cfg
    try:
        HydraConfig.instance().set_config(config)
        output = os.path.join(str(config.hydra.sweep.dir), str(config.hydra.sweep.subdir))
        with read_write(config.hydra.runtime), open_dict(config.hydra.runtime):
            config.hydra.runtime.output_dir = os.path.abspath(output)
        HydraConfig.instance().set_config(config)
        with env_override(OmegaConf.to_container(config.hydra.job.env_set, resolve=True)):  # type: ignore[arg-type]
            yield config
    finally:
        HydraConfig.instance().cfg = before
