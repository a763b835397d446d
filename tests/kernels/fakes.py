"""Stand-ins for the packages of fused kernels: plain torch, in each package's own layout and with its own demands.

They are written from the packages' documentation, one position at a time, not from zexp's references: an adapter that turns an
axis the wrong way, or hands on the wrong boundaries, computes something else with them.

b batch · l positions · h heads · d channels · n state or key width · p value width.
"""

from __future__ import annotations

import sys
from itertools import pairwise
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def install(monkeypatch: Any) -> None:
    """Makes all of them importable."""
    for path, functions in MODULES.items():
        parts = path.split(".")
        for end in range(1, len(parts) + 1):
            name = ".".join(parts[:end])
            if name not in sys.modules or getattr(sys.modules[name], "__file__", None) is not None:
                module = ModuleType(name)
                module.__path__ = []
                monkeypatch.setitem(sys.modules, name, module)
        for name, function in functions.items():
            setattr(sys.modules[path], name, function)
    monkeypatch.setattr("zexp.kernels.fused.find_spec", lambda name: object())
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)


def _softmax_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, before: int) -> Tensor:
    """(l, h, p) each, of one sequence; before: keys before the query's own that it sees, -1 = all."""
    k, v = (tensor.repeat_interleave(q.shape[1] // k.shape[1], dim=1).float() for tensor in (k, v))
    scores = torch.einsum("ihp,jhp->hij", q.float(), k) * scale
    gap = torch.arange(len(q))[:, None] - torch.arange(len(k))
    hidden = (gap < 0) | ((gap > before) if before >= 0 else torch.zeros_like(gap, dtype=torch.bool))
    return torch.einsum("hij,jhp->ihp", scores.masked_fill(hidden, -torch.inf).softmax(-1), v).to(q.dtype)


def flash_attn_func(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False,
):  # fmt: skip
    assert causal and q.dtype in (torch.bfloat16, torch.float16) and q.dim() == 4
    rows = [_softmax_attention(*row, softmax_scale, window_size[0]) for row in zip(q, k, v, strict=True)]
    return torch.stack(rows)


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False, block_table=None,
):  # fmt: skip
    assert causal
    return _varlen(q, k, v, cu_seqlens_q, max_seqlen_q, softmax_scale, window_size[0])


def varlen_attn(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False
):  # fmt: skip
    assert window_size[1] == 0, "causal"
    assert enable_gqa or query.shape[1] == key.shape[1]
    return _varlen(query, key, value, cu_seq_q, max_q, scale, window_size[0])


def _varlen(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, longest: int, scale: float, before: int) -> Tensor:
    assert q.dim() == 3 and q.dtype == torch.bfloat16 and ends.dtype == torch.int32
    assert ends[0] == 0 and ends[-1] == len(q) and longest == int(ends.diff().max())
    parts = [slice(int(a), int(b)) for a, b in pairwise(ends.tolist())]
    return torch.cat([_softmax_attention(q[at], k[at], v[at], scale, before) for at in parts])


def mamba_chunk_scan_combined(
    x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, initial_states=None, seq_idx=None, cu_seqlens=None,
    dt_softplus=False, dt_limit=(0.0, float("inf")), return_final_states=False, return_varlen_states=False,
):  # fmt: skip
    assert x.dtype == B.dtype == C.dtype == torch.bfloat16 and dt.dtype == A.dtype == torch.float32
    assert chunk_size & (chunk_size - 1) == 0
    assert seq_idx is None or (seq_idx.dtype == torch.int32 and seq_idx.shape == x.shape[:2])
    heads = x.shape[2] // B.shape[2]
    B, C = (tensor.float().repeat_interleave(heads, dim=2) for tensor in (B, C))
    state = x.new_zeros(x.shape[0], x.shape[2], x.shape[3], B.shape[3], dtype=torch.float32)  # b h p n
    out = []
    for t in range(x.shape[1]):
        keep = 1.0 if seq_idx is None or t == 0 else (seq_idx[:, t] == seq_idx[:, t - 1]).float()[:, None, None, None]
        state = keep * state * torch.exp(dt[:, t] * A)[..., None, None]
        state = state + torch.einsum("bh,bhp,bhn->bhpn", dt[:, t], x[:, t].float(), B[:, t])
        y = torch.einsum("bhpn,bhn->bhp", state, C[:, t])
        out.append(y + (0 if D is None else D[:, None] * x[:, t].float()))
    return torch.stack(out, dim=1).to(x.dtype)


def selective_scan_fn(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False):
    assert u.dtype == delta.dtype == B.dtype == C.dtype and A.dtype == torch.float32
    assert B.dim() == 4 and B.shape[2:] == (A.shape[1], u.shape[2]), "b g n l"
    B, C = (tensor.repeat_interleave(u.shape[1] // tensor.shape[1], dim=1) for tensor in (B, C))
    state, out = u.new_zeros(*u.shape[:2], A.shape[1]), []
    for t in range(u.shape[2]):
        state = torch.exp(delta[:, :, t, None] * A) * state + (delta[:, :, t] * u[:, :, t])[..., None] * B[..., t]
        out.append((state * C[..., t]).sum(-1))
    y = torch.stack(out, dim=2)
    return y if D is None else y + D[:, None] * u


def causal_conv1d_fn(
    x, weight, bias=None, seq_idx=None, initial_states=None, return_final_states=False, final_states_out=None, activation=None
):
    assert x.stride(1) == 1 and x.shape[1] % 8 == 0 and x.stride(0) % 8 == 0 and x.stride(2) % 8 == 0, "channels last"
    assert 2 <= weight.shape[1] <= 4 and activation in (None, "silu")
    assert seq_idx is None or seq_idx.dtype == torch.int32
    rows = seq_idx if seq_idx is not None else torch.zeros(x.shape[0], x.shape[2], dtype=torch.int32)
    return _convolved(x.float(), weight.float(), bias, rows, activation).to(x.dtype)


def _convolved(x: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, activation: str | None) -> Tensor:
    """(b, d, l); rows: equal numbers are one sequence."""
    y = torch.zeros_like(x) if bias is None else bias[:, None].expand_as(x)
    for back in range(min(weight.shape[1], x.shape[2])):
        same = (rows[:, back:] == rows[:, : rows.shape[1] - back])[:, None]
        moved = F.pad(x[:, :, : x.shape[2] - back] * same, (back, 0))
        y = y + weight[:, weight.shape[1] - 1 - back, None] * moved
    return F.silu(y) if activation == "silu" else y


def causal_conv1d(
    x, weight=None, bias=None, residual=None, initial_state=None, output_final_state=False, activation=None,
    backend="triton", cu_seqlens=None,
):  # fmt: skip
    rows = _rows(x, cu_seqlens)
    y = _convolved(x.float().transpose(1, 2), weight.float(), bias, rows, activation)
    return y.transpose(1, 2).to(x.dtype), None


def _rows(like: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """(b, l) numbers of the sequences."""
    if cu_seqlens is None:
        return torch.zeros(like.shape[:2])
    assert like.shape[0] == 1 and cu_seqlens.dtype == torch.int64 and int(cu_seqlens[-1]) == like.shape[1]
    return torch.repeat_interleave(torch.arange(len(cu_seqlens) - 1), cu_seqlens.diff())[None]


def _recurrence(v: Tensor, cu_seqlens: Tensor | None, width: int, step: Any) -> Tensor:
    """step(state, t) -> (state, output); the state is (b, h, n, p)."""
    rows = _rows(v, cu_seqlens)
    state, out = torch.zeros(v.shape[0], v.shape[2], width, v.shape[3]), []
    for t in range(v.shape[1]):
        keep = 1.0 if t == 0 else (rows[:, t] == rows[:, t - 1]).float()[:, None, None, None]
        state, y = step(keep * state, t)
        out.append(y)
    return torch.stack(out, dim=1).to(v.dtype)


def chunk_rwkv7(
    r, w, k, v, a, b, scale=1.0, initial_state=None, output_final_state=False, cu_seqlens=None, cu_seqlens_cpu=None,
    safe_gate=False, chunk_size=None, disable_recompute=False, cp_context=None, lower_bound=None,
):  # fmt: skip
    assert r.dtype == k.dtype == v.dtype == a.dtype == b.dtype == torch.bfloat16
    assert lower_bound is None or (w >= lower_bound).all()
    r_, w_, k_, v_, a_, b_ = (tensor.float() for tensor in (r, w, k, v, a, b))

    def step(state: Tensor, t: int) -> tuple[Tensor, Tensor]:
        found = torch.einsum("bhn,bhnp->bhp", a_[:, t], state)
        state = w_[:, t].exp()[..., None] * state + b_[:, t, ..., None] * found[..., None, :]
        state = state + k_[:, t, ..., None] * v_[:, t, ..., None, :]
        return state, scale * torch.einsum("bhn,bhnp->bhp", r_[:, t], state)

    return _recurrence(v, cu_seqlens, k.shape[3], step), None


def chunk_simple_gla(
    q, k, v, g=None, g_gamma=None, scale=None, initial_state=None, output_final_state=False, state_v_first=False, cu_seqlens=None
):
    assert q.dtype == k.dtype == v.dtype == torch.bfloat16 and g_gamma.dtype == torch.float32 and g_gamma.dim() == 1
    q_, k_, v_ = (tensor.float() for tensor in (q, k, v))

    def step(state: Tensor, t: int) -> tuple[Tensor, Tensor]:
        state = g_gamma.exp()[:, None, None] * state + k_[:, t, ..., None] * v_[:, t, ..., None, :]
        return state, scale * torch.einsum("bhn,bhnp->bhp", q_[:, t], state)

    return _recurrence(v, cu_seqlens, k.shape[3], step), None


def chunk_gated_delta_rule(
    q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False, use_qk_l2norm_in_kernel=False,
    use_beta_sigmoid_in_kernel=False, allow_neg_eigval=False, state_v_first=False, cu_seqlens=None,
):  # fmt: skip
    assert use_qk_l2norm_in_kernel and q.dtype == k.dtype == v.dtype == torch.bfloat16
    each = v.shape[2] // k.shape[2]
    q_, k_ = (F.normalize(tensor.float(), dim=-1).repeat_interleave(each, dim=2) for tensor in (q, k))
    v_, factor = v.float(), k.shape[3] ** -0.5 if scale is None else scale

    def step(state: Tensor, t: int) -> tuple[Tensor, Tensor]:
        state = g[:, t].exp()[..., None, None] * state
        new = beta[:, t, :, None] * (v_[:, t] - torch.einsum("bhn,bhnp->bhp", k_[:, t], state))
        state = state + k_[:, t, ..., None] * new[..., None, :]
        return state, factor * torch.einsum("bhn,bhnp->bhp", q_[:, t], state)

    return _recurrence(v, cu_seqlens, k.shape[3], step), None


class LigerFusedLinearCrossEntropyFunction:
    @staticmethod
    def apply(
        _input, weight, target, bias=None, ce_weight=None, ignore_index=-100, lse_square_scale=0.0, label_smoothing=0.0,
        reduction="mean", softcap=None, return_z_loss=False, accum_dtype=None,
    ):  # fmt: skip
        assert _input.dtype == weight.dtype and accum_dtype == torch.float32
        logits = (_input @ weight.t()).float()
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        return F.cross_entropy(logits, target, reduction=reduction, ignore_index=ignore_index), None, None, None


class LigerRMSNormFunction:
    @staticmethod
    def apply(X, W, eps, offset=0.0, casting_mode="llama", in_place=True, row_mode=None):
        assert not in_place and casting_mode == "gemma"
        x = X.float()
        return (x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * (W + offset)).to(X.dtype)


def rms_norm(x, weight, bias, residual=None, eps=1e-5, prenorm=False, residual_in_fp32=False):
    return LigerRMSNormFunction.apply(x, weight, eps, casting_mode="gemma", in_place=False)


def rmsnorm_fn(x, weight, bias, z=None, eps=1e-6, group_size=None, norm_before_gate=True):
    x_, z_ = x.float(), F.silu(z.float())
    x_ = x_ if norm_before_gate else x_ * z_
    grouped = x_.unflatten(-1, (-1, group_size))
    out = (grouped * (grouped.square().mean(-1, keepdim=True) + eps).rsqrt()).flatten(-2) * weight
    return (out * z_ if norm_before_gate else out).to(x.dtype)


MODULES: dict[str, dict[str, Any]] = {
    "flash_attn": {"flash_attn_func": flash_attn_func, "flash_attn_varlen_func": flash_attn_varlen_func},
    "mamba_ssm.ops.triton.ssd_combined": {"mamba_chunk_scan_combined": mamba_chunk_scan_combined},
    "mamba_ssm.ops.triton.layernorm_gated": {"rmsnorm_fn": rmsnorm_fn},
    "mamba_ssm.ops.selective_scan_interface": {"selective_scan_fn": selective_scan_fn},
    "causal_conv1d": {"causal_conv1d_fn": causal_conv1d_fn},
    "fla.modules.causal_conv1d": {"causal_conv1d": causal_conv1d},
    "fla.modules.norm.layernorm": {"rms_norm": rms_norm},
    "fla.modules.norm.layernorm_gated": {"rmsnorm_fn": rmsnorm_fn},
    "fla.ops.rwkv7": {"chunk_rwkv7": chunk_rwkv7},
    "fla.ops.simple_gla": {"chunk_simple_gla": chunk_simple_gla},
    "fla.ops.gated_delta_rule": {"chunk_gated_delta_rule": chunk_gated_delta_rule},
    "liger_kernel.ops.fused_linear_cross_entropy": {
        "LigerFusedLinearCrossEntropyFunction": LigerFusedLinearCrossEntropyFunction
    },
    "liger_kernel.ops.rms_norm": {"LigerRMSNormFunction": LigerRMSNormFunction},
}
