"""The loss of a linear head in slices together with its gradient, with kernel.cpp between the products.

M tokens · D model width · V vocabulary. The scheme is the torch backend's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from zexp.kernels.cpp.library import call, library, not_taken, product_dtype
from zexp.kernels.cross_entropy.torch_backend import IGNORED
from zexp.kernels.fused import Fused

# Logits of a slice: 8 MB in bf16. Fewer make more additions of the V × D gradients of two slices, more leave the cache.
SLICE_ELEMENTS = 1 << 22


def cpp() -> dict[str, Fused]:
    library("cross_entropy")
    return {"linear_cross_entropy": Fused(linear_cross_entropy, refuses)}


def linear_cross_entropy(hidden_MD: Tensor, weight_VD: Tensor, labels_M: Tensor, softcap: float | None = None) -> Tensor:
    """As the torch backend's. Raises IndexError for a label beyond the vocabulary."""
    return _LinearCrossEntropy.apply(hidden_MD, weight_VD, labels_M, softcap)


def refuses(hidden_MD: Tensor, weight_VD: Tensor, labels_M: Tensor, softcap: float | None = None) -> str | None:
    if (why := not_taken(activations=(hidden_MD,))) is not None or (why := not_taken(activations=(weight_VD,))) is not None:
        return why
    if labels_M.shape != hidden_MD.shape[:1] or labels_M.is_floating_point():
        return "labels that are not one number a row"  # which torch's form will not take either, and says so
    return not_taken(activations=(hidden_MD.new_empty(0, dtype=product_dtype(hidden_MD)),))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_MD: Tensor, weight_VD: Tensor, labels_M: Tensor, softcap: float | None) -> Tensor:
        dtype = product_dtype(hidden_MD)
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        ignored_M = labels_M == IGNORED
        wanted = labels_M[~ignored_M]
        if wanted.numel() and not 0 <= int(wanted.min()) <= int(wanted.max()) < weight_VD.shape[0]:
            raise IndexError(f"a label is none of {weight_VD.shape[0]} tokens: {int(wanted.min())} to {int(wanted.max())}")
        labels = torch.where(ignored_M, -1, labels_M).long().contiguous()
        with torch.autocast("cpu", enabled=False):
            hidden, weight = hidden_MD.to(dtype), weight_VD.to(dtype)
            rows = max(1, SLICE_ELEMENTS // weight.shape[0])
            losses = torch.empty(hidden.shape[0], dtype=torch.float32)
            dhidden = torch.empty_like(hidden_MD) if wants_hidden else None
            dweight = torch.zeros(weight.shape, dtype=torch.float32) if wants_weight else None
            for start in range(0, hidden.shape[0], rows):
                part = slice(start, min(start + rows, hidden.shape[0]))
                logits = hidden[part] @ weight.t()
                wants = wants_hidden or wants_weight
                call("cross_entropy", "loss", dtype, logits, labels[part], losses[part], *logits.shape, float(softcap or 0.0), wants)
                if dhidden is not None:
                    dhidden[part].copy_(logits @ weight)
                if dweight is not None:
                    dweight.add_(logits.t() @ hidden[part])
        ctx.save_for_backward(dhidden, dweight if dweight is None else dweight.to(weight_VD.dtype))
        return losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        dhidden_MD, dweight_VD = ctx.saved_tensors
        return (
            None if dhidden_MD is None else dhidden_MD * grads[0],
            None if dweight_VD is None else dweight_VD * grads[0],
            None,
            None,
        )
