"""Mamba (`transformers` modeling_mamba): N·r."""

from __future__ import annotations

import math
from collections.abc import Iterator

from zexp.model.hf import pieces
from zexp.model.hf.entries import Config, Entry, Fixed, Flat, Same
from zexp.model.hf.family import Family, Parts, counted
from zexp.model.hf.llama import ends, trunk
from zexp.model.hf.pieces import Piece


class Rank(Same):
    """The rank of dt: a number, or "auto" for ceil(width / 16)."""

    def read(self, config: Config) -> Flat:
        said = config.get(self.theirs)
        return {self.path: math.ceil(config["hidden_size"] / 16) if said in (None, "auto") else said}


def block(prefix: str) -> tuple[Entry, ...]:
    """Mamba's keys as the hybrids name them: mamba_d_state and so on."""
    return (
        Same(f"{prefix}d_state", "blocks.r.state_size", 16),
        Same(f"{prefix}d_conv", "blocks.r.conv_width", 4),
        Same(f"{prefix}expand", "blocks.r.expand", 2),
        Rank(f"{prefix}dt_rank", "blocks.r.dt_rank"),
        Same(f"{prefix}conv_bias", "blocks.r.conv_bias", True),
        Same(f"{prefix}proj_bias", "blocks.r.bias", False),
    )


def tensors(parts: Parts) -> Iterator[Piece]:
    yield from ends(parts, "backbone.embeddings", "backbone.norm_f")
    for index in range(len(parts.layers)):
        old = f"backbone.layers.{index}"
        yield from pieces.norm(f"layers.{index}.norm", f"{old}.norm", "rmsnorm", parts.width)
        yield from pieces.mamba1(f"layers.{index}.branches.r", f"{old}.mixer", parts.specs["r"], parts.width)


_layers, _unlayers = counted(("r",))

FAMILY = Family(
    model_type="mamba",
    class_name="MambaForCausalLM",
    unit=(("r",),),
    entries=(
        *trunk(eps=1e-5, tied=True, eps_key="layer_norm_epsilon"),
        Same("state_size", "blocks.r.state_size", 16),
        Same("conv_kernel", "blocks.r.conv_width", 4),
        Same("expand", "blocks.r.expand", 2),
        Rank("time_step_rank", "blocks.r.dt_rank"),
        Same("use_conv_bias", "blocks.r.conv_bias", True),
        Same("use_bias", "blocks.r.bias", False),
        Fixed("hidden_act", "silu"),
    ),
    layers=_layers,
    unlayers=_unlayers,
    tensors=tensors,
)
