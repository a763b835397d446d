"""What decoding calls besides the operations, written as its formulas.

B batch · T positions · E channels of Mamba2's first product · H heads · G groups · N state size · K conv width
J heads of a group (H / G).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zexp.kernels.decode.torch_backend import Mamba2Options, Mamba2Weights
from zexp.kernels.gated_norm.reference import gated_norm, norm_gated


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """Each output is the sum of the inputs times its weights."""
    y = (x[..., None, :] * weight_OI).sum(-1)
    return y if bias_O is None else y + bias_O


def mamba2_continue(
    projected_BTE: Tensor, weights: Mamba2Weights, conv_BKC: Tensor, state_BGNJ: Tensor, options: Mamba2Options
) -> tuple[Tensor, Tensor, Tensor]:
    """What Mamba2 computes between its two products, one position at a time, and what it remembers then; no input is changed.

    xBC = silu(conv(xBC)); dt = clamp(softplus(dt + dt_bias)); S = exp(dt A) S + dt x B^T; y = S C + D x; the norm of y and z.
    """
    inner, heads, groups = weights.norm_I.shape[0], weights.dt_bias_H.shape[0], state_BGNJ.shape[1]
    channels, size = conv_BKC.shape[2], state_BGNJ.shape[2]
    width = inner // heads
    norm = norm_gated if options.norm_before_gate else gated_norm
    low = -torch.inf if options.dt_min is None else options.dt_min
    high = torch.inf if options.dt_max is None else options.dt_max
    rows = []
    for row_BE in projected_BTE.unbind(1):
        z, entering, dt = row_BE.split((inner, channels, heads), dim=-1)
        conv_BKC = torch.cat((conv_BKC[:, 1:], entering[:, None]), dim=1)
        mixed = F.silu((conv_BKC * weights.conv_CK.t()).sum(1) + weights.conv_bias_C)
        x, b, c = mixed.split((inner, groups * size, groups * size), dim=-1)
        b, c = b.unflatten(-1, (groups, size)), c.unflatten(-1, (groups, size))
        dt = (1 + (dt + weights.dt_bias_H).exp()).log().clamp(low, high)
        decay, step = (
            per_head.repeat_interleave(width, -1).unflatten(-1, (groups, -1)) for per_head in ((-dt * weights.a_log_H.exp()).exp(), dt)
        )
        written = step * x.unflatten(-1, (groups, -1))
        state_BGNJ = state_BGNJ * decay[:, :, None] + b[..., None] * written[:, :, None]
        y = (state_BGNJ * c[..., None]).sum(2).flatten(1) + weights.d_H.repeat_interleave(width) * x
        rows.append(norm(y, z, weights.norm_I, options.eps, groups))
    return torch.stack(rows, dim=1), conv_BKC, state_BGNJ
