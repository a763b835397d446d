"""Adapters of fused kernels: layouts, boundaries and dtypes, with stand-ins that compute in the packages' own layouts."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from tests.kernels import fakes
from zexp.blocks.resolve import resolve_model
from zexp.kernels import dispatch, samples, select, selfcheck
from zexp.kernels.documents import Documents
from zexp.kernels.fused import adapter, extent
from zexp.kernels.select import Choice
from zexp.model.build import build

PAIRS = [(operation, backend) for operation, row in select.BACKENDS.items() for backend in row]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def packages(monkeypatch):
    fakes.install(monkeypatch)
    # The CPU has no cuDNN, and its flash kernel takes no grouped heads.
    monkeypatch.setattr("torch.nn.attention.sdpa_kernel", lambda kinds, set_priority=False: nullcontext())


def functions():
    return [(operation, backend, name) for operation, backend in PAIRS for name in dispatch.functions_of(operation)]


@pytest.mark.parametrize(("operation", "backend"), PAIRS, ids=lambda x: getattr(x, "name", x))
def test_the_adapter_makes_the_package_compute_the_operation(operation, backend):
    assert selfcheck.examine(operation, backend, CPU) is None


@pytest.mark.parametrize(("operation", "backend", "name"), functions(), ids=lambda x: getattr(x, "name", x))
def test_no_shape_of_the_check_is_left_to_torch_in_bf16(operation, backend, name):
    fused = adapter(operation, backend.adapter())[name]
    for size in samples.CHECKED[name]:
        one = samples.sample(name, size)
        assert one.call(fused.refuses, one.given("cpu", torch.bfloat16), "cpu") is None, size


def test_what_is_computed_wrong_does_not_pass(monkeypatch):
    wrong = {
        "boundaries": lambda *args, seq_idx=None, **options: fakes.mamba_chunk_scan_combined(*args, **options),
        "B for C": lambda x, dt, A, B, C, chunk, **options: fakes.mamba_chunk_scan_combined(x, dt, A, C, B, chunk, **options),
        "no D": lambda *args, D=None, **options: fakes.mamba_chunk_scan_combined(*args, **options),
        "NaN": lambda x, *args, **options: x * float("nan"),
        "error": lambda *args, **options: 1 / 0,
    }
    backend = select.BACKENDS["ssd"][0]
    import mamba_ssm.ops.triton.ssd_combined as package

    said = {}
    for name, function in wrong.items():
        monkeypatch.setattr(package, "mamba_chunk_scan_combined", function)
        said[name] = selfcheck.examine("ssd", backend, CPU)
    assert all(said.values())
    assert "values are off by" in said["boundaries"] and "raises on bfloat16: ZeroDivisionError" in said["error"]


def test_wrong_gradients_do_not_pass(monkeypatch):
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dx):
            return 1.1 * dx

    right = fakes.LigerRMSNormFunction.apply
    monkeypatch.setattr(fakes.LigerRMSNormFunction, "apply", lambda *args: Wrong.apply(right(*args)))
    assert "gradients are off by" in selfcheck.examine("rms_norm", select.BACKENDS["rms_norm"][0], CPU)


def test_a_package_that_does_not_import_is_told():
    import mamba_ssm.ops.triton.ssd_combined as package

    del package.mamba_chunk_scan_combined
    assert "does not import: ImportError" in selfcheck.examine("ssd", select.BACKENDS["ssd"][0], CPU)


def test_a_long_step_forgets_the_document_before_exactly():
    """Whatever stands in the first document, the second's outputs have the same bits, and send no gradient to it."""
    run = adapter("selective_scan", "mamba_ssm")["selective_scan"].run
    one = samples.sample("selective_scan", {"b": 1, "t": 20, "i": 8, "h": 1, "n": 4, "documents": (9, 11)})
    outs = []
    for factor in (1.0, 1e4):
        given = one.given("cpu", torch.float32)
        with torch.no_grad():
            given["x"][:, :9] *= factor
            given["dt"][:, :9] *= 1e-3  # what is written fades slowly
        y = one.call(run, given, "cpu")
        outs.append(y[:, 9:])
        (dx,) = torch.autograd.grad(outs[-1].sum(), given["x"])
        assert not dx[:, :9].any() and dx[:, 9:].any()
    assert torch.equal(*outs)


@pytest.mark.parametrize("slowest", [1e-3, 1e-12])
def test_a_long_step_is_long_enough_for_slow_rates_too(slowest):
    run = adapter("selective_scan", "mamba_ssm")["selective_scan"].run
    one = samples.sample("selective_scan", {"b": 2, "t": 20, "i": 8, "h": 2, "n": 4, "documents": (9, 11)})
    one.tensors["a"][:, 0] = -slowest
    given = one.given("cpu", torch.float32)
    wanted = one.truth("selective_scan", given)
    torch.testing.assert_close(one.call(run, given, "cpu"), wanted, rtol=1e-4, atol=1e-5)


REFUSED = [
    ("attention", "flash_attn", {"b": 1, "t": 8, "h": 1, "g": 1, "p": 512}, torch.bfloat16, "heads of 512 channels"),
    ("attention", "flash_attn", {"b": 1, "t": 8, "h": 1, "g": 1, "p": 64}, torch.float32, "inputs in float32"),
    ("attention", "torch_flash", {"b": 1, "t": 8, "h": 1, "g": 1, "p": 12}, torch.bfloat16, "multiples of 8"),
    ("causal_conv1d", "causal_conv1d", {"b": 1, "t": 8, "c": 8, "k": 5}, torch.bfloat16, "takes 2 to 4"),
    ("causal_conv1d", "causal_conv1d", {"b": 1, "t": 8, "c": 12, "k": 4}, torch.bfloat16, "12 channels"),
    ("causal_conv1d", "flash_linear_attention", {"b": 1, "t": 8, "c": 8, "k": 4}, torch.float64, "float64"),
    ("gated_delta", "flash_linear_attention", {"b": 1, "t": 8, "g": 1, "n": 512, "h": 1, "p": 8}, torch.bfloat16, "512"),
    ("retention", "flash_linear_attention", {"b": 1, "t": 8, "h": 1, "n": 8, "p": 8}, torch.float32, "inputs in float32"),
    ("rms_norm", "liger_kernel", {"m": 1, "d": 40000}, torch.bfloat16, "rows of 80000 bytes"),
    ("gated_norm", "mamba_ssm", {"m": 1, "d": 40000, "groups": 1}, torch.bfloat16, "rows of 80000 bytes"),
    ("selective_scan", "mamba_ssm", {"b": 1, "t": 8, "i": 4, "h": 1, "n": 512}, torch.bfloat16, "a state of 512"),
    ("ssd", "mamba_ssm", {"b": 1, "t": 8, "h": 2, "p": 8, "g": 1, "n": 8}, torch.float32, "inputs in float32"),
    ("wkv7", "flash_linear_attention", {"b": 1, "t": 8, "h": 1, "n": 8}, torch.float32, "inputs in float32"),
]


@pytest.mark.parametrize(("operation", "backend", "size", "dtype", "says"), REFUSED)
def test_calls_that_a_kernel_cannot_take_are_refused(operation, backend, size, dtype, says):
    fused = adapter(operation, backend)[dispatch.functions_of(operation)[0]]
    one = samples.sample(dispatch.functions_of(operation)[0], size)
    given = one.given("cpu", dtype) if dtype != torch.float64 else {k: v.double() for k, v in one.tensors.items()}
    assert says in one.call(fused.refuses, given, "cpu")


def test_ssd_beyond_32_bit_offsets_is_refused_and_names_the_issue():
    refuses = adapter("ssd", "mamba_ssm")["ssd"].refuses
    with torch.device("meta"):
        x = torch.empty(16, 32768, 64, 64, dtype=torch.bfloat16)
        b = torch.empty(16, 32768, 1, 128, dtype=torch.bfloat16)
        dt, a = torch.empty(16, 32768, 64), torch.empty(64)
    assert "state-spaces/mamba#1015" in refuses(x, dt, a, b, b, a, chunk=64)
    assert refuses(x[:1], dt[:1], a, b[:1], b[:1], a, chunk=64) is None
    # A view counts by what it spans in memory.
    with torch.device("meta"):
        wide = torch.empty(2, 32768, 33000, dtype=torch.bfloat16)[..., :4096].unflatten(-1, (64, 64))
    assert extent(wide) >= 1 << 31
    assert "state-spaces/mamba#1015" in refuses(wide, dt[:2], a, b[:2], b[:2], a, chunk=64)


def test_queries_that_continue_a_cache_are_left_to_torch():
    refuses = adapter("attention", "flash_attn")["attention"].refuses
    q, k = torch.zeros(1, 2, 1, 8).bfloat16(), torch.zeros(1, 5, 1, 8).bfloat16()
    assert refuses(q, k, k, scale=1.0) == "queries that continue a cache"


def test_a_call_that_is_refused_runs_on_torch_and_is_logged_once(caplog):
    fused = adapter("ssd", "mamba_ssm")["ssd"]
    run = dispatch.OnBackend("ssd", "mamba-ssm", fused, dispatch.TORCH.ssd, device_type="cpu")
    one = samples.sample("ssd", {"b": 1, "t": 8, "h": 2, "p": 8, "g": 1, "n": 8})
    given = one.given("cpu", torch.float32)
    with caplog.at_level(logging.INFO):
        assert torch.equal(one.call(run, given, "cpu"), one.call(dispatch.TORCH.ssd, given, "cpu"))
        one.call(run, given, "cpu")
    assert [record.message for record in caplog.records] == [
        "ssd: torch instead of mamba-ssm where there are inputs in float32, the kernel multiplies 16-bit numbers."
    ]


def test_tensors_on_another_device_run_on_torch():
    run = dispatch.OnBackend("ssd", "mamba-ssm", adapter("ssd", "mamba_ssm")["ssd"], lambda *args, **options: "torch")
    one = samples.sample("ssd", {"b": 1, "t": 8, "h": 2, "p": 8, "g": 1, "n": 8})
    assert one.call(run, one.given("cpu", torch.bfloat16), "cpu") == "torch"


ARCHS = {
    "m": {"pattern": "2*m", "blocks": {"m": {"state_size": 16, "head_dim": 16, "groups": 1, "chunk": 16}}},
    "r": {"pattern": "2*r", "blocks": {"r": {}}},
    "a d w": {"pattern": "a d w d", "blocks": {"a": {"heads": 2}, "w": {"heads": 2, "window": 5}, "d": {"width": 64}}},
    "g": {"pattern": "m gm", "blocks": {"m": {"state_size": 16, "head_dim": 16}, "g": {"heads": 4, "mlp_width": 64}}},
    "k": {"pattern": "2*k", "blocks": {"k": {"head_dim": 16}}},
    "t": {"pattern": "2*t", "blocks": {"t": {"heads": 2}}},
    "l": {"pattern": "2*l", "blocks": {"l": {"key_heads": 2}}},
    "c x": {"pattern": "c x", "blocks": {"c": {}, "x": {"heads": 2}}},
}  # fmt: skip


@pytest.mark.parametrize("arch", ARCHS)
def test_a_model_on_fused_backends_trains_as_on_torch(arch, monkeypatch):
    """Loss and gradients under bf16 autocast, with packed documents, through the modules that a training calls."""
    semantic = resolve_model({"width": 64, **ARCHS[arch]}, 96)
    operations = select.operations_of(numerics_of(semantic))
    firsts = {name: Choice(replace(select.BACKENDS[name][0], device="cpu")) for name in operations if name in select.BACKENDS}
    kernels = dispatch.kernels_of(firsts)
    used: set[str] = set()
    for choice in firsts:
        for name in dispatch.functions_of(choice):
            watched(getattr(kernels, name), name, used, monkeypatch)
    tokens = torch.randint(96, (2, 41), generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[0] * 17 + [1] * 24, [4] * 30 + [9] * 11])
    found = {}
    for name, these in (("torch", dispatch.TORCH), ("fused", kernels)):
        model = build(semantic, seed=0, kernels="torch")
        dispatch.use(model, these)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model.loss_sum(model(tokens[:, :-1], ids[:, :-1]), tokens[:, 1:]) / 80
        loss.backward()
        grads = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        found[name] = (loss.item(), grads)
    assert found["fused"][0] == pytest.approx(found["torch"][0], rel=2e-3)  # losses are means of 80 bf16 roundings
    distance = (found["fused"][1] - found["torch"][1]).norm() / found["torch"][1].norm()
    assert distance < 0.03  # as the self-check's gradients
    expected = {name for op in firsts for name in dispatch.functions_of(op)} - {"norm_gated"}
    assert used == expected, "a module calls something else than its kernels"


def numerics_of(semantic):
    from zexp.blocks.resolve import numerics

    return numerics(semantic)


def watched(function, name, used, monkeypatch):
    run = function.fused.run

    def seen(*args, **options):
        used.add(name)
        return run(*args, **options)

    object.__setattr__(function.fused, "run", seen)


def test_a_model_without_kernels_given_is_on_torch():
    model = build(resolve_model({"width": 64, **ARCHS["m"]}, 96), seed=0, kernels="torch")
    assert model.kernels is dispatch.TORCH and model.layers[0].branches["m"].kernels is dispatch.TORCH


def test_ends_and_positions_of_documents():
    documents = Documents(torch.tensor([[7, 7, 3, 3, 3], [1, 2, 2, 2, 2]]))
    assert documents.positions().tolist() == [[0, 0, 1, 1, 1], [0, 1, 1, 1, 1]]
    assert documents.positions().dtype == torch.int32
    ends, longest = documents.ends()
    # The second row starts a document, whatever the first one ended with.
    assert ends.tolist() == [0, 2, 5, 6, 10] and longest == 4 and ends.dtype == torch.int32
    same = Documents(torch.tensor([[5, 5], [5, 5]]))
    assert same.ends()[0].tolist() == [0, 2, 4] and not same.starts().any()
