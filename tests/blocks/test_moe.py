"""The router: its choices, its losses, and what evens out the loads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from zexp.blocks.context import Context
from zexp.blocks.init import Draw
from zexp.blocks.layer import Place
from zexp.blocks.moe.balance import Groups, sinkhorn_offsets
from zexp.blocks.moe.layer import Layer
from zexp.blocks.moe.spec import Spec
from zexp.blocks.resolve import resolve_model
from zexp.config.errors import ConfigError
from zexp.kernels.documents import Documents
from zexp.model.build import build, decayed
from zexp.train.batches import Batch
from zexp.train.step import backward

WIDTH, VOCAB = 12, 50
BALANCES: dict[str, dict[str, Any]] = {
    "aux": {"aux_loss": 0.1},
    "z": {"aux_loss": 0.001, "z_loss": 0.1},
    "sigmoid aux": {"aux_loss": 0.1, "router": "sigmoid"},
    "sinkhorn": {"aux_loss": 0.0, "sinkhorn_iterations": 5, "router": "sigmoid", "top_k": 1},
    "bias": {"aux_loss": 0.01, "bias_rate": 0.01, "router": "sigmoid"},
}
balances = pytest.mark.parametrize("balance", BALANCES.values(), ids=BALANCES)
groups = pytest.mark.parametrize("group", ["sequence", "document"])


def layer(seed: int = 0, dtype: torch.dtype = torch.float64, **keys: Any) -> Layer:
    spec = Spec(**({"width": 8, "experts": 4} | keys))
    assert spec.problems(WIDTH, "e") == []
    made = Layer(spec.completed(WIDTH), WIDTH, 1e-5, Place(0, 1))
    made.initialise(Draw(torch.Generator().manual_seed(seed), 1))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter *= 20
    return made.to(dtype)


def drawn(batch: int = 3, length: int = 20, skew: float = 0.0) -> Tensor:
    """skew: a direction that all tokens share, so that a router prefers some experts."""
    x = torch.randn(batch, length, WIDTH, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return x + skew


def packed(lengths: list[list[int]]) -> Tensor:
    return torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in lengths])


# ---- what a token is computed with ----


def one_by_one(made: Layer, x: Tensor) -> Tensor:
    """BlackMamba's formula for each token: p = sigmoid(W x + b), the expert of the largest p, times p, where an expert is
    W2 (gelu(a) * b).
    """
    rows = []
    for token in x.flatten(0, 1):
        p = torch.sigmoid(made.router.weight @ token + made.router.bias)
        best = int(p.argmax())
        a, b = (made.up[best] @ token).chunk(2)
        rows.append(p[best] * (made.down[best] @ (torch.nn.functional.gelu(a) * b)))
    return torch.stack(rows).view_as(x)


def test_blackmamba_is_its_formula_with_gradients():
    keys = {"top_k": 1, "router": "sigmoid", "router_bias": True, "activation": "geglu_erf", "aux_loss": 0.0}
    made = layer(**keys, sinkhorn_iterations=9)
    torch.nn.init.normal_(made.router.bias, std=0.3)
    x = drawn().requires_grad_()
    ours, true = made.eval()(x, Context()), one_by_one(made, x)
    torch.testing.assert_close(ours, true)
    dout = torch.randn(true.shape, generator=torch.Generator().manual_seed(1), dtype=true.dtype)
    inputs = (x, *made.parameters())
    for mine, theirs in zip(
        torch.autograd.grad((ours * dout).sum(), inputs), torch.autograd.grad((true * dout).sum(), inputs), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


def test_weights_are_scaled_after_they_are_divided_by_their_sum():
    x = drawn()
    whole = layer(experts=4, top_k=4, activation="relu", routed_scale=2.5, router="sigmoid")
    p = (x @ whole.router.weight.t()).sigmoid()
    weights = 2.5 * p / p.sum(-1, keepdim=True)
    true = sum(weights[..., e, None] * ((x @ whole.up[e].t()).relu() @ whole.down[e].t()) for e in range(4))
    torch.testing.assert_close(whole(x, Context()), true)


def test_a_sigmoid_router_that_is_0_everywhere_gives_no_nan():
    made = layer(router="sigmoid", router_bias=True, dtype=torch.float32)
    torch.nn.init.constant_(made.router.bias, -200.0)
    auxiliary: list[Tensor] = []
    y = made(drawn().float(), Context(auxiliary=auxiliary))
    (y.sum() + auxiliary[0]).backward()
    assert y.isfinite().all() and all(p.grad is None or p.grad.isfinite().all() for p in made.parameters())


def test_the_experts_matrices_are_decayed():
    arch = {"pattern": "e", "width": WIDTH, "blocks": {"e": {"width": 8, "shared_width": 4, "shared_gate": True}}}
    names = decayed(build(resolve_model(arch, VOCAB), seed=None, device="meta"))
    own = {"router.weight", "up", "down", "shared_up.weight", "shared_down.weight", "shared_gate.weight"}
    assert set(names) == {f"layers.0.branches.e.{name}" for name in own}


@pytest.mark.parametrize(
    ("width", "keys", "layers", "total", "active"),
    [
        (1152, {"width": 3072, "top_k": 1, "router_bias": True}, 15, 1_458_462_072, 343_694_712),
        (1472, {"width": 3872, "top_k": 1, "router_bias": True}, 18, 2_783_213_584, 628_770_832),
        (4096, {"width": 14336, "experts": 16}, 16, 51_570_323_328, 12_110_311_296),
    ],
    ids=["BlackMamba-1.5B", "BlackMamba-2.8B", "Jamba"],
)
def test_the_experts_that_a_token_skips_are_those_of_the_published_models(width, keys, layers, total, active):
    spec = Spec(**keys)
    assert layers * (spec.parameters(width) - spec.active_parameters(width)) == total - active


# ---- the losses ----


@groups
def test_the_aux_loss_is_its_formula_in_every_group(group):
    made, x = layer(aux_loss=0.3, routing_group=group), drawn(2, 20)
    ids = packed([[5, 15], [8, 11, 1]])
    auxiliary: list[Tensor] = []
    made(x, Context(Documents(ids), auxiliary))
    expected = 0.0
    for row in range(2):
        for document in ids[row].unique() if group == "document" else [None]:
            tokens = x[row] if document is None else x[row][ids[row] == document]
            p = (tokens @ made.router.weight.t()).softmax(-1)
            chosen = p.topk(2, dim=-1).indices
            share = torch.tensor([float((chosen == e).sum()) for e in range(4)]) / chosen.numel()
            expected += len(tokens) * 0.3 * 4 * (share * p.mean(0)).sum()
    torch.testing.assert_close(auxiliary, [expected])


def test_the_aux_loss_of_a_balanced_router_is_its_coefficient():
    made = layer(aux_loss=0.3)
    torch.nn.init.zeros_(made.router.weight)
    auxiliary: list[Tensor] = []
    made(drawn(), Context(auxiliary=auxiliary))
    torch.testing.assert_close(auxiliary[0].item(), 0.3 * 60)


def test_the_z_loss_is_its_formula():
    made, x = layer(aux_loss=0.0, z_loss=0.2), drawn()
    auxiliary: list[Tensor] = []
    made(x, Context(auxiliary=auxiliary))
    expected = 0.2 * (x @ made.router.weight.t()).exp().sum(-1).log().square().sum()
    torch.testing.assert_close(auxiliary, [expected])


@balances
def test_with_nobody_to_collect_them_no_losses_and_no_loads_are_computed(balance):
    made = layer(**balance)
    made(drawn(), Context())
    assert made._load_E is None
    auxiliary: list[Tensor] = []
    made(drawn(), Context(auxiliary=auxiliary))
    coefficients = [made.spec.aux_loss, made.spec.z_loss]
    assert len(auxiliary) == sum(c > 0 for c in coefficients)
    assert (made._load_E is not None) == (made.spec.bias_rate > 0)


# ---- micro-batches, documents ----

ARCH = {"pattern": "a e a e", "width": 16, "blocks": {"a": {"heads": 2}}}


def model(group: str, **balance: Any) -> Any:
    keys = {"width": 12, "experts": 4, "routing_group": group} | balance
    arch = ARCH | {"blocks": {"a": {"heads": 2}, "e": keys}}
    made = build(resolve_model(arch, VOCAB), seed=0)
    with torch.no_grad():
        for layer in made.layers[1::2]:
            layer.branches["e"].router.weight *= 50  # far from balance
    return made


def batch() -> Batch:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, VOCAB, (4, 33), generator=generator)
    documents = (torch.rand(4, 32, generator=generator) < 0.1).cumsum(1)
    return Batch(tokens[:, :-1], tokens[:, 1:], documents)


@balances
@groups
def test_the_micro_batch_does_not_matter(balance, group):
    whole = model(group, **balance)
    backward(whole, batch(), micro_batch=4, precision="fp32", document_mask=True)
    expected = {name: parameter.grad for name, parameter in whole.named_parameters()}
    largest = max(gradient.abs().max() for gradient in expected.values())
    whole.after_step()
    for micro_batch in (1, 2):
        split = model(group, **balance)
        backward(split, batch(), micro_batch=micro_batch, precision="fp32", document_mask=True)
        for name, parameter in split.named_parameters():
            assert (parameter.grad - expected[name]).abs().max() <= 1e-5 * largest, name
        split.after_step()
        for name, buffer in split.named_buffers():
            assert torch.equal(buffer, whole.get_buffer(name)) and buffer.any(), name


@balances
def test_documents_as_groups_are_separate_in_training_too(balance):
    made = layer(routing_group="document", **balance)
    lengths = [[5, 1, 14], [20], [7, 13]]
    x, ids = drawn(), packed(lengths)
    together: list[Tensor] = []
    y = made(x, Context(Documents(ids), together))
    alone: list[list[Tensor]] = []
    for row, sizes in enumerate(lengths):
        for piece, expected in zip(x[row].split(sizes), y[row].split(sizes), strict=True):
            alone.append([])
            torch.testing.assert_close(made(piece[None], Context(auxiliary=alone[-1]))[0], expected)
    sums = [torch.stack(losses).sum() for losses in zip(*alone, strict=True)]
    torch.testing.assert_close(together, sums)


# ---- Sinkhorn ----


@groups
def test_sinkhorn_evens_out_the_expected_loads_of_every_group(group):
    logits = torch.randn(8, 3 * 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2
    logits[0] += 5
    ids = packed([[20, 30], [50], [10, 15, 25]])
    found = Groups((3, 50), Documents(ids) if group == "document" else None)
    loads = found.sums((logits + sinkhorn_offsets(logits, found, 30)).softmax(0)) / found.sizes
    assert loads.shape == (8, 6 if group == "document" else 3)
    torch.testing.assert_close(loads, torch.full_like(loads, 1 / 8), rtol=1e-2, atol=0)


def test_sinkhorn_survives_a_router_that_is_sure():
    logits = torch.zeros(4, 30)
    logits[0] = 1e4
    offsets = sinkhorn_offsets(logits, Groups((1, 30), None), 5)
    assert offsets.isfinite().all()


def test_sinkhorn_balances_choices_in_training_alone():
    made = layer(top_k=1, router="sigmoid", aux_loss=0.0, sinkhorn_iterations=8)
    x, plain = drawn(1, 400, skew=1.5), layer(top_k=1, router="sigmoid", aux_loss=0.0)

    def worst(train: bool) -> float:
        logits = (x[0] @ made.router.weight.t()).t()
        chosen = made.train(train)._chosen(logits, logits.sigmoid(), Groups((1, 400), None), made.training)
        return torch.bincount(chosen.flatten(), minlength=4).max().item() / 100

    assert worst(train=False) > 1.6 and worst(train=True) < 1.15
    assert torch.equal(made.eval()(x, Context()), plain(x, Context()))
    assert not torch.equal(made.train()(x, Context()), plain(x, Context()))
    assert torch.equal(made.train().decode(x, None, Context()), plain(x, Context()))


# ---- biases of the choice ----


def test_biases_move_by_the_sign_of_the_load_error():
    made = layer(experts=3, top_k=1, router="softmax", bias_rate=0.01, aux_loss=0.0)
    with torch.no_grad():
        made.router.weight.zero_()
        made.router.weight[0] = made.router.weight.new_tensor([1.0] + [0.0] * (WIDTH - 1))
        made.router.weight[1] = -made.router.weight[0]
    x = torch.zeros(1, 6, WIDTH, dtype=torch.float64)
    x[0, :4, 0], x[0, 4:, 0] = 3.0, -3.0  # four tokens for expert 0, two (the mean load) for 1, none for 2
    made(x, Context(auxiliary=[]))
    assert made._load_E.tolist() == [4, 2, 0]
    made.after_step()
    torch.testing.assert_close(made.choice_bias.tolist(), [-0.01, 0.0, 0.01])
    assert made._load_E is None
    made.after_step()
    torch.testing.assert_close(made.choice_bias.tolist(), [-0.01, 0.0, 0.01])


def test_biases_even_out_the_loads_and_change_no_weight():
    made, x = layer(router="sigmoid", bias_rate=0.02, aux_loss=0.0), drawn(4, 50, skew=1.5)

    def loads() -> Tensor:
        made(x, Context(auxiliary=[]))
        return made._load_E

    before = loads().max().item()
    made._load_E = None
    for _ in range(200):
        loads()
        made.after_step()
    assert before > 150 and loads().max().item() < 110, "the mean is 100"
    p = (x[0, :1] @ made.router.weight.t()).sigmoid()
    chosen = (p + made.choice_bias).topk(2).indices
    weights = p.gather(-1, chosen) / p.gather(-1, chosen).sum()
    logits = (x[0, :1] @ made.router.weight.t()).t()
    ours = made._chosen(logits, logits.sigmoid(), Groups((1, 1), None), True)
    torch.testing.assert_close(made._weights(logits.sigmoid(), ours).t(), weights)


def test_evaluation_counts_no_loads():
    made = layer(bias_rate=0.1).eval()
    made(drawn(), Context(auxiliary=[]))
    made.after_step()
    assert not made.choice_bias.any()


# ---- what is refused ----


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ({"top_k": 9}, "there are only 8 experts"),
        ({"top_k": 1, "normalise": True}, "the router would learn nothing"),
        ({"sinkhorn_iterations": 3, "bias_rate": 0.1}, "both say how experts are chosen"),
        ({"shared_gate": True}, "there is no shared expert to gate"),
        ({"aux_loss": -1.0}, "must be 0"),
        ({"routed_scale": 0.0}, "must be above 0"),
        ({"experts": 0}, "at least 1"),
    ],
)
def test_what_cannot_be_is_said(keys, text):
    arch = {"pattern": "e", "width": WIDTH, "blocks": {"e": {"width": 8} | keys}}
    with pytest.raises(ConfigError, match=text):
        resolve_model(arch, VOCAB)


def test_one_choice_is_not_normalised_unless_it_says_so():
    assert Spec(width=8, top_k=1).completed(WIDTH).normalise is False
    assert Spec(width=8, top_k=2).completed(WIDTH).normalise is True


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_logits_and_their_gradients_are_those_of_a_product_in_fp32_and_no_such_copy_of_x_is_kept(dtype):
    made = layer(dtype=torch.float32)
    x = drawn().flatten(0, 1).to(dtype).requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ours = made._logits(x)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    true = made.router.weight.to(exact) @ x.to(exact).t()
    assert ours.dtype == exact and torch.equal(ours, true)
    assert {tensor.data_ptr() for tensor in kept} == {x.data_ptr(), made.router.weight.data_ptr()}
    dlogits = torch.randn(true.shape, generator=torch.Generator().manual_seed(3), dtype=exact)
    mine, others = (torch.autograd.grad((y * dlogits).sum(), (x, made.router.weight)) for y in (ours, true))
    assert [one.dtype for one in mine] == [dtype, torch.float32]
    for one, other in zip(mine, others, strict=True):
        torch.testing.assert_close(one, other)
