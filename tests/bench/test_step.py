"""A step of a config: the training loop's own work, exact FLOPs, and parts that sum to the whole."""

import subprocess
import sys

import pytest
import torch

from tests.bench.conftest import CEILINGS, answer_of, asked, with_config
from zexp.bench import step, step_times
from zexp.calc import memory
from zexp.calc import model as calc
from zexp.calc.layout import Layout
from zexp.config.errors import ConfigError
from zexp.kernels import select

SMALL = ("seq_len=32", "phases.pretrain.batch_tokens=256", "execution.device=cpu")


def options_of(*words, config=("arch=zamba2_tiny",)):
    return with_config(asked(step, "--seconds", "0.1", *words), (*config, *SMALL))


@pytest.mark.parametrize(("arch", "precision"), [("zamba2_tiny", "bf16"), ("moe_tiny", "fp32"), ("parallel_tiny", "fp32")])
def test_a_step_is_measured_and_its_parts_sum_to_it(ceilings, capsys, arch, precision):
    answer = answer_of(step, options_of(config=(f"arch={arch}", f"precision={precision}")), capsys)
    (one,) = answer["steps"]
    assert one["name"] == arch and one["batch_tokens"] == 256 and one["micro_batch"] == 4 and one["precision"] == precision
    assert one["step"]["n"] >= 3 and one["first_seconds"] > 0
    assert one["tokens_per_second"] == pytest.approx(256 / one["step"]["median_seconds"])
    assert one["flops_per_second"] == pytest.approx(one["tokens_per_second"] * one["flops_per_token"]["train"])
    assert one["mfu"]["of_measured"] == pytest.approx(one["flops_per_second"] / CEILINGS[f"matmul_{precision}"])
    assert one["mfu"]["of_datasheet"] is None and any("GPU" in text for text in one["not_measured"])
    assert one["backends"] == {name: "cpp" if name in select.IN_CPP else "torch" for name in one["backends"]}
    rows, found = one["breakdown"]["rows"], one["breakdown"]
    assert sum(row["seconds"] for row in rows) + found["remainder_seconds"] == pytest.approx(found["whole_seconds"])
    assert sum(row["share"] for row in rows) == pytest.approx(1 - found["remainder_seconds"] / found["whole_seconds"])
    for row in rows:
        assert row["seconds"] > 0
        if row["letters"]:
            assert row["seconds"] == pytest.approx(row["forward_seconds"] + row["backward_seconds"]) and row["flops_per_second"] > 0
    assert {"embedding", "final norm", "head and loss", "clipping", "optimizer"} <= {row["part"] for row in rows}


def test_the_flops_of_the_parts_are_those_of_the_step(capsys):
    work = step.work_of(options_of().composed[0], options_of())
    assert sum(step_times.calc_flops(work).values()) == pytest.approx(256 * calc.flops_per_token(work.model, 32)["train"])


def test_the_estimate_is_that_of_the_plan(ceilings, capsys):
    config = ("arch=transformer_tiny", "precision=bf16", "execution.micro_batch=2")
    (one,) = answer_of(step, options_of(config=config), capsys)["steps"]
    work = step.work_of(options_of(config=config).composed[0], options_of())
    expected = memory.training(work.model, Layout(), seq_len=32, micro_batch=2, precision="bf16")
    assert one["memory"]["estimate"] == expected.to_json()
    assert one["memory"]["measured_over_estimate"] == pytest.approx(one["memory"]["measured_bytes"] / expected.total)


def test_random_tokens_are_of_the_vocabulary_and_documents_where_they_are_masked():
    masked = ("arch=transformer_tiny", "seq_len=2048", "phases.pretrain.batch_tokens=8192")
    work = step.work_of(with_config(options_of(), masked).composed[0], options_of())
    batch = step_times.random_batch(work, "cpu")
    assert batch.inputs_BT.shape == batch.labels_BT.shape == batch.documents_BT.shape == (4, 2048)
    assert int(batch.inputs_BT.max()) < work.model["vocab_size"] and torch.equal(batch.inputs_BT[:, 1:], batch.labels_BT[:, :-1])
    assert bool((batch.documents_BT[:, 1:] >= batch.documents_BT[:, :-1]).all()) and int(batch.documents_BT.max()) > 1
    plain = step.work_of(with_config(options_of(), (*masked, "corpus.packing.document_mask=false")).composed[0], options_of())
    assert int(step_times.random_batch(plain, "cpu").documents_BT.max()) == 0


def test_the_step_trains_the_model():
    work = step.work_of(options_of().composed[0], options_of())
    one = step_times.Step(work, "cpu")
    before = one.model.embedding.weight.detach().clone()
    losses = [one() for _ in range(3)]
    assert losses[2] < losses[0] and not torch.equal(before, one.model.embedding.weight)


def test_several_configs_are_measured_once_each(ceilings, capsys):
    options = with_config(
        asked(step, "--seconds", "0.1"), ("arch=mamba2_tiny", *SMALL), ("arch=mamba2_tiny", "anneal=replay60", *SMALL),
        ("arch=transformer_tiny", *SMALL),
    )  # fmt: skip
    assert [one["name"] for one in answer_of(step, options, capsys)["steps"]] == ["mamba2_tiny", "transformer_tiny"]


def test_arguments_stand_before_the_config(ceilings, capsys):
    threads = torch.get_num_threads()
    options = options_of("--threads", "1", "--device", "cpu", config=("arch=mamba2_tiny", "parallelism.threads=2"))
    (one,) = answer_of(step, options, capsys)["steps"]
    assert one["machine"]["threads"] == 1 and torch.get_num_threads() == threads


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (("execution.micro_batch=0", "precision=fp8"), "execution.micro_batch = 0 must be above 0."),
        (("execution.micro_batch=0", "precision=fp8"), "precision"),
        (("phases.pretrain.batch_tokens=100",), "100"),
        (("kernels=fused",), "kernels = fused"),
        (("parallelism.zero=1",), "parallelism.zero = 1"),
    ],
)
def test_what_is_wrong_with_a_config_is_refused(ceilings, config, said):
    options = with_config(asked(step, "--seconds", "0.1"), ("arch=mamba2_tiny", "seq_len=32", "execution.device=cpu", *config))
    with pytest.raises(ConfigError) as refused:
        step.main(options)
    assert said in str(refused.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match="torch sees no GPU here"):
        step.main(options_of("--device", "cuda"))


def test_the_table_names_the_blocks_and_what_is_not_measured(ceilings, capsys):
    assert step.main(options_of()) == 0
    shown = capsys.readouterr().out
    for text in ("mamba2 (m)", "shared (g)", "head and loss", "between them", "Not measured: memory of a GPU"):
        assert text in shown


def test_the_peak_is_of_what_was_there_at_once():
    """In a process of its own: one that has trained keeps what it frees, and it stays resident."""
    script = """
import torch
from zexp.bench.peak import Peak
peak = Peak("cpu")
one = torch.ones(8_000_000)  # 32 MB, touched
del one
other = torch.ones(8_000_000)
print(peak.bytes())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert 24e6 < int(done.stdout) < 60e6, "not both, which were never there together"
