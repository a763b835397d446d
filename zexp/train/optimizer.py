"""AdamW, weight decay only where it belongs, and clipping by the global norm.

The implementation is torch's fused one, on every device: one step over 1.28 M parameters in 67 tensors takes 1.2 ms on
one CPU thread (foreach 5.9 ms, the plain loop 7.0 ms; torch 2.13). Implementations differ in the last bits, so
IMPLEMENTATION is part of the numerics fingerprint; the mathematics are the same, so it is not part of an id.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

IMPLEMENTATION = f"torch.optim.AdamW(fused) {torch.__version__}"
SLOTS = ("step", "exp_avg", "exp_avg_sq")  # of one parameter; step is a scalar


def build(model: nn.Module, optim: Mapping[str, Any], decayed: Iterable[str]) -> torch.optim.AdamW:
    """AdamW over all parameters of the model, with its state allocated (zeros) so that it can be loaded into.

    optim: {kind: adamw, betas, eps, weight_decay, …}; decayed: names of the parameters that are decayed (by
    lr · weight_decay, decoupled as in arXiv:1711.05101). The learning rate is set before each step by `step`.
    """
    if optim["kind"] != "adamw":
        raise ValueError(f"optim.kind = {optim['kind']!r}; this zexp knows adamw")
    parameters = dict(model.named_parameters())
    with_decay = set(decayed)
    if unknown := with_decay - parameters.keys():
        raise ValueError(f"decayed names no parameter of the model: {', '.join(sorted(unknown))}")
    groups = [
        {"params": [p for n, p in parameters.items() if n in with_decay], "weight_decay": optim["weight_decay"]},
        {"params": [p for n, p in parameters.items() if n not in with_decay], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=0.0,
        betas=tuple(optim["betas"]),
        eps=optim["eps"],
        fused=True,
    )
    for parameter in parameters.values():
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        }
    return optimizer


def state_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state by `<parameter name>.<slot>`; the tensors themselves, to be saved or loaded into."""
    return {
        f"{name}.{slot}": optimizer.state[parameter][slot]
        for name, parameter in model.named_parameters()
        for slot in SLOTS
    }


def clip(model: nn.Module, max_norm: float | None) -> Tensor:
    """Scale the gradients to a global norm of at most max_norm (None or 0 = leave them); the norm before, a scalar."""
    parameters = [p for p in model.parameters() if p.grad is not None]
    if max_norm:
        return nn.utils.clip_grad_norm_(parameters, max_norm)
    return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def step(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """One update at this learning rate; the gradients are freed."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
