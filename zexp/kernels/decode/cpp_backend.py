"""Decoding one token by kernel.cpp; what is no such call goes on to torch, or to the kernels over sequences.

torch's products of one row with a matrix read 6 GB/s of it here and these 20; one query against 4,096 keys of 8 heads of 64 takes
its attention 4 ms in fp32 and 20 in bf16.

B batch · T positions · S keys · H query heads · G key-value heads or groups · P head width · C channels · K conv width
N state size · J heads of a group (H / G) · I inputs · O outputs · E channels of Mamba2's first product.
"""

from __future__ import annotations

import functools
import logging
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from zexp.kernels.attention import cpp_backend as attention_in_cpp
from zexp.kernels.attention.torch_backend import attention
from zexp.kernels.causal_conv1d import cpp_backend as conv_in_cpp
from zexp.kernels.causal_conv1d import torch_backend as conv_in_torch
from zexp.kernels.cpp.library import SUFFIX, call, library
from zexp.kernels.decode import torch_backend
from zexp.kernels.decode.torch_backend import Mamba2Options, Mamba2Weights, Parts
from zexp.kernels.ssd import cpp_backend as ssd_in_cpp
from zexp.kernels.ssd import torch_backend as ssd_in_torch

log = logging.getLogger(__name__)

ROWS = 4  # of more rows torch's product is the faster one


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """As the torch backend's; of a few rows, where no gradient is asked for, by the kernel, which sums in fp32."""
    outputs, inputs = weight_OI.shape
    rows = x.numel() // inputs
    if (
        rows > ROWS
        or torch.is_grad_enabled()
        or torch.is_autocast_enabled("cpu")
        or not _taken(x, weight_OI, x if bias_O is None else bias_O)
        or not weight_OI.is_contiguous()
    ):
        return F.linear(x, weight_OI, bias_O)
    y = x.new_empty(*x.shape[:-1], outputs)
    call("decode", "linear", x.dtype, x.contiguous(), weight_OI, bias_O, y, rows, inputs, outputs)
    return y


def attention_continue(q_BTHP: Tensor, k_BSGP: Tensor, v_BSGP: Tensor, *, scale: float, window: int | None = None) -> Tensor:
    """attention() of queries that stand at the last keys. No gradient."""
    batch, length, heads, width = q_BTHP.shape
    if length > 1 and attention_in_cpp.refuses(q_BTHP, k_BSGP, v_BSGP, scale=scale) is None:
        with torch.no_grad():
            return attention_in_cpp.attention(q_BTHP, k_BSGP, v_BSGP, scale=scale, window=window)
    alike = _taken(q_BTHP, k_BSGP, v_BSGP) and v_BSGP.shape == k_BSGP.shape and k_BSGP.shape[3] == width
    if length > 1 or not alike or not _in_rows(k_BSGP) or not _in_rows(v_BSGP):
        with torch.no_grad():
            return attention(q_BTHP, k_BSGP, v_BSGP, scale=scale, window=window)
    if window is not None:
        k_BSGP, v_BSGP = k_BSGP[:, -window:], v_BSGP[:, -window:]
    out = q_BTHP.new_empty(q_BTHP.shape)
    sizes = (batch, k_BSGP.shape[1], heads, k_BSGP.shape[2], width)
    strides = (*k_BSGP.stride()[:2], *v_BSGP.stride()[:2])
    call("decode", "attend", q_BTHP.dtype, q_BTHP.contiguous(), k_BSGP, v_BSGP, out, *sizes, *strides, float(scale))
    return out


@torch.no_grad()
def causal_conv1d_continue(
    x_BTC: Tensor, weight_CK: Tensor, bias_C: Tensor | None, tail_BKC: Tensor, *, silu: bool = True
) -> tuple[Tensor, Tensor]:
    """As the torch backend's."""
    batch, length, channels = x_BTC.shape
    if not _taken(x_BTC, tail_BKC):
        return conv_in_torch.causal_conv1d_continue(x_BTC, weight_CK, bias_C, tail_BKC, silu=silu)
    weight, bias = weight_CK.float(), None if bias_C is None else bias_C.float()
    width = weight.shape[1]
    if length > 1:
        joined = torch.cat((tail_BKC, x_BTC), dim=1)
        return conv_in_cpp.causal_conv1d(joined, weight, bias, silu=silu)[:, width:], joined[:, length:].clone()
    x, before = x_BTC if x_BTC.stride(2) == 1 else x_BTC.contiguous(), tail_BKC.contiguous()
    y, tail = x.new_empty(x.shape), torch.empty_like(before)
    sizes = (batch, channels, width, x.stride(0), silu)
    call("decode", "convolve", x.dtype, x, weight.contiguous(), bias, before, y, tail, *sizes)
    return y, tail


@torch.no_grad()
def ssd_continue(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    a_H: Tensor,
    b_BTGN: Tensor,
    c_BTGN: Tensor,
    d_H: Tensor,
    state_BGNJ: Tensor,
    *,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """As the torch backend's."""
    batch, length, heads, width = x_BTHP.shape
    if not _taken(x_BTHP, b_BTGN, c_BTGN) or {dt_BTH.dtype, state_BGNJ.dtype} != {torch.float32}:
        return ssd_in_torch.ssd_continue(x_BTHP, dt_BTH, a_H, b_BTGN, c_BTGN, d_H, state_BGNJ, chunk=chunk)
    a, d = a_H.float(), d_H.float()
    if length > 1:
        return ssd_in_cpp.ssd_continue(x_BTHP, dt_BTH, a, b_BTGN, c_BTGN, d, state_BGNJ, chunk=chunk)
    x, b, c = (tensor if tensor[0, 0].is_contiguous() else tensor.contiguous() for tensor in (x_BTHP, b_BTGN, c_BTGN))
    groups, size = b.shape[2:]
    y, before = x.new_empty(x.shape), state_BGNJ.contiguous()
    state = torch.empty_like(before)
    sizes = (batch, heads, width, groups, size, x.stride(0), b.stride(0), c.stride(0))
    call("decode", "advance", x.dtype, x, dt_BTH.contiguous(), a.contiguous(), b, c, d.contiguous(), before, y, state, *sizes)
    return y, state


def mamba2_continue(
    projected_BTE: Tensor, weights: Mamba2Weights, conv_BKC: Tensor, state_BGNJ: Tensor, options: Mamba2Options, parts: Parts
) -> Tensor:
    """As the torch backend's."""
    batch, length, _ = projected_BTE.shape
    alike = _taken(projected_BTE, conv_BKC, *weights) and state_BGNJ.dtype == torch.float32
    if length > 1 or not alike or not conv_BKC.is_contiguous() or not state_BGNJ.is_contiguous():
        return torch_backend.mamba2_continue(projected_BTE, weights, conv_BKC, state_BGNJ, options, parts)
    projected = projected_BTE if projected_BTE.stride(2) == 1 else projected_BTE.contiguous()
    heads, inner = weights.dt_bias_H.shape[0], weights.norm_I.shape[0]
    _, groups, size, _ = state_BGNJ.shape
    y = projected.new_empty(batch, 1, inner)
    sizes = (batch, projected.stride(0), heads, inner // heads, groups, size, conv_BKC.shape[1], options.norm_before_gate)
    low = -math.inf if options.dt_min is None else options.dt_min
    high = math.inf if options.dt_max is None else options.dt_max
    tensors = (tensor.contiguous() for tensor in weights)
    call("decode", "mamba2", y.dtype, projected, *tensors, conv_BKC, state_BGNJ, y, *sizes, float(low), float(high), float(options.eps))
    return y


@functools.cache
def _compiled() -> bool:
    """Whether there is a library. Asked by the first call that would use it: a training never decodes."""
    try:
        library("decode")
    except (OSError, RuntimeError) as error:
        log.warning("Kernels: decoding stays with torch: %s", error)
        return False
    return True


def _taken(first: Tensor, *others: Tensor) -> bool:
    """All on the CPU, all fp32 or all bf16, and there is a library."""
    dtype = first.dtype
    for tensor in (first, *others):
        if tensor.dtype != dtype or dtype not in SUFFIX or not tensor.is_cpu:
            _say_other(dtype, tensor.dtype)
            return False
    return _compiled()


@functools.cache
def _say_other(*dtypes: torch.dtype) -> None:
    """Once for each pair."""
    found = " and ".join(dict.fromkeys(str(dtype).removeprefix("torch.") for dtype in dtypes))
    log.info("Kernels: torch decodes %s; the kernels for it take fp32 or bf16 throughout.", found)


def _in_rows(x_BSGP: Tensor) -> bool:
    """Whether a position's numbers lie side by side."""
    return x_BSGP.stride(3) == 1 and x_BSGP.stride(2) == x_BSGP.shape[3]
