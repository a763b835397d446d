"""Imports point down the layers, and what must answer at once does not import torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "zexp"

# From the bottom up; a module may import from its own layer and from those before it.
LAYERS = [
    {"config"},
    {"kernels"},
    {"blocks"},
    {"store"},
    {"calc"},
    {"model", "data"},
    {"train"},
    {"evaluate"},
    {"study"},
    {"report", "bench"},
    {"arguments"},
    {"cli", "hydra_app", "verbs", "running", "starter", "finish", "store_verb", "show_store", "bench_verb"},
]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}

# Pure although their layer is not: read at plan time.
PURE = ["store", "calc", "config", "blocks.resolve", "train.phases", "train.schedule", "data.stream", "data.ledger",
        "data.recipe", "evaluate.plan", "model.hf.folder", "study.names", "study.plan", "study.execute", "study.compose", "study.jobs", "study.gc", "study.holdings", "study.share", "report", "verbs", "running", "store_verb", "show_store", "bench_verb", "bench.blocks", "bench.step", "bench.data", "bench.size", "bench.candidates", "bench.roofline", "cli", "hydra_app"]  # fmt: skip


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module] if node.module != "zexp" else [f"zexp.{alias.name}" for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("zexp.")}
    return found


def test_every_module_stands_in_a_layer():
    names = {p.stem if p.is_file() else p.name for p in PACKAGE.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert names - {"__init__"} <= set(RANK)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_arrows_point_down(path):
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    up = {
        name
        for name in imports(path)
        if name in RANK and RANK[name] > RANK.get(own, -1)
    }
    assert own == "__init__" or not up, f"{path} imports from above: {sorted(up)}"


@pytest.mark.parametrize("module", PURE)
def test_what_plans_does_not_import_torch(module):
    code = f"import sys, zexp.{module}; print([m for m in ('torch', 'lm_eval', 'datasets', 'submitit') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "[]\n"


def test_help_imports_neither_hydra_nor_torch():
    code = "import sys; from zexp.cli import main; main(['--help']); print([m for m in ('hydra', 'torch', 'rich') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert out.endswith("[]\n")
