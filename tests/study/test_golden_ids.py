"""The ids of real things, pinned: the shipped architectures, and every kind of stage over a fixed text.

A change here orphans stored results: raise the `numerics` of what changed, and say so in CHANGELOG. A key that is
added later is no reason: it declares its `absent` value (zexp.config.identity), and nothing below changes. Nor is a
new default in conf/: it makes another run and leaves the old ones' ids; write the old value into OVERRIDES.

Not pinned, as it differs between machines for a good reason: what reads the embedded sources (their ids hash the
Python files of the machine, so Python's, numpy's and scipy's), and lm-eval's own tasks (their ids hash lm-eval's
version). Of the one shipped task that only an embedded source serves, the recipe is pinned over a made-up corpus id.
"""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path

import pytest

from tests import composed
from zexp.evaluate import names
from zexp.evaluate.plan import SourceInfo, plan_tasks
from zexp.store.folder import Store
from zexp.store.ids import semantic_id, short
from zexp.study import plan as plans
from zexp.study.resolve import Composed, Resolver

# Architecture -> its resolved model block at a vocabulary of 4096, and the root segment that it is trained in, which
# hashes the numerics of its blocks and kernels as well.
MODELS = {
    "transformer_tiny": ("c3ed338c829328c9", "68b922ec7297c156"),
    "mamba2_tiny": ("e950ca4661553743", "93f477de2e4c42a5"),
    "zamba2_tiny": ("c85fa8148589601d", "c87f3bc1fd4691b8"),
    "blackmamba_tiny": ("d3064c07fcef5062", "67f28e07f22fed12"),
    "deltanet_tiny": ("c20460b517fcc9af", "8f0ea00bdc0ea975"),
    "jamba_tiny": ("8bad7fb05ec7941a", "4ef7828975ca7b33"),
    "kan_tiny": ("ef7d008874af3466", "1b162e3f38e49b9a"),
    "mamba_tiny": ("7e9f0a642947494d", "f35066451826a90f"),
    "moe_tiny": ("fd8e511064cd21fc", "355bbadf1670008d"),
    "parallel_tiny": ("afe52efa6adeb0fa", "c800b819722a3e35"),
    "retnet_tiny": ("da555f223f383f59", "a94ca659f0df2df6"),
    "rwkv7_tiny": ("382d9c568742e837", "fe7849addc4e4f37"),
    "shortconv_tiny": ("4ee88b2443525e27", "8ac9b6f83e18e3cc"),
    "swa_tiny": ("0f2906906cea825d", "b9d3ce2fcb47c8c1"),
    "xlstm_tiny": ("16cc9e41040fab9c", "b48680e12fd0f9fa"),
    "zamba_tiny": ("c793598d6a348ad3", "f98b708aafc5623f"),
}
STAGES = {
    "tokenizer": "330d72b1508d8bae",
    "corpus base": "aca64f97543ba4bb",
    "corpus high_quality": "0eb47fff86ac46a5",
    "packing base": "9522640bf1d2487c",
    "packing high_quality": "a13958337403ceda",
    "tasks bpb_base": "4c7b425b86a94a05",
    "tasks bpb_high_quality": "8febbd1980712df2",
    "tasks cloze": "4917a9b986c8d2c1",
    "tasks recall": "48f65ca31ba82c45",
    "segment pretrain 0-7168 both": "68b922ec7297c156",
    "segment pretrain 7168-8192 both": "caa2cd8dbc07ce6a",
    "segment anneal 8192-10240 replay60": "d6a5a3d4f00c95aa",
    "segment anneal 8192-10240 control": "bcf23cb2da86c8e4",
    "eval bpb_base 8192 both": "f8981a224e7fbc38",
    "eval bpb_base 10240 replay60": "c0528b642c771541",
    "eval bpb_high_quality 8192 both": "928bb0c2ed1f9f8c",
    "eval bpb_high_quality 10240 replay60": "a2ccc3d48d2f7efa",
    "eval cloze 8192 both": "1f5dcacd51ee67f0",
    "eval cloze 10240 replay60": "2fda28d28a579270",
    "eval recall 8192 both": "be6e71180e736632",
    "eval recall 10240 replay60": "b1d6330abce4c2d2",
    "eval bpb_base 10240 control": "531b1397beb38a45",
    "eval bpb_high_quality 10240 control": "626617f172f4cf98",
    "eval cloze 10240 control": "2f5d12d0b3f2f2e8",
    "eval recall 10240 control": "85b032595b82d74d",
}
DOCSTRING = "3964ef1eb18a40e3"  # the recipe of the documents of evals/docstring.yaml

TEXT = "".join(f"Paragraph {n} says that {n} and {n + 1} make {2 * n + 1}.\n\n" for n in range(400)).encode()
OVERRIDES = (
    "corpus.sources={base:{kind:text,view:null,files:a.txt,documents:paragraph},"
    "high_quality:{kind:text,view:null,files:b.txt,documents:paragraph}}",
    "corpus.tokenizer.vocab_size=4096", "seq_len=64", "phases.pretrain.tokens=8K", "phases.pretrain.batch_tokens=512",
    "schedule.peak_lr=3e-3", "schedule.warmup_tokens=1K", "anneal.tokens=2K", "anneal.warmup_tokens=512",
    "eval.tasks=[bpb,cloze,recall]",
    "mix.sources.base.max_epochs=null",
)  # fmt: skip


def plan(directory: Path, arch: str = "transformer_tiny") -> plans.Plan:
    """Of replay60 and control after one pretraining, over two files of fixed names and contents."""
    (directory / "a.txt").write_bytes(TEXT)
    (directory / "b.txt").write_bytes(TEXT.replace(b"says", b"holds"))
    variants = []
    for anneal in ("replay60", "control"):
        more = ["anneal.mix.sources.high_quality.max_epochs=null"] if anneal == "replay60" else []
        config = composed.config(f"arch={arch}", f"anneal={anneal}", *OVERRIDES, *more)
        variants.append(Composed(config, {"arch": arch, "anneal": anneal}, {"anneal": anneal}, []))
    store = Store(directory / "store")
    return plans.build(Resolver(store.root, directory).variants(variants), store)


def ids(plan: plans.Plan) -> dict[str, str]:
    """What a stage is -> its id; a segment or an eval of both variants stands without their names."""
    found = {}
    for stage in plan.stages.values():
        whose = stage.variants[0] if len(stage.variants) == 1 else "both"
        if stage.kind == "segment":
            name = f"segment {stage.phase} {stage.start}-{stage.to} {whose}"
        elif stage.kind == "eval":
            name = f"eval {stage.semantic['task']['name']} {stage.semantic['state']['tokens']} {whose}"
        elif stage.kind == "tokenizer":
            name = stage.kind
        else:
            name = stage.label
        assert name not in found
        found[name] = short(stage.full_id)
    return found


@pytest.mark.parametrize("arch", MODELS)
def test_the_shipped_architectures_have_the_ids_that_they_had(arch, tmp_path):
    roots = [s for s in plan(tmp_path, arch).stages.values() if s.kind == "segment" and s.semantic["parent"] is None]
    assert [(short(semantic_id(s.semantic["model"])), short(s.full_id)) for s in roots] == [MODELS[arch]]


def test_every_kind_of_stage_has_the_id_that_it_had(tmp_path):
    assert ids(plan(tmp_path)) == STAGES


def test_the_documents_that_need_an_embedded_source_have_the_id_that_they_had(tmp_path):
    eval = {"tasks": ["docstring"], "context_tokens": None, "limit": None, "batch_size": 16}
    sources = {"high_quality": SourceInfo({"kind": "embedded", "view": "high_quality"}, "c" * 64)}
    [planned] = plan_tasks(
        eval, sources=sources, tokenizer="a" * 64, seq_len=256, directory=tmp_path, cache=tmp_path / "cache"
    )
    assert planned.documents is not None
    assert short(semantic_id(planned.documents)) == DOCSTRING


def test_no_version_of_anything_enters_these_ids(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.0")
    monkeypatch.setattr(platform, "python_version", lambda: "0.0")
    monkeypatch.setattr(platform, "platform", lambda *args: "nowhere")
    monkeypatch.setattr(names, "lm_eval_version", lambda: "0.0")
    assert ids(plan(tmp_path)) == STAGES
