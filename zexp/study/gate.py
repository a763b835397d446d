"""Whether the mixes of a study can be served, asked again when the corpora are built.

Some supplies are known only then. Where no process stays that could ask (jobs of a cluster), each training asks before it
begins, out of what stands here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zexp.config.errors import Problems
from zexp.data import ledger
from zexp.store.files import read_json
from zexp.store.folder import Store
from zexp.study.plan import Plan, bins_known


def questions(plan: Plan, store: Store) -> dict[str, Any]:
    """What is still open, as JSON: {segments: {id: semantic}, variants: [{chain, tokens, supplies}]}; no variants if all
    supplies are known exactly, and so have been checked."""
    segments: dict[str, Any] = {}
    asked: list[dict[str, Any]] = []
    for variant in plan.variants:
        supplies = bins_known(plan, variant, store)
        if all(supply.exact for supply in supplies.values()):
            continue
        segments |= {segment.id: segment.semantic for segment in variant.chain.segments}
        asked.append(
            {
                "chain": [segment.id for segment in variant.chain.segments],
                "tokens": variant.chain.tokens,
                "supplies": {id: {"name": one.name, "max_epochs": one.max_epochs} for id, one in supplies.items()},
            }
        )
    unique = {repr(one): one for one in asked}
    return {"segments": segments, "variants": list(unique.values())}


def problems(asked: Mapping[str, Any], store: Store) -> list[str]:
    """What runs out, of the variants whose packings are built. (A packing that failed takes its own variants along.)"""
    found = Problems()
    for one in asked["variants"]:
        folders = {id: store.folder("packing", id) for id in one["supplies"]}
        if any(folder.result is None for folder in folders.values()):
            continue
        supplies = {
            id: ledger.Supply(said["name"], read_json(folders[id].required() / "manifest.json")["bins"], True, said["max_epochs"])
            for id, said in one["supplies"].items()
        }
        chain = [(id, asked["segments"][id]) for id in one["chain"]]
        found.extend(ledger.Ledger.of(chain, one["tokens"], supplies).problems())
    return found.texts
