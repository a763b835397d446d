"""What a study leaves by its name: study.yaml, variants.json, earlier revisions. Names live here and nowhere else."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from zexp.store import files
from zexp.store.folder import Store
from zexp.study.plan import Plan, bins_known, ledger_of
from zexp.study.resolve import Variant
from zexp.study.variants import row_of
from zexp.train.phases import PhaseSpan

VARIANTS = "variants.json"


@dataclass(frozen=True)
class Change:
    """How a study differs from what was recorded under its name. revision counts from 1."""

    revision: int
    added: list[str]
    dropped: list[str]
    altered: list[str]

    @property
    def none(self) -> bool:
        """The study is as it was recorded before."""
        return not (self.added or self.dropped or self.altered)

    def line(self, name: str) -> str | None:
        """One sentence, or None for a new or unchanged study."""
        parts = [
            f"{len(names)} {word} ({', '.join(names[:3])}{' …' if len(names) > 3 else ''})"
            for word, names in (("added", self.added), ("dropped", self.dropped), ("altered", self.altered))
            if names
        ]
        if self.revision == 1 or not parts:
            return None
        return f"{name} is now at revision {self.revision}: {'; '.join(parts)}. The earlier one is kept in revisions/."


def record(name: str, study: dict[str, Any], plan: Plan, store: Store, *, grown: bool = False) -> Change:
    """Write the study's files. A changed study of the same name becomes its current revision; the old one is kept.

    grown: the same sweep wrote them before, with fewer points; that is no revision.
    """
    folder = store.study(name)
    variants = _variants(plan, store)
    pretrained = _pretrained(plan, variants)
    ends = {v["name"]: v["segments"][-1] for v in variants}
    revision, added, dropped, altered = 1, list(ends), [], []
    if (folder / VARIANTS).is_file():
        old = files.read_json(folder / VARIANTS)
        before = {v["name"]: v["segments"][-1] for v in old["variants"]}
        revision = old["study"]["revision"]
        added = [n for n in ends if n not in before]
        dropped = [n for n in before if n not in ends]
        altered = [n for n in ends if n in before and before[n] != ends[n]]
        if grown:
            added, dropped, altered = [], [], []
        if added or dropped or altered:
            (folder / "revisions" / str(revision)).mkdir(parents=True, exist_ok=True)
            for file in (VARIANTS, "study.yaml"):
                text = (folder / file).read_text(encoding="utf-8")
                files.write_atomic(folder / "revisions" / str(revision) / file, text)
            revision += 1
    said = {**study, "name": name, "revision": revision}
    folder.mkdir(parents=True, exist_ok=True)
    files.write_yaml(folder / "study.yaml", said)
    files.write_json(
        folder / VARIANTS,
        {
            "study": said,
            "tokens": plan.tokens(),
            "train_flops": plan.train_flops(),
            "stages": [stage.to_json() for stage in plan.stages.values()],
            "variants": variants,
            "pretrained": pretrained,
        },
    )
    return Change(revision, added, dropped, altered)


def _variants(plan: Plan, store: Store) -> list[dict[str, Any]]:
    return [
        {
            **_row(variant, variant.chain.phases[-1]),
            "name": variant.name,
            "row": variant.row,
            "anneal": variant.anneal,
            "segments": plan.segments[variant.name],
            "evals": plan.evals[variant.name],
            "overrides": variant.overrides,
            "keep_ends": variant.run.checkpoint.keep.ends,
            "anneal_seed": _anneal_seed(variant),
            "ledger": ledger_of(variant, bins_known(plan, variant, store)).to_json(),
        }
        for variant in plan.variants
    ]


def _row(variant: Variant, span: PhaseSpan) -> dict[str, Any]:
    return {
        "axes": {key: value for key, value in variant.axes.items() if key != "seed"},
        "arch": variant.arch,
        "seed": variant.seed,
        "pretrain_seed": _pretrain_seed(variant),
        "parameters": variant.parameters,
        "flops_per_token": variant.flops_per_token,
        "tokens": span.to,
        "train_flops": span.to * variant.flops_per_token["train"],
    }


def _pretrain_seed(variant: Variant) -> int:
    root = next(phase for phase in variant.run.phases.values() if phase.parent is None)
    return variant.seed if root.seed is None else root.seed


def _anneal_seed(variant: Variant) -> int | None:
    if variant.run.anneal is None:
        return None
    return variant.seed if variant.run.anneal.seed is None else variant.run.anneal.seed


def _pretrained(plan: Plan, variants: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each state that anneals fork from; sets `pretrained` of the variants to its name."""
    groups: dict[str, list[Variant]] = {}
    for variant in plan.variants:
        if variant.pretrained is not None:
            groups.setdefault(plan.pretrained_stage[variant.name], []).append(variant)
    names = _pretrained_names(groups)
    by_name = {v["name"]: v for v in variants}
    rows = []
    for stage, members in groups.items():
        first = members[0]
        assert first.pretrained is not None
        ids = plan.segments[first.name]
        axes, row_name, name = names[stage]
        for member in members:
            by_name[member.name]["pretrained"] = name
        rows.append(
            {
                **_row(first, first.pretrained),
                "axes": axes,
                "name": name,
                "row": row_name,
                "anneal": None,
                "anneal_seed": None,
                "segments": ids[: ids.index(stage) + 1],
                "evals": plan.pretrained_evals[first.name],
            }
        )
    return rows


def _pretrained_names(groups: dict[str, list[Variant]]) -> dict[str, tuple[dict[str, Any], str, str]]:
    """Stage -> (axes, row, name): the axes on which the sharers agree, less those that are not needed to tell rows apart.

    Where these do not tell two states apart (arms that pretrain differently), the sharers' values of the others do.
    """
    axes = {
        stage: {k: v for k, v in members[0].axes.items() if all(m.axes.get(k) == v for m in members)}
        for stage, members in groups.items()
    }
    keys = [key for key in groups and next(iter(groups.values()))[0].axes if key != "arch"]
    for key in reversed(keys):
        fewer = {stage: {k: v for k, v in own.items() if k != key} for stage, own in axes.items()}
        if len({tuple(sorted((k, str(v)) for k, v in own.items())) for own in fewer.values()}) == len(groups):
            axes = fewer
    seen = Counter(_names(groups[stage][0], own, "") for stage, own in axes.items())
    result = {}
    for stage, own in axes.items():
        members = groups[stage]
        row, name = _names(members[0], own, "")
        if seen[row, name] > 1:
            others = [key for key in members[0].axes if key not in own and key != "seed"]
            values = ["+".join(sorted({str(m.axes.get(key)) for m in members})) for key in others]
            row, name = _names(members[0], own, "".join(f",{value}" for value in values))
        result[stage] = ({k: v for k, v in own.items() if k != "seed"}, row, name)
    assert len({name for _, _, name in result.values()}) == len(groups), "two states differ in an axis"
    return result


def _names(first: Variant, axes: dict[str, Any], told_apart: str) -> tuple[str, str]:
    """(row, name) of a state that anneals fork from."""
    assert first.pretrained is not None
    seedless = {k: v for k, v in axes.items() if k != "seed"}
    row = f"{row_of(seedless, first.arch, None)}{told_apart}@{first.pretrained.name}"
    return row, f"{row},seed={axes['seed']}" if "seed" in axes else row
