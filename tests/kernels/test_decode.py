"""The kernels of decoding against what they stand for: every size of a tail, and what they leave to torch."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from zexp.blocks.resolve import resolve_model
from zexp.kernels import dispatch, select
from zexp.kernels.attention.torch_backend import attention_by_torch
from zexp.kernels.causal_conv1d import torch_backend as conv
from zexp.kernels.cpp.compiler import compiler
from zexp.kernels.decode import cpp_backend, reference, torch_backend
from zexp.kernels.decode.torch_backend import Mamba2Options, Mamba2Weights
from zexp.kernels.ssd import torch_backend as scan
from zexp.model.build import build
from zexp.model.sample import generate

pytestmark = pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler")
# Of the largest number: sums of fp32 in another order; one rounding to bf16 more or less.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp32", "bf16"])


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """The kernel's functions that are called."""
    seen: list[str] = []

    def call(operation, function, *args, **options):
        seen.append(function)
        return real(operation, function, *args, **options)

    real = cpp_backend.call
    monkeypatch.setattr(cpp_backend, "call", call)
    return seen


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def assert_close(ours: torch.Tensor, true: torch.Tensor, dtype: torch.dtype) -> None:
    assert ours.shape == true.shape
    assert (ours.double() - true.double()).abs().max() <= TOLERANCE[dtype] * true.abs().max()


@dtypes
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 256, 1160), (1, 1, 1), (2, 37, 6), (4, 64, 9), (3, 130, 1031)])
def test_a_few_rows_times_a_matrix(rows, inputs, outputs, bias, dtype, calls):
    x, weight = random(rows, 1, inputs, dtype=dtype), random(outputs, inputs, dtype=dtype)
    b = random(outputs, dtype=dtype) if bias else None
    true = reference.linear(x.double(), weight.double(), None if b is None else b.double())
    assert_close(cpp_backend.linear(x, weight, b), true, dtype)
    assert_close(cpp_backend.linear(x.transpose(0, 1), weight, b), true.transpose(0, 1), dtype)
    assert calls == ["linear"] * 2


def test_many_rows_gradients_and_other_numbers_are_torchs(calls):
    x, weight = random(2, 8), random(3, 8)
    cpp_backend.linear(random(5, 8), weight)
    cpp_backend.linear(x.double(), weight.double())
    cpp_backend.linear(x, random(8, 3).t())
    with torch.autocast("cpu", torch.bfloat16):
        assert cpp_backend.linear(x, weight).dtype == torch.bfloat16
    with torch.enable_grad():
        weight.requires_grad_()
        assert cpp_backend.linear(x, weight).requires_grad
    assert calls == []


@dtypes
@pytest.mark.parametrize("window", [None, 1, 5, 300])
@pytest.mark.parametrize(("heads", "groups", "width"), [(8, 8, 64), (4, 2, 16), (3, 1, 5)])
@pytest.mark.parametrize("keys", [1, 3, 4, 255, 256, 257, 515])
def test_one_query_against_the_cache(keys, heads, groups, width, window, dtype, calls):
    q = random(2, 1, heads, width, dtype=dtype)
    room = [random(2, 600, groups, width, dtype=dtype, seed=seed) for seed in (1, 2)]
    k, v = (tensor[:, :keys] for tensor in room)
    ours = cpp_backend.attention_continue(q, k, v, scale=width**-0.5, window=window)
    doubles = [tensor.double() for tensor in (q, k, v)]
    assert_close(ours, attention_by_torch(*doubles, scale=width**-0.5, window=window), dtype)
    assert calls == ["attend"]


def test_scores_that_overflow_a_plain_exponential_are_no_trouble():
    q, k, v = 100 * random(1, 1, 2, 8), 100 * random(1, 700, 2, 8), random(1, 700, 2, 8)
    ours = cpp_backend.attention_continue(q, k, v, scale=1.0)
    assert_close(ours, attention_by_torch(q.double(), k.double(), v.double(), scale=1.0), torch.float32)


@dtypes
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("channels", "width"), [(640, 4), (7, 3), (5, 1)])
@pytest.mark.parametrize("length", [1, 2, 9])
def test_a_convolution_goes_on(length, channels, width, bias, silu, dtype):
    x = random(2, length, 2 * channels, dtype=dtype)[..., :channels]
    weight, b = random(channels, width), random(channels) if bias else None
    tail = random(2, width, channels, dtype=dtype, seed=1)
    before = tail.clone()
    y, after = cpp_backend.causal_conv1d_continue(x, weight, b, tail, silu=silu)
    true, last = conv.causal_conv1d_continue(
        x.double(), weight.double(), None if b is None else b.double(), tail.double(), silu=silu
    )
    assert_close(y, true, dtype)
    assert y.dtype == dtype and torch.equal(after.double(), last) and torch.equal(tail, before)


@dtypes
@pytest.mark.parametrize(("heads", "width", "groups", "size"), [(8, 64, 1, 64), (4, 5, 2, 3), (2, 1, 2, 1)])
@pytest.mark.parametrize("length", [1, 3, 16, 37])
def test_a_state_goes_on(length, heads, width, groups, size, dtype):
    x = random(2, length, heads * width + 2 * groups * size, dtype=dtype)
    x, b, c = x.split((heads * width, groups * size, groups * size), dim=-1)
    x, b, c = x.unflatten(-1, (heads, width)), b.unflatten(-1, (groups, size)), c.unflatten(-1, (groups, size))
    dt, a, d = random(2, length, heads).exp() / 4, -random(heads).exp(), random(heads, seed=1)
    state = random(2, groups, size, heads // groups * width, seed=2)
    before = state.clone()
    y, after = cpp_backend.ssd_continue(x, dt, a, b, c, d, state, chunk=16)
    doubles = [tensor.double() for tensor in (x, dt, a, b, c, d, state)]
    true, last = scan.ssd_continue(*doubles, chunk=16)
    assert_close(y, true, dtype)
    assert_close(after, last, dtype)
    assert y.dtype == dtype and after.dtype == torch.float32 and torch.equal(state, before)


MAMBA2 = [  # heads, head width, groups, state size, conv width
    (8, 64, 1, 64, 4),
    (4, 5, 2, 3, 3),
    (2, 7, 2, 1, 1),
    (24, 16, 3, 128, 4),
]
IN_CPP = dispatch.decoding(dispatch.TORCH, {name: select.Choice(select.CPP) for name in ("ssd", "causal_conv1d", "gated_norm")}, "cpu")
PLAIN = Mamba2Options(eps=1e-5, chunk=16, dt_min=None, dt_max=None, norm_before_gate=False)


def mamba2_inputs(heads, width, groups, size, conv_width, *, length=1, dtype=torch.float32):
    """What comes from the first product (as a part of a wider array), the weights, and both memories."""
    inner, channels = heads * width, heads * width + 2 * groups * size
    projected = random(2, length, inner + channels + heads + 3, dtype=dtype)[..., :-3]
    weights = [
        random(channels, conv_width), random(channels), random(heads) - 1, random(heads, seed=1), random(heads, seed=2), random(inner)
    ]  # fmt: skip
    conv, state = random(2, conv_width, channels, dtype=dtype), random(2, groups, size, heads // groups * width, seed=3)
    return projected, Mamba2Weights(*(weight.to(dtype) for weight in weights)), conv, state


@dtypes
@pytest.mark.parametrize("norm_before_gate", [False, True])
@pytest.mark.parametrize("clamps", [(None, None), (0.2, None), (None, 0.5), (0.2, 0.5)], ids=str)
@pytest.mark.parametrize("sizes", MAMBA2, ids=str)
@pytest.mark.parametrize("length", [1, 2, 37])
def test_mamba2_goes_on_in_place_and_the_torch_form_with_it(length, sizes, clamps, norm_before_gate, dtype, calls):
    options = Mamba2Options(1e-5, 16, *clamps, norm_before_gate)
    projected, weights, conv, state = mamba2_inputs(*sizes, length=length, dtype=dtype)
    doubles = projected.double(), Mamba2Weights(*(weight.double() for weight in weights)), conv.double(), state.double()
    wanted = reference.mamba2_continue(*doubles, options)
    for kernels in (IN_CPP, dispatch.TORCH):
        own_conv, own_state = conv.clone(), state.clone()
        y = kernels.mamba2_continue(projected, weights, own_conv, own_state, options, kernels)
        assert y.dtype == dtype and own_conv.dtype == dtype and own_state.dtype == torch.float32
        for found, true in zip((y, own_conv, own_state), wanted, strict=True):
            assert_close(found, true, dtype)
    assert calls == (["mamba2"] if length == 1 else [])


def test_mamba2_in_numbers_that_the_kernel_does_not_take(calls):
    projected, weights, conv, state = mamba2_inputs(*MAMBA2[1])
    doubles = Mamba2Weights(*(weight.double() for weight in weights))
    wanted = reference.mamba2_continue(projected.double(), doubles, conv.double(), state.double(), PLAIN)
    turned = conv.transpose(1, 2).contiguous().transpose(1, 2)
    cases = {
        "fp64": (projected.double(), doubles, conv.double(), state.double()),
        "products in bf16, as under autocast": (projected.bfloat16(), weights, conv.clone(), state.clone()),
        "a memory of other strides": (projected, weights, turned, state.clone()),
    }
    for name, given in cases.items():
        y = IN_CPP.mamba2_continue(*given, PLAIN, IN_CPP)
        assert y.dtype == given[0].dtype, name
        for found, true in zip((y, given[2], given[3]), wanted, strict=True):
            assert_close(found, true, torch.bfloat16 if "bf16" in name else torch.float32)
    assert "mamba2" not in calls


def test_what_mamba2_is_made_of_are_the_kernels_that_the_model_was_given():
    called: list[str] = []

    def noted(name):
        return lambda *args, **keys: (called.append(name), getattr(dispatch.TORCH, name)(*args, **keys))[1]

    for norm in ("gated_norm", "norm_gated"):
        called.clear()
        names = ("causal_conv1d_continue", "ssd_continue", norm)
        kernels = replace(dispatch.TORCH, **{name: noted(name) for name in names})
        options = PLAIN._replace(norm_before_gate=norm == "norm_gated")
        kernels.mamba2_continue(*mamba2_inputs(*MAMBA2[1]), options, kernels)
        assert called == list(names)


def test_steps_of_mamba2_that_are_large_stay_what_they_are():
    """softplus(x) is x where e^x is infinite in fp32."""
    projected, weights, conv, state = mamba2_inputs(*MAMBA2[1])
    projected[..., -4:] = torch.tensor([90.0, 1e4, -90.0, 20.0])
    doubles = projected.double(), Mamba2Weights(*(weight.double() for weight in weights)), conv.double(), state.double()
    dispatch.TORCH.mamba2_continue(*doubles, PLAIN, dispatch.TORCH)
    y = IN_CPP.mamba2_continue(projected, weights, conv, state, PLAIN, IN_CPP)
    assert y.isfinite().all()
    assert_close(state, doubles[3], torch.float32)


def test_bits_do_not_depend_on_the_threads():
    weight, x = random(4096, 1024), random(1, 1, 1024)
    q, k, v = random(2, 1, 8, 64), random(2, 1100, 8, 64), random(2, 1100, 8, 64, seed=1)
    projected, weights, conv, state = mamba2_inputs(40, 64, 1, 128, 4)  # its state is more than one thread takes alone
    results = []
    try:
        threads = torch.get_num_threads()
        for count in (1, 3):
            torch.set_num_threads(count)
            own_state = state.clone()
            y = IN_CPP.mamba2_continue(projected, weights, conv.clone(), own_state, PLAIN, IN_CPP)
            attended = cpp_backend.attention_continue(q, k, v, scale=0.1)
            results.append((cpp_backend.linear(x, weight), attended, y, own_state))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


ARCH = {
    "width": 32,
    "pattern": "m gm w d c",
    "blocks": {
        "m": {"state_size": 8, "head_dim": 8, "chunk": 4},
        "g": {"heads": 4, "mlp_width": 24, "lora_rank": {"mlp": 2}},
        "w": {"heads": 4, "window": 5},
        "d": {"width": 44},
        "c": {},
    },
}


@dtypes
def test_a_model_decodes_as_its_full_forward(dtype, calls):
    """In fp32 and bf16, which the contract's fp64 does not reach."""
    model = build(resolve_model(ARCH, 50), seed=0).to(dtype).eval()
    tokens = torch.randint(0, 50, (2, 40), generator=torch.Generator().manual_seed(0))
    cache = model.new_cache(2)
    edges = [0, 17, 18, 24, *range(25, 41)]
    parts = [model.decode(tokens[:, a:b], cache) for a, b in itertools.pairwise(edges)]
    # Each layer rounds its numbers to bf16 in another order.
    allowed = {torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]
    assert (torch.cat(parts, dim=1).double() - model(tokens).double()).abs().max() < allowed * 4
    assert set(calls) == {"linear", "attend", "convolve", "mamba2"}


def test_torch_means_torch_and_a_kernel_follows_the_choice_of_its_operations():
    assert build(resolve_model(ARCH, 50), seed=0, kernels="torch").kernels is dispatch.TORCH
    kernels = dispatch.decoding(dispatch.TORCH, {}, "cpu")
    assert kernels.linear is cpp_backend.linear and kernels.ssd_continue is scan.ssd_continue, "a scan that was not chosen"
    some = {name: select.Choice(select.CPP) for name in ("ssd", "causal_conv1d")}
    assert dispatch.decoding(dispatch.TORCH, some, "cpu").mamba2_continue is torch_backend.mamba2_continue


@pytest.fixture
def library(monkeypatch):
    """Puts a function in the place of the one that compiles."""
    yield lambda function: (monkeypatch.setattr(cpp_backend, "library", function), cpp_backend._compiled.cache_clear())
    cpp_backend._compiled.cache_clear()


def test_a_library_that_cannot_be_had_leaves_decoding_to_torch(library, calls, caplog):
    def broken(operation):
        raise RuntimeError("no header")

    library(broken)
    model = build(resolve_model(ARCH, 50), seed=0).eval()
    options = {"tokens": 5, "temperature": 0, "top_p": 1.0, "seed": 0, "eod_id": -1}
    assert len(list(generate(model, [3, 1, 4], **options))) == 5 and calls == []
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        "Kernels: decoding stays with torch: no header"
    ]


def test_a_training_does_not_compile_what_decodes(library):
    library(lambda operation: pytest.fail("compiled"))
    model = build(resolve_model(ARCH, 50), seed=0)
    with torch.enable_grad():
        tokens = torch.zeros(1, 8, dtype=torch.int64)
        model.loss_sum(model(tokens), tokens).backward()
    with torch.no_grad():
        model.eval().loss_sum(model(tokens), tokens)


def test_the_text_is_that_of_torch():
    models = [build(resolve_model(ARCH, 50), seed=0, kernels=kernels) for kernels in ("auto", "torch")]
    options = {"tokens": 40, "temperature": 0, "top_p": 1.0, "seed": 0, "eod_id": -1}
    with torch.no_grad():
        for model in models:
            for parameter in model.parameters():
                parameter.mul_(3)  # initial weights give nearly equal logits
    ours, theirs = (list(generate(model.eval(), [3, 1, 4], **options)) for model in models)
    assert ours == theirs and len(set(ours)) > 4
