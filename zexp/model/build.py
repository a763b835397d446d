"""A model from its semantic block and a seed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from zexp.blocks.resolve import numerics
from zexp.kernels import dispatch, select
from zexp.model.language_model import LanguageModel


def build(
    model: Mapping[str, Any], *, seed: int | None, kernels: str = "auto", device: str | torch.device = "cpu"
) -> LanguageModel:
    """The model in fp32 on `device`.

    seed: weights are drawn on the CPU from a generator of their own, so they depend on the seed and the model alone;
    None leaves them undefined, for a state to be loaded into. kernels: auto, torch or fused; a GPU's are checked first, once.
    Raises ConfigError for kernels that cannot be had.
    """
    operations = select.operations_of(numerics(model))
    choices = dispatch.chosen(kernels, operations, device, deterministic=torch.are_deterministic_algorithms_enabled())
    dispatch.say(choices)
    with torch.device("meta"):
        built = LanguageModel(model)
    functions = dispatch.kernels_of(choices)
    dispatch.use(built, functions if kernels == select.TORCH else dispatch.decoding(functions, choices, device))
    if seed is None:
        return built if torch.device(device).type == "meta" else built.to_empty(device=device)
    built.to_empty(device="cpu")
    built.initialise(torch.Generator("cpu").manual_seed(seed))
    return built.to(device)


def decayed(model: nn.Module) -> list[str]:
    """Names of the parameters that weight decay applies to: the matrices of linear maps, a head of its own included,
    and what blocks name in DECAYED (experts' matrices).

    Not: embeddings (and a head tied to them), norms, biases, convolutions, A_log, D, dt_bias.
    """
    names: list[str] = []
    for name, module in model.named_modules():
        own = ["weight"] if isinstance(module, nn.Linear) else getattr(module, "DECAYED", ())
        names += [f"{name}.{parameter}" for parameter in own]
    return names
