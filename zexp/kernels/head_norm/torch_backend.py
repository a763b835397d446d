"""A norm per head with a hand-written gradient: it keeps its inputs and one or two numbers a head.

B batch · T positions · H heads · P head width · I all heads' channels (H·P).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from zexp.kernels.precision import at_least_fp32

Activation = Literal["silu", "sigmoid"]


def head_norm(
    x_BTHP: Tensor,
    weight: Tensor,
    eps: float,
    *,
    centred: bool = False,
    gate_BTI: Tensor | None = None,
    activation: Activation = "silu",
) -> Tensor:
    """(B, T, I), in x's dtype: each head normed by itself, times weight, times act(gate) where there is a gate.

    weight: (P), shared by all heads, or (H, P). centred: LayerNorm (less the mean, without a bias) instead of RMSNorm.
    Source: the group norm of RetNet (arXiv:2307.08621, eq. 8) and of xLSTM (arXiv:2405.04517, figures 10 and 11).
    """
    return _HeadNorm.apply(x_BTHP, weight, gate_BTI, eps, centred, activation)


class _HeadNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_BTHP: Tensor,
        weight: Tensor,
        gate_BTI: Tensor | None,
        eps: float,
        centred: bool,
        activation: Activation,
    ) -> Tensor:
        x = at_least_fp32(x_BTHP)
        mean = x.mean(-1, keepdim=True) if centred else None
        out = x.clone(memory_format=torch.contiguous_format) if mean is None else torch.sub(x, mean)
        inverse = out.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        out = out.mul_(inverse).mul_(weight).flatten(2)
        if gate_BTI is not None:
            gate = at_least_fp32(gate_BTI)
            out.mul_(F.silu(gate) if activation == "silu" else gate.sigmoid())
        ctx.save_for_backward(x_BTHP, weight, gate_BTI, mean, inverse)
        ctx.activation = activation
        return out.to(x_BTHP.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_BTHP, weight, gate_BTI, mean, inverse = ctx.saved_tensors
        x = at_least_fp32(x_BTHP)
        normed = (x * inverse if mean is None else (x - mean).mul_(inverse)).contiguous()
        dscaled = at_least_fp32(grads[0])
        dgate = None
        if gate_BTI is not None:
            gate = at_least_fp32(gate_BTI)
            through = (normed * weight).flatten(2).mul_(dscaled)  # the gradient of act(gate)
            if ctx.activation == "silu":
                dgate = torch.ops.aten.silu_backward(through, gate)
                dscaled = F.silu(gate).mul_(dscaled)
            else:
                sigmoid = gate.sigmoid()
                dgate = torch.ops.aten.sigmoid_backward(through, sigmoid)
                dscaled = sigmoid.mul_(dscaled)
            dgate = dgate.to(gate_BTI.dtype)
        dscaled = dscaled.view_as(normed) if dscaled.is_contiguous() else dscaled.reshape(normed.shape)
        touched = dscaled * normed
        dweight = touched.flatten(0, 2).sum(0) if weight.dim() == 1 else touched.sum((0, 1))
        dx = dscaled * weight
        slope = touched.mul_(weight).mean(-1, keepdim=True)
        if mean is not None:
            dx.sub_(dx.mean(-1, keepdim=True))
        dx.addcmul_(normed, slope, value=-1).mul_(inverse)
        return dx.to(x_BTHP.dtype), dweight.to(weight.dtype), dgate, None, None, None
