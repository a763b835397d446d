"""The kernels in C++: against the references, in any layout, at extremes, and how they are compiled."""

from __future__ import annotations

import stat

import pytest
import torch

from zexp.blocks.resolve import numerics, resolve_model
from zexp.kernels import dispatch, samples, select, selfcheck
from zexp.kernels.cpp import compiler, library
from zexp.kernels.documents import Documents
from zexp.kernels.fused import adapter
from zexp.kernels.select import CPP, Choice
from zexp.model.build import build

pytestmark = pytest.mark.skipif(compiler.compiler() is None, reason="needs a C++ compiler")

CPU = torch.device("cpu")
TYPES = (torch.float32, torch.bfloat16)
FUNCTIONS = [(operation, name) for operation in select.IN_CPP for name in dispatch.functions_of(operation)]
WITHOUT_PRODUCTS = [pair for pair in FUNCTIONS if pair[0] in ("activation", "causal_conv1d", "gated_norm", "rms_norm", "rotary")]


def function_of(operation: str, name: str):
    return adapter(operation, CPP.adapter())[name].run


def results(function, one, given):
    """The values, and the gradients of everything that wants one."""
    made = one.call(function, given, CPU)
    weights = torch.randn(made.shape, generator=torch.Generator().manual_seed(1)).to(made.dtype)
    wanting = [tensor for tensor in given.values() if tensor is not None and tensor.requires_grad]
    return [made.detach(), *torch.autograd.grad(made, wanting, weights)]


@pytest.mark.parametrize("operation", select.IN_CPP)
def test_values_and_gradients_agree_with_the_references(operation):
    assert selfcheck.examine(operation, CPP, CPU) is None


@pytest.mark.parametrize("operation, name", FUNCTIONS)
def test_fp32_is_as_exact_as_the_torch_backend(operation, name):
    ours = selfcheck.measure(name, function_of(operation, name), CPU, torch.float32)
    torchs = selfcheck.measure(name, getattr(dispatch.TORCH, name), CPU, torch.float32)
    assert ours.value <= 3 * torchs.value + 1e-7 and ours.gradient <= 3 * torchs.gradient + 1e-7


@pytest.mark.parametrize("operation, name", WITHOUT_PRODUCTS)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_the_last_bits_do_not_depend_on_the_number_of_threads(operation, name, dtype):
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            one = samples.sample(name, samples.CHECKED[name][0])
            found.append(results(function_of(operation, name), one, one.given(CPU, dtype)))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("operation, name", FUNCTIONS)
def test_views_of_a_wider_array_give_the_same_bits(operation, name, dtype):
    """What layers pass are slices of a projection, and gradients come back as they please."""
    one = samples.sample(name, samples.CHECKED[name][0])
    plain = one.given(CPU, dtype)
    views = {}
    for key, tensor in plain.items():
        views[key] = tensor
        if tensor is not None and tensor.requires_grad and key not in one.whole:
            wider = torch.cat((torch.full_like(tensor, 7.0), tensor.detach()), dim=-1)
            views[key] = wider[..., tensor.shape[-1] :].requires_grad_()
            assert not views[key].is_contiguous()
    function = function_of(operation, name)
    for wanted, found in zip(results(function, one, plain), results(function, one, views), strict=True):
        assert torch.equal(wanted, found)


@pytest.mark.parametrize("operation, name", FUNCTIONS)
def test_double_precision_is_refused(operation, name):
    one = samples.sample(name, samples.CHECKED[name][0])
    refuses = adapter(operation, CPP.adapter())[name].refuses
    assert "float64" in one.call(refuses, one.given(CPU, torch.float64), CPU)


def ssd_inputs(dtype, dt_scale, length=150):
    generator = torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    dt = torch.rand(2, length, 4, generator=generator) * dt_scale
    x, b, c = (draw(2, length, *shape).to(dtype).requires_grad_() for shape in ((4, 16), (2, 8), (2, 8)))
    return x, dt.requires_grad_(), (-draw(4).exp()).requires_grad_(), b, c, draw(4).requires_grad_()


@pytest.mark.parametrize("dt_scale", [1e-30, 1e-3, 30.0, 1e4, 1e30])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_ssd_stands_every_decay(dtype, dt_scale):
    """States that decay to nothing within a position, or not at all over many chunks: finite, and those of the reference."""
    from zexp.kernels.ssd.reference import ssd as reference

    inputs = ssd_inputs(dtype, dt_scale)
    y = function_of("ssd", "ssd")(*inputs, chunk=32)
    truth_inputs = [tensor.detach().double().requires_grad_() for tensor in inputs]
    truth = reference(*truth_inputs)
    truth = truth[0] if isinstance(truth, tuple) else truth
    tolerance = selfcheck.TOLERANCES[dtype]
    assert (y.double() - truth).norm() <= tolerance.value * truth.norm()
    if dt_scale > 1e20:
        return
    grads = torch.autograd.grad(y.sum(), inputs)
    wanted = torch.autograd.grad(truth.sum(), truth_inputs)
    for number, (ours, theirs) in enumerate(zip(grads, wanted, strict=True)):
        assert torch.isfinite(ours).all()
        if dt_scale > 100 and number == 2:  # a's is dt times a difference that rounds to more than it is
            continue
        assert (ours.double() - theirs).norm() <= 2 * tolerance.gradient * theirs.norm() + 1e-6, number


@pytest.mark.parametrize("chunk", [1, 7, 16, 64, 256])
def test_ssd_does_not_depend_on_the_chunk(chunk):
    inputs = ssd_inputs(torch.float32, 0.3)
    ids = torch.tensor([[0] * 70 + [1] * 80, [0] * 3 + [5] * 1 + [6] * 146])
    function = function_of("ssd", "ssd")
    found = function(*inputs, chunk=chunk, documents=Documents(ids))
    wanted = dispatch.TORCH.ssd(*inputs, chunk=50, documents=Documents(ids))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_an_exponential_is_one_over_its_whole_range():
    """vector.h's exp through silu, the one function that shows it: against fp64, to the ends of what fp32 can hold."""
    x = torch.cat((torch.linspace(-87, 88, 200_001), torch.tensor([-1e30, -200.0, -87.5, 0.0, 88.6, 200.0, 1e30])))
    found = function_of("activation", "mlp_activation")(x, "silu").double()
    wanted = x.double() * torch.sigmoid(x.double())
    assert ((found - wanted).abs() <= 3e-7 * wanted.abs() + 1e-36).all()


@pytest.mark.parametrize("name", ["silu", "gelu_erf", "gelu_tanh", "relu", "relu2"])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_nan_stays_nan_in_activations(name, dtype):
    x = torch.full((3, 16), float("nan"), dtype=dtype)
    assert function_of("activation", "mlp_activation")(x, name).isnan().all()


@pytest.mark.parametrize("name", ["silu", "gelu_erf", "gelu_tanh", "relu"])
def test_slopes_of_activations_end_in_0_and_1_however_large_x_is(name):
    x = torch.tensor([-1e30, -1e20, -100.0, 100.0, 1e20, 1e30], requires_grad=True)
    (dx,) = torch.autograd.grad(function_of("activation", "mlp_activation")(x, name).sum(), x)
    assert torch.equal(dx, torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0, 1.0]))


def test_a_diverged_row_is_seen_in_the_loss_and_in_norms():
    hidden = torch.randn(4, 8)
    hidden[2, 3] = float("nan")
    loss = function_of("cross_entropy", "linear_cross_entropy")(hidden, torch.randn(16, 8), torch.tensor([1, 2, 3, 4]))
    assert loss.isnan()
    assert function_of("rms_norm", "rms_norm")(hidden, torch.ones(8), 1e-5)[2].isnan().all()


def test_a_label_beyond_the_vocabulary_is_an_error_and_no_read_beyond_the_array():
    with pytest.raises(IndexError, match="a label is none of 16 tokens: 3 to 16"):
        function_of("cross_entropy", "linear_cross_entropy")(torch.randn(2, 8), torch.randn(16, 8), torch.tensor([3, 16]))


def test_no_gradient_comes_of_a_gradient():
    x = torch.randn(3, 8, requires_grad=True)
    y = function_of("activation", "mlp_activation")(x, "silu")
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


ARCHS = {
    "m": {"pattern": "2*m", "blocks": {"m": {"state_size": 16, "head_dim": 16, "groups": 2, "chunk": 16}}},
    "m, norm first": {"pattern": "2*m", "blocks": {"m": {"state_size": 16, "head_dim": 16, "norm_before_gate": True}}},
    "r": {"pattern": "2*r", "blocks": {"r": {}}},
    "a e": {"pattern": "a e", "blocks": {"a": {"heads": 2}, "e": {"experts": 4, "top_k": 2, "width": 40}}},
    "a d": {"pattern": "a d", "blocks": {"a": {"heads": 2}, "d": {"width": 64}}},
    "g": {"pattern": "m gm", "blocks": {"m": {"state_size": 16, "head_dim": 16}, "g": {"heads": 4, "mlp_width": 64}}},
}  # fmt: skip


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("arch", ARCHS)
def test_a_model_trains_on_them_as_on_torch(arch, precision):
    """Loss and gradients with packed documents, through the modules that a training calls; nothing falls back to torch."""
    semantic = resolve_model({"width": 64, **ARCHS[arch]}, 96)
    operations = [name for name in select.operations_of(numerics(semantic)) if name in select.IN_CPP]
    kernels = dispatch.kernels_of({name: Choice(CPP) for name in operations})
    tokens = torch.randint(96, (2, 41), generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[0] * 17 + [1] * 24, [4] * 30 + [9] * 11])
    found = {}
    for name, these in (("torch", dispatch.TORCH), ("cpp", kernels)):
        model = build(semantic, seed=0, kernels="torch")
        dispatch.use(model, these)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = model.loss_sum(model(tokens[:, :-1], ids[:, :-1]), tokens[:, 1:]) / 80
        loss.backward()
        found[name] = (loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    exact = precision == "fp32"
    assert found["cpp"][0] == pytest.approx(found["torch"][0], rel=1e-5 if exact else 2e-3)
    distance = (found["cpp"][1] - found["torch"][1]).norm() / found["torch"][1].norm()
    assert distance < (1e-4 if exact else 0.03)
    for operation in operations:
        for function in dispatch.functions_of(operation):
            assert not getattr(kernels, function)._said, "a call of a training was refused"


def test_build_takes_them_where_there_is_a_compiler(monkeypatch):
    semantic = resolve_model({"width": 64, **ARCHS["m"]}, 96)
    taken = {module.kernels.ssd for module in build(semantic, seed=0).modules() if hasattr(module, "kernels")}
    assert all(isinstance(function, dispatch.OnBackend) for function in taken) and taken
    monkeypatch.setattr(select, "compiler", lambda: None)
    taken = {module.kernels.ssd for module in build(semantic, seed=0).modules() if hasattr(module, "kernels")}
    assert taken == {dispatch.TORCH.ssd}


@pytest.fixture
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    library.library.cache_clear()
    yield tmp_path / "cache"
    library.library.cache_clear()


def test_a_library_is_compiled_once_and_kept_under_what_decides_its_code(own_cache, monkeypatch):
    library.library("rms_norm")
    (first,) = (own_cache / "zexp" / "kernels").iterdir()
    made = first.stat().st_mtime_ns
    library.library.cache_clear()
    library.library("rms_norm")
    assert first.stat().st_mtime_ns == made
    monkeypatch.setattr(library, "identity", lambda: "another processor")
    library.library.cache_clear()
    library.library("rms_norm")
    assert len(list((own_cache / "zexp" / "kernels").iterdir())) == 2


def test_a_compiler_that_does_not_run_is_none(monkeypatch, tmp_path):
    stub = tmp_path / "stub"
    stub.write_text("#!/bin/sh\necho 'no tools are installed' >&2\nexit 1\n")
    stub.chmod(stub.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(stub))
    assert compiler.compiler() is None
    assert dispatch.chosen("auto", ["rms_norm"], "cpu", deterministic=True)["rms_norm"].name == "torch"


def test_a_compiler_that_fails_leaves_the_operation_to_torch_and_is_quoted(own_cache, monkeypatch, tmp_path):
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\n[ \"$1\" = --version ] && { echo broken 1.0; exit 0; }\necho 'no vectors here' >&2\nexit 1\n")
    broken.chmod(broken.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setattr(selfcheck, "_passed", set())
    choice = dispatch.chosen("auto", ["rms_norm"], "cpu", deterministic=True)["rms_norm"]
    assert choice.name == "torch"
    ((name, reason),) = choice.passed_over
    assert name == "cpp" and "cannot compile rms_norm's kernel.cpp: no vectors here" in reason
    assert list((own_cache / "zexp" / "kernels").iterdir()) == []


WRONG = {
    "rms_norm": (torch.ones(3, 8), torch.ones(4), 1e-5),
    "gated_norm": (torch.ones(3, 8), torch.ones(3, 8), torch.ones(8), 1e-5, 3),
    "norm_gated": (torch.ones(3, 8), torch.ones(3, 4), torch.ones(8), 1e-5, 1),
    "mlp_activation": (torch.ones(3, 7), "swiglu"),
    "gated": (torch.ones(3, 7), "silu"),
    "linear_cross_entropy": (torch.ones(3, 8), torch.ones(5, 8), torch.zeros(2, dtype=torch.int64)),
}


@pytest.mark.parametrize("name", WRONG)
def test_sizes_that_do_not_fit_are_refused_as_torch_refuses_them(name):
    operation = {"norm_gated": "gated_norm", "mlp_activation": "activation", "gated": "activation", "linear_cross_entropy": "cross_entropy"}.get(name, name)
    kernels = dispatch.kernels_of({operation: select.Choice(select.CPP)})
    with pytest.raises((RuntimeError, ValueError, IndexError)):
        getattr(kernels, name)(*WRONG[name])


def test_labels_of_other_integers_count_and_negative_ones_are_none():
    hidden, weight = torch.randn(6, 8), torch.randn(5, 8)
    labels = torch.tensor([0, 4, -100, 2, 1, -100])
    kernels = dispatch.kernels_of({"cross_entropy": select.Choice(select.CPP)})
    wanted = dispatch.TORCH.linear_cross_entropy(hidden, weight, labels)
    for dtype in (torch.int64, torch.int32, torch.int16):
        torch.testing.assert_close(kernels.linear_cross_entropy(hidden, weight, labels.to(dtype)), wanted)
    for wrong in (-1, 5):
        with pytest.raises(IndexError, match="a label is none of 5 tokens"):
            kernels.linear_cross_entropy(hidden, weight, labels.where(labels != 4, wrong))
