"""Budgets by hand, and what is wrong with one."""

import json

import pytest

from tests.test_cli import zexp
from zexp.calc.budget import Budget
from zexp.calc.devices import DEVICES

SIZES = {"total": 10**9, "active": 5 * 10**8}


def test_a_budget_is_peak_times_share_times_time():
    answer = Budget(gpus=64, days=14, device="h100", mfu=0.4).answer(SIZES, 6e9, training_bytes=18 * 10**9)
    assert answer["flops"] == 64 * 14 * 86_400 * 989.4e12 * 0.4
    assert answer["tokens"] == answer["flops"] / 6e9
    assert answer["tokens_per_parameter"] == answer["tokens"] / 1e9 == answer["tokens_per_active_parameter"] / 2
    assert answer["days_for_20_tokens_per_parameter"] == pytest.approx(14 * 20e9 / answer["tokens"])
    assert answer["fits"] and not Budget(gpus=1, days=1, device="a10").answer(SIZES, 6e9, 25 * 10**9)["fits"]


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"device": "h10"}, "Did you mean h100? There are: a10, a100"),
        ({"mfu": 1.5}, "at most 1"),
        ({"mfu": 0.0}, "above 0"),
        ({"gpus": 0}, "gpus = 0"),
        ({"days": -1.0}, "days = -1.0"),
        ({"days": float("nan")}, "days = nan"),
        ({"peak": "fp4"}, "the peaks known of h100 are those of fp8, bf16"),
    ],
)
def test_what_is_wrong_is_said(keys, says):
    (problem,) = Budget(**{"gpus": 1, "days": 1.0, "device": "h100", **keys}).problems()
    assert says in problem


def test_every_device_has_a_source_and_the_usual_peaks():
    for device in DEVICES.values():
        assert device.source and device.flops["bf16"] > device.flops["fp32"] > 0 and device.memory > 0


def test_the_command_divides_the_accelerators_into_copies(tmp_path):
    words = ("gpus=64", "days=14", "device=h100", "mfu=0.4", "arch=zamba2_1p2b", "seq_len=4096")
    done = zexp("calc", "budget", "--json", *words, "parallelism.tensor=2", "parallelism.zero=1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    training = answer["memory"]["training"]
    assert (training["layout"]["data"], training["layout"]["tensor"], training["precision"]) == (32, 2, "bf16")
    assert answer["budget"]["tokens"] == pytest.approx(answer["budget"]["flops"] / answer["flops_per_token"]["train"])
    text = zexp("calc", "budget", *words, cwd=tmp_path).stdout
    assert "64 × h100 for 14 days at 40% of 989 TFLOP/s" in text and "2.63 T tokens" in text


def test_all_mistakes_of_a_budget_are_reported_together(tmp_path):
    done = zexp("calc", "budget", "gpus=3", "days=2", "device=h10", "mfu=1.4", "parallelism.tensor=2", "seq_len=0", cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    for text in ("device = 'h10'", "mfu = 1.4", "gpus = 3", "seq_len = 0"):
        assert text in done.stderr
    done = zexp("calc", "budget", "gpus=many", "mfu=0.4", cwd=tmp_path)
    assert done.returncode == 2
    for text in ("gpus=many", "days: a budget needs it", "device: a budget needs it"):
        assert text in done.stderr
