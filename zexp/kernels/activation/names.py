"""The activations by name. Torch-free, so that a plan can check a name."""

from __future__ import annotations

from typing import Literal, get_args

Gate = Literal["silu", "gelu_erf", "gelu_tanh", "relu", "relu2"]  # functions of one value
Activation = Literal[
    "swiglu", "geglu_erf", "geglu_tanh", "reglu", "silu", "gelu_erf", "gelu_tanh", "relu", "relu2"
]  # what an MLP may use: gated units, then plain functions

# The gated units, and the function that each applies to its gate.
GATED: dict[str, Gate] = {"swiglu": "silu", "geglu_erf": "gelu_erf", "geglu_tanh": "gelu_tanh", "reglu": "relu"}
PLAIN: tuple[Gate, ...] = get_args(Gate)


def kept_between(activation: Activation) -> int:
    """Numbers per unit of the inner width that an MLP keeps for its backward pass between its two matrices.

    Gated: gate, up, the gate's activation, their product. relu's result tells its slope; relu2 is relu, then a square.
    """
    if activation in GATED:
        return 4
    return 1 if activation == "relu" else 2
