from pathlib import Path

import pytest

from tests.report.synthetic import Study, make
from zexp.store.folder import Store


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Two architectures, two arms, one seed; everything done."""
    return make(Study(tmp_path_factory.mktemp("finished") / "store", archs=("transformer_tiny", "zamba2_tiny")))


@pytest.fixture(scope="session")
def seeded(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """One architecture, two arms, three seeds that fork from one pretraining."""
    root: Path = tmp_path_factory.mktemp("seeded") / "store"
    return make(Study(root, archs=("zamba2_tiny",), seeds=(0, 1, 2), vary_pretraining=False))
