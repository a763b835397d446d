import json
import subprocess
import sys

import pytest

from tests.report.synthetic import ANNEAL, DECAY, TRUNK, Study, make
from zexp.config.errors import ConfigError
from zexp.report import build
from zexp.store.files import read_json, write_json

METRIC = "bpb_high_quality/bits_per_byte"
REPLAY, CONTROL = "zamba2_tiny,replay60", "zamba2_tiny,control"


def rows_of(report):
    return {row.name: row for row in report.rows}


def one_arch(tmp_path, **knobs):
    store = make(Study(tmp_path / "store", archs=("zamba2_tiny",), **knobs))
    return build(store.root, "invented")


def at(*labels):
    """An outcome: these labels fail, everything else is done."""
    return lambda stage: "failed" if stage["label"] in labels else "done"


def test_a_finished_study_has_a_row_a_variant_and_a_pretrained_state(finished):
    report = build(finished.root, "invented")
    assert [row.name for row in report.rows] == [
        "transformer_tiny,control", "transformer_tiny,replay60", CONTROL, REPLAY,
        "transformer_tiny@pretrain", "zamba2_tiny@pretrain",
    ]  # fmt: skip
    assert {row.status for row in report.rows} == {"done"}
    assert not report.unfinished
    assert report.metric_names[0] == METRIC
    assert rows_of(report)["zamba2_tiny@pretrain"].anneal is None


def test_the_json_has_the_promised_shape(finished):
    printed = json.loads(json.dumps(build(finished.root, "invented").to_json(), allow_nan=False))
    assert printed["study"] == "invented"
    row = next(row for row in printed["rows"] if row["variant"] == REPLAY)
    assert row["arch"] == "zamba2_tiny"
    assert row["anneal"] == "replay60"
    assert row["status"] == "done"
    assert row["parameters"] == 1_300_000
    assert row["tokens"] == ANNEAL
    assert row["seeds"] == [0]
    cell = row["metrics"][METRIC]
    assert cell["low"] < cell["mean"] < cell["high"]
    assert (cell["n"], cell["higher_is_better"], cell["interval"]) == (1, False, "items")
    assert cell["reference"] == {"name": "unigram", "value": 4.61}
    assert row["metrics"]["cloze/acc"]["chance"] == 0.02
    assert row["stages"]["evals"]["0"]["cloze"] in cell["stages"] + row["metrics"]["cloze/acc"]["stages"]


def test_one_seed_is_compared_over_its_items_and_says_so(finished):
    pairs = {(pair.row, pair.metric): pair for pair in build(finished.root, "invented").pairs}
    pair = pairs[REPLAY, METRIC]
    assert pair.baseline == CONTROL
    assert (pair.interval, pair.n) == ("items", 60)
    assert pair.verdict == "better"
    assert "one seed" in pair.reason
    assert pair.p_holm >= pair.p
    cloze = pairs[REPLAY, "cloze/acc"]
    assert cloze.verdict == "cannot distinguish"
    assert cloze.low < 0 < cloze.high


def test_several_seeds_are_compared_paired_by_seed(seeded):
    report = build(seeded.root, "invented")
    pair = next(pair for pair in report.pairs if pair.metric == METRIC)
    rows = rows_of(report)
    ours, theirs = (rows[name].metrics[METRIC].by_seed for name in (REPLAY, CONTROL))
    assert pair.difference == pytest.approx(sum(ours[s] - theirs[s] for s in ours) / 3)
    assert (pair.interval, pair.n) == ("seeds", 3)
    assert rows[REPLAY].metrics[METRIC].interval == "seeds"


def test_a_shared_pretraining_is_said_to_understate_the_variance(seeded, finished):
    said = " ".join(build(seeded.root, "invented").warnings)
    assert f"All seeds of {CONTROL}, {REPLAY} share one pretraining seed" in said
    assert "understates the variance" in said
    assert "Arms share a pretraining seed" in " ".join(build(finished.root, "invented").warnings)


def test_pretraining_is_one_trajectory_of_all_its_arms(seeded):
    report = build(seeded.root, "invented")
    trunk = next(t for t in report.trajectories if t.start == 0)
    decay = next(t for t in report.trajectories if t.start == TRUNK)
    assert len(report.trajectories) == 2 + 6
    assert trunk.shared and len(trunk.users) == 6
    assert (trunk.parent, decay.parent) == (None, trunk.id)
    assert all(t.parent == decay.id and not t.shared for t in report.trajectories if t.start == DECAY)
    assert decay.marks[0].eval_status == "done"


def test_seeds_that_nothing_reads_are_one_run(tmp_path):
    report = one_arch(tmp_path, seeds=(0, 1), seed_read=False)
    row = rows_of(report)[REPLAY]
    assert row.seeds == [0, 1]
    assert {cell.n for cell in row.metrics.values()} == {1}
    assert "seed 1 is the same run as seed 0" in row.notes[0]
    assert any("counted as n = 1" in warning for warning in report.warnings)


def test_a_failed_anneal_is_listed_with_its_log_and_traceback(tmp_path):
    report = one_arch(tmp_path, outcome=at("zamba2_tiny anneal replay60"))
    assert rows_of(report)[REPLAY].status == "failed"
    assert rows_of(report)[CONTROL].status == "done"
    assert rows_of(report)[REPLAY].metrics == {}
    (one,) = report.unfinished
    assert one.variant == REPLAY
    assert "out of imaginary memory" in one.reason
    assert "Traceback" in one.traceback
    assert (tmp_path / "store" / one.log).read_text().startswith("the log of zamba2_tiny anneal")
    assert any("no metric was scored for both" in warning for warning in report.warnings)


def test_what_depends_on_a_failed_pretraining_is_skipped(tmp_path):
    report = one_arch(tmp_path, outcome=lambda s: "failed" if s["to"] == TRUNK else "done")
    assert rows_of(report)["zamba2_tiny@pretrain"].status == "failed"
    assert rows_of(report)[REPLAY].status == rows_of(report)[CONTROL].status == "skipped"
    assert {one.variant for one in report.unfinished} == {"zamba2_tiny@pretrain", REPLAY, CONTROL}
    assert all(one.log for one in report.unfinished)


def test_a_tokenizer_that_fails_skips_everything_and_is_named(tmp_path):
    report = one_arch(tmp_path, outcome=at("tokenizer"))
    assert {row.status for row in report.rows} == {"skipped"}
    assert all("tokenizer" in one.reason for one in report.unfinished)


def test_a_divergence_is_a_result_with_its_curve(tmp_path):
    outcome = lambda s: "diverged" if s["label"] == "zamba2_tiny anneal replay60" else "done"  # noqa: E731
    report = one_arch(tmp_path, outcome=outcome)
    assert rows_of(report)[REPLAY].status == "diverged"
    assert "the loss of a step is not finite" in report.unfinished[0].reason
    curves = {curve.trajectory: curve for curve in report.curves}
    diverged = next(t for t in report.trajectories if t.status == "diverged")
    assert curves[diverged.id].loss


def test_half_a_study_says_what_is_missing(tmp_path):
    outcome = lambda s: "interrupted" if s["label"].endswith("replay60") else "done"  # noqa: E731
    report = one_arch(tmp_path, outcome=outcome)
    assert rows_of(report)[REPLAY].status == "missing"
    assert "interrupted at" in report.unfinished[0].reason
    (tmp_path / "new").mkdir()
    untouched = one_arch(tmp_path / "new", outcome=lambda s: "missing")
    assert {row.status for row in untouched.rows} == {"missing"}
    assert all("not started" in one.reason for one in untouched.unfinished)


def test_a_failed_evaluation_keeps_the_other_scores(tmp_path):
    report = one_arch(tmp_path, outcome=at("eval cloze"))
    row = rows_of(report)[REPLAY]
    assert row.status == "failed"
    assert set(row.metrics) == {"bpb_base/bits_per_byte", METRIC}
    assert any(pair.metric == METRIC for pair in report.pairs)


def test_a_mean_over_surviving_seeds_is_marked(tmp_path):
    first = []

    def outcome(stage):
        if stage["label"] == "zamba2_tiny anneal replay60" and not first:
            first.append(stage["id"])
            return "diverged"
        return "done"

    report = one_arch(tmp_path, seeds=(0, 1), outcome=outcome)
    row = rows_of(report)[REPLAY]
    assert row.status == "diverged"
    assert row.by_seed == {"0": "diverged", "1": "done"}
    assert row.metrics[METRIC].n == 1
    assert any("mean over the seeds that finished; seed 0 did not" in warning for warning in report.warnings)


def test_mixed_numerics_are_marked(tmp_path):
    report = one_arch(tmp_path, threads={REPLAY: 2})
    assert all(pair.mixed_fingerprints for pair in report.pairs)
    said = f"{REPLAY} and {CONTROL} were trained under different numerics fingerprints (threads: 1 or 2)."
    assert said in report.warnings
    assert not any(pair.mixed_fingerprints for pair in one_arch(tmp_path / "same").pairs)


def test_items_that_do_not_add_up_to_the_score_are_not_paired(tmp_path):
    store = make(Study(tmp_path / "store", archs=("zamba2_tiny",)))
    for path in store.root.glob("eval/*/result/results.json"):
        results = read_json(path)
        for metric in results["metrics"].values():
            metric["value"] += 0.1
        write_json(path, results)
    for pair in build(store.root, "invented").pairs:
        assert pair.verdict == "cannot distinguish"
        assert "did not score the same items" in pair.reason
        assert pair.p is None


def test_a_score_that_is_not_finite_is_said_and_left_out(tmp_path):
    store = make(Study(tmp_path / "store", archs=("zamba2_tiny",)))
    path = next(iter(sorted(store.root.glob("eval/*/result/results.json"))))
    results = read_json(path)
    next(iter(results["metrics"].values()))["value"] = None
    write_json(path, results)
    report = build(store.root, "invented")
    assert any("is None; it is left out" in warning for warning in report.warnings)
    json.dumps(report.to_json(), allow_nan=False)


@pytest.mark.parametrize(
    ("baseline", "said"),
    [({"depth": 3}, "names the axis depth, which no variant has"), ({"arm": "other"}, "no variant is")],
)
def test_a_baseline_that_is_not_there_is_said(tmp_path, baseline, said):
    report = one_arch(tmp_path, baseline=baseline)
    assert report.pairs == []
    assert said in " ".join(report.warnings)


def test_without_a_baseline_nothing_is_compared(tmp_path):
    assert one_arch(tmp_path, baseline={}).pairs == []


def test_an_unknown_study_is_refused_with_those_that_there_are(finished, tmp_path):
    with pytest.raises(ConfigError, match=r"'wrong' is no study in the store .* It has: invented\."):
        build(finished.root, "wrong")
    with pytest.raises(ConfigError, match="no study yet"):
        build(tmp_path, "wrong")


def test_the_report_needs_neither_torch_nor_matplotlib(finished):
    code = (
        "import sys; from pathlib import Path; from zexp.report import build, write;"
        f"write(build(Path({str(finished.root)!r}), 'invented'), Path({str(finished.root / 'elsewhere')!r}));"
        "bad = {'torch', 'scipy.stats', 'matplotlib', 'mpld3', 'lm_eval', 'pandas'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
