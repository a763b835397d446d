"""Which letter of a pattern is which block.

A block is a folder with two modules: `spec.py` defines `Spec` (its keys, legality and formulas; no torch) and
`layer.py` the modules that are built (`Layer`, or `Shared` and `Call` for a feeding block). Adding a block is
adding a folder and a line here.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from zexp.blocks.base import BlockSpec

TABLE = {
    "a": "zexp.blocks.attention",
    "c": "zexp.blocks.short_conv",
    "d": "zexp.blocks.mlp",
    "e": "zexp.blocks.moe",
    "g": "zexp.blocks.shared",
    "k": "zexp.blocks.rwkv7",
    "l": "zexp.blocks.gated_deltanet",
    "m": "zexp.blocks.mamba2",
    "n": "zexp.blocks.kan",
    "r": "zexp.blocks.mamba1",
    "s": "zexp.blocks.slstm",
    "t": "zexp.blocks.retention",
    "w": "zexp.blocks.window",
    "x": "zexp.blocks.mlstm",
}


def spec_class(letter: str) -> type[BlockSpec]:
    """The typed keys and formulas of a block. Raises KeyError for a letter that is not in TABLE."""
    return import_module(f"{TABLE[letter]}.spec").Spec


def layer_module(letter: str) -> ModuleType:
    """The block's torch modules."""
    return import_module(f"{TABLE[letter]}.layer")
