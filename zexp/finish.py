"""The end of `zexp run`: what failed, the comparison, where the leaderboard is, the exit code."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from zexp import report
from zexp.config.tokens import say_tokens
from zexp.store.folder import Store
from zexp.study.execute import Acted
from zexp.study.launch import progress
from zexp.study.plan import Stage
from zexp.study.tracking import send_scores


def finish(batches: Sequence[Acted], *, seconds: float) -> int:
    """Print failures and the comparison table, write the report; the exit code.

    batches: those of one study, the last with all its variants; seconds: since the command began.
    """
    acted = batches[-1]
    the_plan = acted.plan
    outcomes = {id: outcome for one in batches for id, outcome in one.outcomes.items()}
    console = Console(highlight=False)
    statuses = {outcome.status for outcome in outcomes.values()}
    if "submitted" in statuses and acted.detached:
        return 0  # others run it; how to come back was said
    if any(outcome.status not in ("done", "skipped") for outcome in outcomes.values()):
        progress.failures(list(the_plan.stages.values()), outcomes, console)
    made = report.build(acted.store.root, acted.study["name"])
    paths = report.write(made)
    report.print_tables(made, console)
    trained = sum(
        _trained(one.plan.stages[id], one.store, outcome.status) for one in batches for id, outcome in one.outcomes.items()
    )
    did = f"{say_tokens(trained)} tokens trained" if outcomes else "Nothing to train: everything was in the store"
    console.print(f"{did}; {seconds:.0f} s." if seconds >= 10 else f"{did}; {seconds:.1f} s.")
    console.print(f"Leaderboard: {paths['html']}", soft_wrap=True)
    for line in send_scores(the_plan, acted.store, acted.study["name"]):
        console.print(line, soft_wrap=True)
    if "submitted" in statuses:
        return 130
    if "interrupted" in statuses:
        console.print("Interrupted. The same command goes on from the last states.")
        return 130 if acted.here else 1
    retried = {id for id, outcome in outcomes.items() if outcome.status == "done"}
    diverged = any(stage.diverged is not None and stage.id not in retried for stage in the_plan.stages.values())
    return 1 if diverged or statuses & {"failed", "diverged", "skipped"} else 0


def _trained(stage: Stage, store: Store, status: str) -> int:
    """Tokens of a stage that were trained and kept; of one that was not done up to its newest state."""
    if status == "done" or stage.kind != "segment" or stage.to is None or stage.start is None:
        return stage.to_train if status == "done" else 0
    before = stage.start if stage.resume_from is None else stage.resume_from
    reached = [tokens for tokens in store.folder("trajectory", stage.full_id).states() if tokens <= stage.to]
    return max(0, max(reached, default=before) - before)
