"""Inputs of every function that has a fused backend: small and odd ones to check a kernel with, large ones to time it.

B batch · T positions · H heads · G groups, or key or key-value heads · P head or value width · N key width or state size ·
I inner channels · C channels · K conv width · D width · M tokens · V vocabulary.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zexp.kernels.activation.names import GATED, PLAIN
from zexp.kernels.documents import Documents

Size = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One call: what it is given, in order, and how.

    tensors: by name, in the order of the arguments, in fp32 on the CPU; None = left out. whole: names of those that stay in fp32
    where activations are bf16: weights, steps, decays. options: the keyword arguments besides `documents`; those of the
    torch backend alone (chunk) are in torch_options. after: positional arguments after the tensors. flops: of the forward pass.
    """

    size: Size
    tensors: dict[str, Tensor | None]
    whole: frozenset[str] = frozenset()
    options: dict[str, Any] = field(default_factory=dict)
    torch_options: dict[str, Any] = field(default_factory=dict)
    after: tuple[Any, ...] = ()
    ids_BT: Tensor | None = None
    packs: bool = True  # the function takes `documents`
    flops: float = 0.0

    def given(self, device: torch.device | str, dtype: torch.dtype) -> dict[str, Tensor | None]:
        """The tensors on a device, activations in dtype; those of floating point want gradients."""
        made: dict[str, Tensor | None] = {}
        for name, tensor in self.tensors.items():
            if tensor is None or not tensor.is_floating_point():
                made[name] = None if tensor is None else tensor.to(device)
                continue
            own = tensor.dtype if name in self.whole else dtype
            made[name] = tensor.to(device, own).detach().requires_grad_()
        return made

    def call(self, function: Callable[..., Tensor], given: Mapping[str, Tensor | None], device: torch.device | str) -> Tensor:
        """What the function makes of them. Of a backend: it gets the torch backend's arguments, whichever it is."""
        options = self.options | self.torch_options
        if self.packs:
            options["documents"] = None if self.ids_BT is None else Documents(self.ids_BT.to(device))
        return function(*given.values(), *self.after, **options)

    def truth(self, name: str, given: Mapping[str, Tensor | None]) -> Tensor:
        """What the slow reference of the function makes of tensors on the CPU."""
        reference = getattr(importlib.import_module(f"zexp.kernels.{_FOLDERS.get(name, name)}.reference"), name)
        options = self.options | ({"documents_BT": self.ids_BT} if self.packs else {})
        made = reference(*given.values(), *self.after, **options)
        return made[0] if isinstance(made, tuple) else made  # some return their last state as well


_FOLDERS = {"gated": "activation", "mlp_activation": "activation", "linear_cross_entropy": "cross_entropy", "norm_gated": "gated_norm"}


def sample(name: str, size: Size, seed: int = 0) -> Sample:
    """One of a function. size: what _MAKERS' function takes, and `documents`: lengths that make up each row."""
    generator = torch.Generator().manual_seed(seed)
    own = {key: value for key, value in size.items() if key != "documents"}
    ids_BT = _ids(size["documents"], size["b"]) if "documents" in size else None
    made: Sample = _MAKERS[name](lambda *shape: torch.randn(*shape, generator=generator), **own)
    return Sample(**{**made.__dict__, "size": dict(size), "ids_BT": ids_BT})


def _ids(lengths: Sequence[int], batch: int) -> Tensor:
    """Ids that do not count from 0, and boundaries that differ from row to row."""
    rows = [torch.repeat_interleave(torch.arange(len(lengths)) + 7 * row + 3, torch.tensor(lengths)) for row in range(batch)]
    return torch.stack([row if number % 2 == 0 else (row.max() - row.flip(0)) + row.min() for number, row in enumerate(rows)])


Randn = Callable[..., Tensor]


def _attention(randn: Randn, b: int, t: int, h: int, g: int, p: int, window: int | None = None) -> Sample:
    q, k, v = randn(b, t, h, p), randn(b, t, g, p), randn(b, t, g, p)
    seen = t / 2 if window is None else min(window, t / 2)
    return Sample(
        size={},
        tensors={"q": q, "k": k, "v": v},
        options={"scale": p**-0.5, "window": window},
        flops=4 * b * t * seen * h * p,
    )


def _ssd(randn: Randn, b: int, t: int, h: int, p: int, g: int, n: int) -> Sample:
    dt, a = F.softplus(randn(b, t, h) - 2), -randn(h).exp()
    chunk = 64  # the scan's cheapest FLOPs: matrices of 64 x 64
    return Sample(
        size={},
        tensors={"x": randn(b, t, h, p), "dt": dt, "a": a, "b": randn(b, t, g, n), "c": randn(b, t, g, n), "d": randn(h)},
        whole=frozenset(("dt", "a", "d")),
        torch_options={"chunk": chunk},
        flops=b * t * (chunk * (g * n + h * p) + 4 * h * p * n),
    )


def _selective_scan(randn: Randn, b: int, t: int, i: int, h: int, n: int, bias: bool = False, gated: bool = False) -> Sample:
    a = -torch.arange(1, n + 1).float().expand(i, n).contiguous()
    dt = randn(b, t, i) if bias else F.softplus(randn(b, t, i) - 3)
    return Sample(
        size={},
        tensors={
            "x": randn(b, t, i), "dt": dt, "a": a, "b": randn(b, t, h, n), "c": randn(b, t, h, n), "d": randn(i),
            "dt_bias": randn(i) - 3 if bias else None, "z": randn(b, t, i) if gated else None,
        },
        whole=frozenset(("a", "d", "dt_bias") if bias else ("dt", "a", "d")),
        flops=9.0 * b * t * i * n,
    )  # fmt: skip


def _causal_conv1d(randn: Randn, b: int, t: int, c: int, k: int, bias: bool = True, silu: bool = True) -> Sample:
    return Sample(
        size={},
        tensors={"x": randn(b, t, c), "weight": randn(c, k), "bias": randn(c) if bias else None},
        whole=frozenset(("weight", "bias")),
        options={"silu": silu},
        flops=2.0 * b * t * c * k,
    )


def _wkv7(randn: Randn, b: int, t: int, h: int, n: int) -> Sample:
    w = -(0.606 * torch.sigmoid(3 * randn(b, t, h, n)))
    r, k, v, kappa, a = (randn(b, t, h, n) for _ in range(5))
    return Sample(
        size={},
        tensors={"r": r, "w": w, "k": k, "v": v, "kappa": F.normalize(kappa, dim=-1), "a": a.sigmoid()},
        whole=frozenset(("w", "k", "kappa", "a")),
        flops=8.0 * b * t * h * n * n,
    )


def _retention(randn: Randn, b: int, t: int, h: int, n: int, p: int) -> Sample:
    decays = tuple((1 - torch.tensor(2.0, dtype=torch.float64).pow(-5.0 - torch.arange(h))).log().tolist())
    return Sample(
        size={},
        tensors={"q": randn(b, t, h, n), "k": randn(b, t, h, n), "v": randn(b, t, h, p)},
        options={"scale": n**-0.5},
        torch_options={"chunk": 64},
        after=(decays,),
        flops=b * t * h * (64 * (n + p) + 4 * n * p),
    )


def _gated_delta(randn: Randn, b: int, t: int, g: int, n: int, h: int, p: int) -> Sample:
    decay, beta = -F.softplus(randn(b, t, h) - 2), 2 * torch.sigmoid(randn(b, t, h))
    return Sample(
        size={},
        tensors={"q": randn(b, t, g, n), "k": randn(b, t, g, n), "v": randn(b, t, h, p), "g": decay, "beta": beta},
        whole=frozenset(("g", "beta")),
        torch_options={"chunk": 64},
        flops=b * t * h * (64 * (2 * n + 2 * p) + 6 * n * p),
    )


def _cross_entropy(randn: Randn, m: int, d: int, v: int, softcap: float | None = None) -> Sample:
    labels = randn(m).abs().mul(1e6).long() % v
    labels[::7] = -100
    return Sample(
        size={},
        tensors={"hidden": randn(m, d), "weight": randn(v, d) * d**-0.5, "labels": labels},
        options={"softcap": softcap},
        packs=False,
        flops=2.0 * m * d * v,
    )


def _rms_norm(randn: Randn, m: int, d: int) -> Sample:
    return Sample(
        size={}, tensors={"x": randn(m, d), "weight": randn(d)}, whole=frozenset(("weight",)), after=(1e-5,), packs=False,
        flops=4.0 * m * d,
    )  # fmt: skip


def _gated_norm(randn: Randn, m: int, d: int, groups: int) -> Sample:
    return Sample(
        size={}, tensors={"y": randn(m, d), "z": randn(m, d), "weight": randn(d)}, whole=frozenset(("weight",)),
        after=(1e-5, groups), packs=False, flops=8.0 * m * d,
    )  # fmt: skip


def _gated(randn: Randn, m: int, f: int, gate: str) -> Sample:
    return Sample(size={}, tensors={"x": randn(m, 2 * f)}, after=(gate,), packs=False, flops=8.0 * m * f)


def _activation(randn: Randn, m: int, f: int, name: str) -> Sample:
    units = 2 if name in GATED else 1
    return Sample(size={}, tensors={"x": randn(m, units * f)}, after=(name,), packs=False, flops=8.0 * m * f)


def _moe(randn: Randn, m: int, d: int, e: int, f: int, k: int, name: str) -> Sample:
    chosen = randn(e, m).topk(k, dim=0).indices
    up, down = randn(e, f * (2 if name in GATED else 1), d) * d**-0.5, randn(e, d, f) * f**-0.5
    return Sample(
        size={}, tensors={"x": randn(m, d), "chosen": chosen, "weights": randn(k, m).softmax(0), "up": up, "down": down},
        whole=frozenset(("weights", "up", "down")), after=(name,), packs=False, flops=2.0 * k * m * (up[0].numel() + down[0].numel()),
    )  # fmt: skip


def _rotary(randn: Randn, b: int, t: int, h: int, p: int, turned: int | None = None, start: int = 0) -> Sample:
    return Sample(
        size={}, tensors={"x": randn(b, t, h, p)}, after=(10_000.0,), options={"turned": turned, "start": start}, packs=False,
        flops=3.0 * b * t * h * p,
    )  # fmt: skip


_MAKERS: dict[str, Callable[..., Sample]] = {
    "attention": _attention,
    "causal_conv1d": _causal_conv1d,
    "gated": _gated,
    "gated_delta": _gated_delta,
    "gated_norm": _gated_norm,
    "linear_cross_entropy": _cross_entropy,
    "mlp_activation": _activation,
    "moe": _moe,
    "norm_gated": _gated_norm,
    "retention": _retention,
    "rms_norm": _rms_norm,
    "rotary": _rotary,
    "selective_scan": _selective_scan,
    "ssd": _ssd,
    "wkv7": _wkv7,
}

# Lengths that no chunk divides, below and above one; packed rows with documents of one position, over chunk boundaries, and with
# boundaries that differ between the rows.
CHECKED: dict[str, tuple[Size, ...]] = {
    "attention": (
        {"b": 2, "t": 67, "h": 4, "g": 4, "p": 64},
        {"b": 1, "t": 131, "h": 4, "g": 2, "p": 128},
        {"b": 2, "t": 131, "h": 2, "g": 1, "p": 64, "window": 17},
        {"b": 2, "t": 131, "h": 2, "g": 2, "p": 64, "documents": (60, 1, 41, 29)},
        {"b": 2, "t": 131, "h": 2, "g": 2, "p": 64, "window": 17, "documents": (60, 1, 41, 29)},
    ),
    "causal_conv1d": (
        {"b": 2, "t": 67, "c": 64, "k": 4},
        {"b": 2, "t": 131, "c": 40, "k": 4, "bias": False, "silu": False, "documents": (60, 1, 41, 29)},
        {"b": 1, "t": 5, "c": 64, "k": 2},
    ),
    "gated": tuple({"m": 7, "f": 67, "gate": gate} for gate in PLAIN),
    "gated_delta": (
        {"b": 2, "t": 67, "g": 2, "n": 64, "h": 4, "p": 64},
        {"b": 2, "t": 131, "g": 2, "n": 64, "h": 2, "p": 128, "documents": (60, 1, 41, 29)},
    ),
    "gated_norm": ({"m": 67, "d": 192, "groups": 1}, {"m": 5, "d": 256, "groups": 4}),
    "mlp_activation": tuple({"m": 7, "f": 67, "name": name} for name in (*GATED, *PLAIN)),
    "moe": (
        {"m": 67, "d": 64, "e": 4, "f": 33, "k": 2, "name": "swiglu"},
        {"m": 5, "d": 32, "e": 8, "f": 40, "k": 1, "name": "gelu_erf"},
    ),
    "linear_cross_entropy": ({"m": 67, "d": 64, "v": 301}, {"m": 40, "d": 64, "v": 1000, "softcap": 15.0}),
    "norm_gated": ({"m": 67, "d": 192, "groups": 1}, {"m": 5, "d": 256, "groups": 4}),
    "retention": (
        {"b": 2, "t": 67, "h": 2, "n": 64, "p": 64},
        {"b": 2, "t": 131, "h": 3, "n": 64, "p": 128, "documents": (60, 1, 41, 29)},
    ),
    "rms_norm": ({"m": 67, "d": 192}, {"m": 3, "d": 1000}),
    "rotary": ({"b": 2, "t": 67, "h": 3, "p": 64}, {"b": 1, "t": 5, "h": 2, "p": 40, "turned": 22, "start": 300}),
    "selective_scan": (
        {"b": 2, "t": 67, "i": 32, "h": 1, "n": 16},
        {"b": 2, "t": 131, "i": 32, "h": 2, "n": 16, "documents": (60, 1, 41, 29)},
        {"b": 2, "t": 67, "i": 48, "h": 2, "n": 5, "bias": True, "gated": True},
    ),
    "ssd": (
        {"b": 2, "t": 67, "h": 4, "p": 64, "g": 1, "n": 64},
        {"b": 2, "t": 301, "h": 4, "p": 32, "g": 2, "n": 128},
        {"b": 2, "t": 301, "h": 2, "p": 64, "g": 1, "n": 64, "documents": (150, 1, 121, 29)},
    ),
    "wkv7": (
        {"b": 2, "t": 67, "h": 2, "n": 64},
        {"b": 2, "t": 131, "h": 2, "n": 64, "documents": (60, 1, 41, 29)},
    ),
}

# About what a layer of a 1.3B model computes of a batch of 4 sequences of 4096; of a CPU, of a 10M model and 4 of 512.
TIMED: dict[str, dict[str, Size]] = {
    "cuda": {
        "attention": {"b": 4, "t": 4096, "h": 16, "g": 16, "p": 128},
        "causal_conv1d": {"b": 4, "t": 4096, "c": 4352, "k": 4},
        "gated": {"m": 16384, "f": 5632, "gate": "silu"},
        "gated_delta": {"b": 4, "t": 4096, "g": 16, "n": 128, "h": 16, "p": 128},
        "gated_norm": {"m": 16384, "d": 4096, "groups": 1},
        "linear_cross_entropy": {"m": 16384, "d": 2048, "v": 50304},
        "mlp_activation": {"m": 16384, "f": 5632, "name": "swiglu"},
        "moe": {"m": 16384, "d": 2048, "e": 8, "f": 2816, "k": 2, "name": "swiglu"},
        "norm_gated": {"m": 16384, "d": 4096, "groups": 1},
        "retention": {"b": 4, "t": 4096, "h": 8, "n": 256, "p": 512},
        "rms_norm": {"m": 16384, "d": 2048},
        "rotary": {"b": 4, "t": 4096, "h": 16, "p": 128},
        "selective_scan": {"b": 4, "t": 4096, "i": 4096, "h": 1, "n": 16, "bias": True, "gated": True},
        "ssd": {"b": 4, "t": 4096, "h": 64, "p": 64, "g": 1, "n": 128},
        "wkv7": {"b": 4, "t": 4096, "h": 32, "n": 64},
    },
    "cpu": {
        "attention": {"b": 4, "t": 512, "h": 4, "g": 4, "p": 64},
        "causal_conv1d": {"b": 4, "t": 512, "c": 640, "k": 4},
        "gated": {"m": 2048, "f": 683, "gate": "gelu_erf"},
        "gated_delta": {"b": 4, "t": 512, "g": 4, "n": 64, "h": 4, "p": 64},
        "gated_norm": {"m": 2048, "d": 512, "groups": 1},
        "linear_cross_entropy": {"m": 2048, "d": 256, "v": 8192},
        "mlp_activation": {"m": 2048, "f": 683, "name": "swiglu"},
        "moe": {"m": 2048, "d": 256, "e": 8, "f": 344, "k": 2, "name": "swiglu"},
        "norm_gated": {"m": 2048, "d": 512, "groups": 1},
        "retention": {"b": 4, "t": 512, "h": 4, "n": 64, "p": 128},
        "rms_norm": {"m": 2048, "d": 256},
        "rotary": {"b": 4, "t": 512, "h": 4, "p": 64},
        "selective_scan": {"b": 4, "t": 512, "i": 512, "h": 1, "n": 16, "bias": True, "gated": True},
        "ssd": {"b": 4, "t": 512, "h": 8, "p": 64, "g": 1, "n": 64},
        "wkv7": {"b": 4, "t": 512, "h": 4, "n": 64},
    },
}
