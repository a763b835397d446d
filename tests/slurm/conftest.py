"""One cluster for all tests of this folder."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import NODES, Cluster

pytestmark = pytest.mark.slurm


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents and "cluster" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slurm)


@pytest.fixture(scope="session")
def running_cluster() -> Iterator[Cluster]:
    with tempfile.TemporaryDirectory(prefix="zexp-slurm-", dir="/tmp") as folder:  # sockets lie in it: a short path
        cluster = Cluster(Path(folder))
        before = os.environ.get("SLURM_CONF")
        try:
            cluster.up()
            os.environ |= cluster.environment
            yield cluster
        finally:
            cluster.down()
            os.environ.pop("SLURM_CONF", None)
            if before is not None:
                os.environ["SLURM_CONF"] = before


@pytest.fixture
def cluster(running_cluster: Cluster) -> Iterator[Cluster]:
    """The cluster, whole and empty before and after each test."""
    yield running_cluster
    if "slurmctld" not in running_cluster.daemons:
        running_cluster.start_controller()
    if "slurmdbd" not in running_cluster.daemons:
        running_cluster.start_accounting()
    running_cluster.ask("scancel", "-u", "root")
    running_cluster.kill_jobs()
    for name in NODES:
        if f"slurmd.{name}" not in running_cluster.daemons:
            running_cluster.start_node(name)
