"""Decoding one token by kernel.cpp; what is no such call goes on to torch, or to the kernels over sequences.

torch's products of one row with a matrix read 6 GB/s of it here and these 20; one query against 4,096 keys of 8 heads of 64 takes
its attention 4 ms in fp32 and 20 in bf16.

B batch · T positions · S keys · H query heads · G key-value heads or groups · P head width · C channels · K conv width
N state size · J heads of a group (H / G) · I inputs · O outputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zexp.kernels.attention.torch_backend import attention
from zexp.kernels.causal_conv1d import cpp_backend as conv_in_cpp
from zexp.kernels.causal_conv1d import torch_backend as conv_in_torch
from zexp.kernels.cpp.library import SUFFIX, call
from zexp.kernels.ssd import cpp_backend as ssd_in_cpp
from zexp.kernels.ssd import torch_backend as ssd_in_torch

ROWS = 4  # of more rows torch's product is the faster one


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """As the torch backend's; of a few rows, where no gradient is asked for, by the kernel, which sums in fp32."""
    outputs, inputs = weight_OI.shape
    rows = x.numel() // inputs
    if (
        rows > ROWS
        or torch.is_grad_enabled()
        or not _taken(x, weight_OI, *(() if bias_O is None else (bias_O,)))
        or torch.is_autocast_enabled("cpu")
        or not weight_OI.is_contiguous()
    ):
        return F.linear(x, weight_OI, bias_O)
    y = x.new_empty(*x.shape[:-1], outputs)
    call("decode", "linear", x.dtype, x.contiguous(), weight_OI, bias_O, y, rows, inputs, outputs)
    return y


@torch.no_grad()
def attention_continue(q_BTHP: Tensor, k_BSGP: Tensor, v_BSGP: Tensor, *, scale: float, window: int | None = None) -> Tensor:
    """attention() of queries that stand at the last keys. No gradient."""
    batch, length, heads, width = q_BTHP.shape
    if length > 1 or not _taken(q_BTHP, k_BSGP, v_BSGP) or not _in_rows(k_BSGP) or not _in_rows(v_BSGP):
        return attention(q_BTHP, k_BSGP, v_BSGP, scale=scale, window=window)
    if window is not None:
        k_BSGP, v_BSGP = k_BSGP[:, -window:], v_BSGP[:, -window:]
    out = q_BTHP.new_empty(q_BTHP.shape)
    sizes = (batch, k_BSGP.shape[1], heads, k_BSGP.shape[2], width)
    strides = (*k_BSGP.stride()[:2], *v_BSGP.stride()[:2])
    call("decode", "attend", q_BTHP.dtype, q_BTHP.contiguous(), k_BSGP, v_BSGP, out, *sizes, *strides, scale)
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


def _taken(*tensors: Tensor) -> bool:
    """All on the CPU, all fp32 or all bf16."""
    dtype = tensors[0].dtype
    return dtype in SUFFIX and all(tensor.dtype == dtype and tensor.device.type == "cpu" for tensor in tensors)


def _in_rows(x_BSGP: Tensor) -> bool:
    """Whether a position's numbers lie side by side."""
    return x_BSGP.stride(3) == 1 and x_BSGP.stride(2) == x_BSGP.shape[3]
