"""The command line as a user types it: Hydra's own flags, the plan as JSON, a folder of one's own from text to report."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


def zexp(*words: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "zexp.cli", *words],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "160", **env},
        capture_output=True,
        text=True,
    )


def test_the_quickstart_is_three_pretrainings_shared_by_six_anneals(tmp_path):
    done = zexp("plan", "--json", "+sweeps=quickstart", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["variants"] == 6
    stages = {stage["id"]: stage for stage in plan["stages"]}
    anneals = [stage for stage in stages.values() if stage["kind"] == "segment" and stage["phase"] == "anneal"]
    ends = {parent for stage in anneals for parent in stage["parents"] if stages[parent]["kind"] == "segment"}
    assert len(anneals) == 6
    packings = {id: {stages[p]["label"] for p in stage["parents"] if stages[p]["kind"] == "packing"} for id, stage in stages.items()}
    for stage in anneals:
        mixed = "replay60" in stage["label"]
        assert packings[stage["id"]] == {"packing base"} | ({"packing high_quality"} if mixed else set())
    assert len(ends) == plan["pretrainings"] == 3
    assert all(stages[end]["phase"] == "pretrain" and stages[end]["to"] == 577_536 for end in ends)
    assert all(sum(end in anneal["parents"] for anneal in anneals) == 2 for end in ends)
    assert plan["tokens"] == {"to_train": 3 * 577_536 + 6 * 98_304, "shared": 3 * 577_536 + 6 * 98_304, "unshared": 6 * 675_840}
    assert not any(stage["cached"] for stage in stages.values())


def test_plan_says_how_long_it_takes_and_a_stage_what_for(tmp_path):
    plan = json.loads(zexp("plan", "--json", "arch=zamba2_tiny", "execution.device=cpu", cwd=tmp_path).stdout)
    assert plan["seconds"] > 0 and plan["device_hours"] > 0 and plan["estimate"]["measured"] == 0
    assert sum(s["seconds"] for s in plan["stages"]) == pytest.approx(plan["device_hours"] * 3600, abs=0.1)
    assert {s["source"] for s in plan["stages"]} == {"calculated"}
    assert [(m["arch"], m["fits"]) for m in plan["memory"]] == [("zamba2_tiny", True)]


@pytest.mark.parametrize("verb", ["plan", "run"])
def test_what_cannot_fit_the_device_is_refused_before_anything_starts(tmp_path, verb):
    words = ["arch=zamba2_7b,zamba_7b", "anneal=none", "execution.device_model=a10"]
    done = zexp(verb, "-m", *words, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("cannot be trained here: weights, gradients and optimizer alone take") == 2
    assert "a10 has 24 GB" in done.stderr
    assert [path.name for path in tmp_path.glob("store/*")] == ["cache"], "file digests alone"


def test_why_lists_the_keys_in_which_two_variants_differ(tmp_path):
    words = ["--why", "transformer_tiny,control", "transformer_tiny,replay60,seed=0", "+sweeps=quickstart"]
    done = zexp("plan", "--json", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["shared_tokens"] == 577_536 and not answer["equal"]
    assert {"stages": ["anneal"], "key": "streams[0].weight", "a": 4096, "b": 2458} in answer["differences"]
    shown = zexp("plan", *words, cwd=tmp_path).stdout
    assert "They are the same up to 577,536 tokens." in shown and "streams[0].weight" in shown
    wrong = zexp("plan", "--why", "nobody", "+sweeps=quickstart", cwd=tmp_path)
    assert wrong.returncode == 2 and "'nobody' names no variant of the composed study" in wrong.stderr
    assert zexp("run", "--why", "a", cwd=tmp_path).returncode == 2


def test_hydras_flags_work_and_leave_no_folders(tmp_path):
    shown = zexp("run", "--cfg", "job", "arch=mamba2_tiny", "anneal.tokens=10M", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert "pattern: 7*m" in shown.stdout
    assert "tokens: 10M" in shown.stdout
    helped = zexp("run", "--help", cwd=tmp_path)
    assert helped.returncode == 0
    assert "zamba2_tiny" in helped.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("line", "expected"), [("zexp run arch=zam", "arch=zamba2_tiny"), ("zexp plan anneal=repl", "anneal=replay60")])
def test_the_shell_completes_choices_after_the_verb(tmp_path, line, expected):
    done = zexp("-sc", "query=bash", cwd=tmp_path, COMP_LINE=line, COMP_POINT=str(len(line)))
    assert expected in done.stdout.split()


@pytest.mark.parametrize(
    ("line", "offered"),
    [("zexp ", {"run", "plan", "calc", "status", "report", "logs", "cancel", "export", "sample", "store", "init", "bench"}), ("zexp r", {"run", "report"}),
     ("zexp status qu", {"quickstart"}), ("zexp init x", set()), ("zexp sample ti", {"tiny", "tiny@pretrain"}),
     ("zexp export quickstart/tiny@", {"quickstart/tiny@pretrain"}), ("zexp export tiny --h", set())],
)  # fmt: skip
def test_the_shell_completes_verbs_and_studies(tmp_path, line, offered):
    (tmp_path / "store/studies/quickstart").mkdir(parents=True)
    rows = {"variants": [{"name": "tiny"}], "pretrained": [{"name": "tiny@pretrain"}]}
    (tmp_path / "store/studies/quickstart/variants.json").write_text(json.dumps(rows))
    done = zexp("-sc", "query=bash", cwd=tmp_path, COMP_LINE=line, COMP_POINT=str(len(line)), ZEXP_STORE="store")
    assert set(done.stdout.split()) == offered and done.stderr == ""


def test_stages_that_a_seed_or_a_rate_tells_apart_have_it_in_their_labels(tmp_path):
    done = zexp("plan", "--json", "-m", "schedule.peak_lr=1e-3,2e-3", "seed=0,1", cwd=tmp_path)
    stages = json.loads(done.stdout)["stages"]
    labels = [stage["label"] for stage in stages if stage["kind"] in ("segment", "eval")]
    assert len(set(labels)) == len(labels)
    assert "peak_lr=0.001,seed=1 pretrain" in labels and "peak_lr=0.001,seed=1@pretrain cloze" in labels


def test_calc_of_a_study_shows_each_architecture_once(tmp_path):
    done = zexp("calc", "--json", "+sweeps=quickstart", cwd=tmp_path)
    assert [one["arch"] for one in json.loads(done.stdout)["architectures"]] == ["transformer_tiny", "mamba2_tiny", "zamba2_tiny"]
    text = zexp("calc", "arch=mamba2_tiny", cwd=tmp_path).stdout
    assert "vocabulary 4096" in text and "A state takes 15.5 MB" in text


def test_several_values_are_a_study_named_by_its_axes(tmp_path):
    done = zexp("plan", "--json", "-m", "arch=mamba2_tiny,zamba2_tiny", "seed=0,1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    names = {name for stage in plan["stages"] for name in stage["variants"]}
    assert names == {f"{arch},seed={seed}" for arch in ("mamba2_tiny", "zamba2_tiny") for seed in (0, 1)}


def test_calc_counts_the_tiny_architectures(tmp_path):
    counts = {}
    for arch in ("transformer_tiny", "mamba2_tiny", "zamba2_tiny"):
        done = zexp("calc", "--json", f"arch={arch}", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        counts[arch] = json.loads(done.stdout)["parameters"]["total"]
    assert counts == {"transformer_tiny": 1_311_360, "mamba2_tiny": 1_291_112, "zamba2_tiny": 1_306_976}
    assert max(counts.values()) / min(counts.values()) < 1.02


def test_a_folder_of_ones_own_runs_as_it_is_and_then_trains_nothing(tmp_path):
    assert zexp("init", "mine", cwd=tmp_path).returncode == 0
    folder = tmp_path / "mine"
    done = zexp("run", "+sweeps=mine", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((folder / "store/studies/mine/report/leaderboard.json").read_text())
    assert {row["variant"]: row["status"] for row in report["rows"]} == {
        "rewarmed": "done", "straight": "done", "mine@pretrain": "done",
    }  # fmt: skip
    assert all(row["metrics"]["bpb_mine/bits_per_byte"]["mean"] > 0 for row in report["rows"])
    again = zexp("run", "+sweeps=mine", cwd=folder)
    assert again.returncode == 0
    assert "Nothing to train" in again.stdout
    assert len(list(folder.glob("store/trajectory/*/attempts/*"))) == 4
    later = json.loads(zexp("plan", "--json", "+sweeps=mine", "seed=7", cwd=folder).stdout)
    assert {(s["kind"], s["source"]) for s in later["stages"] if s["needed"]} == {("segment", "measured"), ("eval", "measured")}
    status = json.loads(zexp("status", "--json", cwd=folder).stdout)
    assert {stage["status"] for stage in status["studies"]["mine"]} == {"done"}
    assert zexp("init", "mine", cwd=tmp_path).returncode == 2, "init overwrites nothing"


def test_the_command_that_a_new_folder_names_counts_what_it_trains(tmp_path):
    assert zexp("init", "mine", cwd=tmp_path).returncode == 0
    comment = (tmp_path / "mine/conf/arch/mine.yaml").read_text().splitlines()[0]
    words = comment.split("`zexp calc ")[1].split("`")[0].split()
    answer = json.loads(zexp("calc", "--json", *words, cwd=tmp_path / "mine").stdout)
    assert (answer["arch"], answer["vocab_size"], answer["seq_len"]) == ("mine", 512, 128)


def test_a_changed_study_becomes_the_current_revision(tmp_path):
    assert zexp("init", "mine", cwd=tmp_path).returncode == 0
    folder = tmp_path / "mine"
    small = ["phases.pretrain.tokens=4K", "anneal.tokens=4K", "schedule.warmup_tokens=0", "eval=none", "study.metric=null"]
    assert zexp("run", "+sweeps=mine", *small, cwd=folder).returncode == 0
    done = zexp("run", "+sweeps=mine", *small, "anneal.peak_fraction=0.5", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "mine is now at revision 2: 2 altered" in done.stdout
    assert "not in the store; nearest" in done.stdout and "differs in lr[" in done.stdout
    planned = json.loads(zexp("plan", "--json", "+sweeps=mine", *small, "seed=1", cwd=folder).stdout)
    assert {s["source"] for s in planned["stages"] if s["kind"] == "segment" and s["needed"]} == {"measured"}
    assert (folder / "store/studies/mine/revisions/1/variants.json").is_file()


def test_a_scored_end_keeps_its_weights_alone_and_a_later_fork_of_it_replays_the_decay(tmp_path):
    assert zexp("init", "mine", cwd=tmp_path).returncode == 0
    folder = tmp_path / "mine"
    words = ["arch=mine", "corpus=mine", "mix=mine", "eval=bpb", "seq_len=128", "phases.pretrain.tokens=8K",
             "phases.pretrain.batch_tokens=1024", "schedule.warmup_tokens=1K"]  # fmt: skip
    assert zexp("run", "anneal=none", *words, cwd=folder).returncode == 0

    def parts():
        states = folder.glob("store/trajectory/*/states/*")
        return {int(state.name): sorted(part.name for part in state.iterdir() if part.is_dir()) for state in states}

    assert parts() == {7168: ["optimizer", "weights"], 8192: ["weights"]}
    anneal = ["anneal=control", "anneal.tokens=2K", "anneal.warmup_tokens=0"]
    plan = json.loads(zexp("plan", "--json", *anneal, *words, cwd=folder).stdout)
    assert plan["tokens"]["to_train"] == 1024 + 2048, "the decay is replayed from the trunk's end"
    done = zexp("run", *anneal, *words, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert parts() == {7168: ["optimizer", "weights"], 8192: ["optimizer", "weights"], 10240: ["weights"]}
    again = zexp("run", *anneal, *words, cwd=folder)
    assert "Nothing to train" in again.stdout


def test_wandb_without_a_key_gets_curves_and_scores_offline_and_says_how_to_send_them(tmp_path):
    assert zexp("init", "mine", cwd=tmp_path).returncode == 0
    folder = tmp_path / "mine"
    keys = {key: "" for key in os.environ if key.startswith("WANDB_")} | {"NETRC": str(tmp_path / "none")}
    words = ["arch=mine", "corpus=mine", "mix=mine", "eval=bpb", "seq_len=128", "phases.pretrain.tokens=4K",
             "phases.pretrain.batch_tokens=1024", "schedule.warmup_tokens=1K", "anneal=none", "logger=wandb"]  # fmt: skip
    done = zexp("run", *words, cwd=folder, **keys)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "wandb: 3 runs were written offline" in done.stdout and "wandb sync " in done.stdout
    runs = [run.name.split("-")[-1] for run in folder.glob("store/**/wandb/offline-run-*")]
    decay = next(path.parent.parent.name for path in folder.glob("store/trajectory/*/states/4096"))
    assert runs.count(decay) == 2, "the decay's curves and the score of its end are one run"
    (scored,) = folder.glob("store/studies/*/wandb/*/wandb/offline-run-*/*.wandb")
    assert b"bpb_mine/bits_per_byte" in scored.read_bytes()
    again = zexp("run", *words, cwd=folder, **keys)
    assert "wandb: 3 runs were written offline" in again.stdout, "nothing is sent twice"
