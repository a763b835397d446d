"""Each fast operation against its slow reference: values and every gradient, in fp64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from zexp.kernels.activation import reference as activation_reference
from zexp.kernels.activation.names import GATED, PLAIN
from zexp.kernels.activation.torch_backend import mlp_activation
from zexp.kernels.attention import reference as attention_reference
from zexp.kernels.attention.torch_backend import attention, attention_by_torch
from zexp.kernels.causal_conv1d import reference as conv_reference
from zexp.kernels.causal_conv1d.torch_backend import causal_conv1d, causal_conv1d_continue
from zexp.kernels.cross_entropy import reference as loss_reference
from zexp.kernels.cross_entropy import torch_backend as loss_backend
from zexp.kernels.cross_entropy.torch_backend import linear_cross_entropy
from zexp.kernels.documents import Documents
from zexp.kernels.gated_norm import reference as gated_norm_reference
from zexp.kernels.gated_norm.torch_backend import gated_norm, norm_gated
from zexp.kernels.rms_norm import reference as rms_norm_reference
from zexp.kernels.rms_norm.torch_backend import rms_norm
from zexp.kernels.rotary import reference as rotary_reference
from zexp.kernels.rotary.scaling import RopeScaling
from zexp.kernels.rotary.torch_backend import frequencies, rotary

IDS = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, 2], [5, 6, 6, 6, 6, 6, 6, 9, 9]])


def drawn(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(len(shapes))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def assert_same(ours: Callable[..., Tensor], truth: Callable[..., Tensor], inputs: Sequence[Tensor]) -> None:
    """Outputs and gradients of a random projection agree to what fp64 sums allow."""
    mine, true = ours(*inputs), truth(*inputs)
    torch.testing.assert_close(mine, true, rtol=1e-10, atol=1e-11)
    weights = torch.randn(true.shape, generator=torch.Generator().manual_seed(7), dtype=true.dtype)
    for number, (left, right) in enumerate(
        zip(
            torch.autograd.grad((mine * weights).sum(), inputs),
            torch.autograd.grad((true * weights).sum(), inputs),
            strict=True,
        )
    ):
        torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-10, msg=lambda text, n=number: f"input {n}: {text}")


def test_rms_norm():
    assert_same(
        lambda x, w: rms_norm(x, w, 1e-5), lambda x, w: rms_norm_reference.rms_norm(x, w, 1e-5), drawn((2, 3, 8), (8,))
    )


@pytest.mark.parametrize("groups", [1, 4])
def test_gated_norm(groups):
    assert_same(
        lambda y, z, w: gated_norm(y, z, w, 1e-5, groups),
        lambda y, z, w: gated_norm_reference.gated_norm(y, z, w, 1e-5, groups),
        drawn((2, 3, 8), (2, 3, 8), (8,)),
    )


@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
@pytest.mark.parametrize("width", [1, 2, 4, 12], ids="K{}".format)
def test_causal_conv1d(width, packed):
    ids = IDS if packed else None
    assert_same(
        lambda x, w, b: causal_conv1d(x, w, b, None if ids is None else Documents(ids)),
        lambda x, w, b: conv_reference.causal_conv1d(x, w, b, ids),
        drawn((2, 9, 3), (3, width), (3,)),
    )


@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
@pytest.mark.parametrize("biased", [False, True], ids=["no bias", "bias"])
def test_causal_conv1d_alone(biased, packed):
    ids = IDS if packed else None
    assert_same(
        lambda x, w, *b: causal_conv1d(x, w, *(b or [None]), None if ids is None else Documents(ids), silu=False),
        lambda x, w, *b: conv_reference.causal_conv1d(x, w, *(b or [None]), ids, silu=False),
        drawn((2, 9, 3), (3, 4), *([(3,)] if biased else [])),
    )


@pytest.mark.parametrize("silu", [False, True], ids=["alone", "silu"])
@pytest.mark.parametrize("width", [1, 2, 4], ids="K{}".format)
def test_causal_conv1d_goes_on_where_it_stopped(width, silu):
    x, weight, bias = (tensor.detach() for tensor in drawn((2, 9, 3), (3, width), (3,)))
    whole = causal_conv1d(x, weight, bias, silu=silu)
    tail, parts = x.new_zeros(2, width, 3), []
    for part in x.split([4, 1, 1, 3], dim=1):
        y, tail = causal_conv1d_continue(part, weight, bias, tail, silu=silu)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-12, atol=1e-12)
    assert torch.equal(tail, x[:, 9 - width :])


@pytest.mark.parametrize("groups", [1, 4])
def test_norm_before_the_gate(groups):
    def truth(y, z, w):
        parts = y.unflatten(-1, (groups, -1))
        return (parts / (parts.square().mean(-1, keepdim=True) + 1e-5).sqrt()).flatten(-2) * w * z * z.sigmoid()

    assert_same(lambda y, z, w: norm_gated(y, z, w, 1e-5, groups), truth, drawn((2, 3, 8), (2, 3, 8), (8,)))


both_ways = pytest.mark.parametrize("on", [attention, attention_by_torch], ids=["in tiles", "by torch"])


@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4], ids="G{}".format)
@both_ways
def test_attention(kv_heads, packed, on):
    ids = IDS if packed else None
    assert_same(
        lambda q, k, v: on(q, k, v, scale=0.4, documents=None if ids is None else Documents(ids)),
        lambda q, k, v: attention_reference.attention(q, k, v, scale=0.4, documents_BT=ids),
        drawn((2, 9, 4, 6), (2, 9, kv_heads, 6), (2, 9, kv_heads, 6)),
    )


# Windows of a row of 9: those below 4.5 run in blocks; 4 and 2 leave a block that is not full.
@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
@pytest.mark.parametrize("window", [1, 2, 3, 4, 5, 8, 9, 20], ids="W{}".format)
@both_ways
def test_attention_to_a_window(window, packed, on):
    ids = IDS if packed else None
    assert_same(
        lambda q, k, v: on(q, k, v, scale=0.4, window=window, documents=None if ids is None else Documents(ids)),
        lambda q, k, v: attention_reference.attention(q, k, v, scale=0.4, window=window, documents_BT=ids),
        drawn((2, 9, 4, 6), (2, 9, 2, 6), (2, 9, 2, 6)),
    )


@pytest.mark.parametrize("window", [None, 1, 3, 20], ids="W{}".format)
@pytest.mark.parametrize("queries", [1, 2, 7])
def test_attention_of_the_last_positions(queries, window):
    assert_same(
        lambda q, k, v: attention(q, k, v, scale=0.4, window=window),
        lambda q, k, v: attention_reference.attention(q, k, v, scale=0.4, window=window),
        drawn((2, queries, 4, 6), (2, 9, 2, 6), (2, 9, 2, 6)),
    )


@pytest.mark.parametrize("start", [0, 1, 300])
@pytest.mark.parametrize("turned", [None, 2, 4])
def test_rotary(turned, start):
    assert_same(
        lambda x: rotary(x, 100.0, turned=turned, start=start),
        lambda x: rotary_reference.rotary(x, 100.0, turned=turned, start=start),
        drawn((2, 9, 3, 6)),
    )


def test_rotary_scaling_slows_what_turns_slowly():
    scaling = RopeScaling(factor=8.0, low_turns=1.0, high_turns=4.0, original_positions=64)
    plain, scaled = frequencies(32, 10_000.0, None), frequencies(32, 10_000.0, scaling)
    turns = plain * 64 / (2 * math.pi)
    assert torch.equal(scaled[turns >= 4], plain[turns >= 4])
    torch.testing.assert_close(scaled[turns <= 1], plain[turns <= 1] / 8)
    between = (turns > 1) & (turns < 4)
    assert between.any() and (scaled < plain)[between].all() and (scaled > plain / 8)[between].all()


@pytest.mark.parametrize("name", [*GATED, *PLAIN])
def test_mlp_activation(name):
    assert_same(
        lambda x: mlp_activation(x, name), lambda x: activation_reference.mlp_activation(x, name), drawn((2, 3, 10))
    )


@pytest.mark.parametrize("softcap", [None, 0.7], ids=["plain", "softcap"])
@pytest.mark.parametrize("rows", [1, 3, 100], ids="slices of {}".format)
def test_linear_cross_entropy(rows, softcap, monkeypatch):
    monkeypatch.setattr(loss_backend, "SLICE_ELEMENTS", rows * 11)
    hidden, weight = drawn((7, 5), (11, 5))
    labels = torch.tensor([3, -100, 0, 10, 3, -100, 7])
    ours, truth = (
        linear_cross_entropy(hidden, weight, labels, softcap),
        loss_reference.linear_cross_entropy(hidden, weight, labels, softcap),
    )
    torch.testing.assert_close(ours, truth.double(), rtol=1e-6, atol=0)  # the reference takes its softmax in fp32
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, labels, softcap), (hidden, weight))
    assert torch.autograd.gradcheck(lambda h: 3.0 * linear_cross_entropy(h, weight.detach(), labels, softcap), (hidden,))


def test_the_loss_of_a_hopeless_label_is_finite():
    hidden = torch.tensor([[200.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0]])
    loss = linear_cross_entropy(hidden, weight, torch.tensor([1]))
    loss.backward()
    assert loss.item() == 400.0 and hidden.grad is not None and hidden.grad.item() == 2.0


def test_a_batch_of_ignored_labels_has_no_loss_and_no_gradient():
    hidden, weight = drawn((3, 5), (11, 5))
    loss = linear_cross_entropy(hidden, weight, torch.full((3,), -100))
    loss.backward()
    assert loss.item() == 0 and not hidden.grad.any() and not weight.grad.any()


def test_the_loss_keeps_no_logits_for_the_backward_pass():
    kept = []
    hidden, weight = torch.randn(512, 8, requires_grad=True), torch.randn(4096, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        linear_cross_entropy(hidden, weight, torch.zeros(512, dtype=torch.long))
    assert sum(kept) == hidden.numel() + weight.numel()  # the two gradients


def test_bf16_operations_compute_inside_in_fp32():
    x = torch.randn(4, 6, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    taps, bias, ones = torch.randn(16, 4), torch.randn(16), torch.ones(16)
    for low, high in (
        (rms_norm(x, ones, 1e-5), rms_norm(x.float(), ones, 1e-5)),
        (gated_norm(x, x, ones, 1e-5, 1), gated_norm(x.float(), x.float(), ones, 1e-5, 1)),
        (causal_conv1d(x, taps, bias), causal_conv1d(x.float(), taps, bias)),
    ):
        assert low.dtype == torch.bfloat16
        torch.testing.assert_close(low.float(), high, rtol=2**-8, atol=1e-6)  # one rounding, of the output


def test_autocast_runs_the_head_in_bf16_and_the_loss_in_fp32():
    hidden, weight = torch.randn(64, 32, requires_grad=True), torch.randn(100, 32, requires_grad=True)
    labels = torch.arange(64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = linear_cross_entropy(hidden, weight, labels)
    low.backward()
    grads = [hidden.grad.clone(), weight.grad.clone()]
    truth = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels), (hidden, weight))
    assert low.dtype == torch.float32 and math.isclose(
        low.item(), linear_cross_entropy(hidden, weight, labels).item(), rel_tol=1e-2
    )
    for ours, true in zip(grads, truth, strict=True):
        assert ours.dtype == torch.float32
        assert (
            ours - true
        ).norm() < 0.02 * true.norm()  # bf16 keeps 8 bits: 0.4 % a factor, summed over 32 and 64 terms
