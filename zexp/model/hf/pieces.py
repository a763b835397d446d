"""How tensors of a `transformers` checkpoint make one of ours, and back. No torch: `convert.py` does what is said here.

Shapes are (rows, columns) of matrices as torch.nn.Linear has them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from zexp.blocks.attention.spec import Spec as Attention
from zexp.blocks.mamba1.spec import Spec as Mamba1
from zexp.blocks.mamba2.spec import Spec as Mamba2
from zexp.blocks.mlp.spec import Spec as Mlp
from zexp.blocks.moe.spec import Spec as Moe

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Theirs:
    """A tensor of a checkpoint. also: further names under which it may stand there (tied weights), equal to the bit."""

    name: str
    shape: Shape
    also: tuple[str, ...] = ()


@dataclass(frozen=True)
class Piece:
    """Our tensor `ours` is: the rows of `theirs` one below the other, swapped, in our shape.

    swapped: (a, b), the rows as a × b × rest become b × a × rest (a head's q, k, v together -> all q, all k, all v).
    Nothing is computed, so that both directions are exact to the bit.
    """

    ours: str
    theirs: tuple[Theirs, ...]
    swapped: tuple[int, int] | None = None


def same(ours: str, theirs: str, *shape: int, also: tuple[str, ...] = ()) -> Piece:
    """One tensor, perhaps in another shape."""
    return Piece(ours, (Theirs(theirs, shape, also),))


def norm(ours: str, theirs: str, kind: str, width: int) -> Iterator[Piece]:
    yield same(f"{ours}.weight", f"{theirs}.weight", width)
    if kind == "layernorm":
        yield same(f"{ours}.bias", f"{theirs}.bias", width)


def attention(ours: str, theirs: str, spec: Attention, width: int, out: str = "o_proj") -> Iterator[Piece]:
    """q_proj, k_proj, v_proj and the output's matrix, with biases if the spec has them."""
    assert spec.kv_heads is not None and spec.head_dim is not None, "the spec must be completed"
    rows = [heads * spec.head_dim for heads in (spec.heads, spec.kv_heads, spec.kv_heads)]
    names = [f"{theirs}.{name}_proj" for name in "qkv"]
    yield Piece(
        f"{ours}.qkv.weight", tuple(Theirs(f"{n}.weight", (r, width)) for n, r in zip(names, rows, strict=True))
    )
    yield same(f"{ours}.out.weight", f"{theirs}.{out}.weight", width, rows[0])
    if spec.bias:
        yield Piece(f"{ours}.qkv.bias", tuple(Theirs(f"{n}.bias", (r,)) for n, r in zip(names, rows, strict=True)))
        yield same(f"{ours}.out.bias", f"{theirs}.{out}.bias", width)


def mlp(
    ours: str, theirs: str, spec: Mlp, width: int, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj"
) -> Iterator[Piece]:
    """The gate's matrix, up and down; without a gate up and down alone."""
    names = [f"{theirs}.{name}" for name in ((gate, up) if spec.gated else (up,))]
    kinds: list[tuple[str, Shape]] = [
        ("weight", (spec.width, width)),
        *([("bias", (spec.width,))] if spec.bias else []),
    ]
    for kind, shape in kinds:
        yield Piece(f"{ours}.up.{kind}", tuple(Theirs(f"{name}.{kind}", shape) for name in names))
    yield same(f"{ours}.down.weight", f"{theirs}.{down}.weight", width, spec.width)
    if spec.bias:
        yield same(f"{ours}.down.bias", f"{theirs}.{down}.bias", width)


def mamba2(ours: str, theirs: str, spec: Mamba2, width: int) -> Iterator[Piece]:
    inner, heads, channels = spec.inner(width), spec.heads(width), spec.conv_channels(width)
    yield same(f"{ours}.in_proj.weight", f"{theirs}.in_proj.weight", inner + channels + heads, width)
    yield same(f"{ours}.conv_weight", f"{theirs}.conv1d.weight", channels, 1, spec.conv_width)
    yield same(f"{ours}.conv_bias", f"{theirs}.conv1d.bias", channels)
    for name in ("dt_bias", "A_log", "D"):
        yield same(f"{ours}.{name}", f"{theirs}.{name}", heads)
    yield same(f"{ours}.norm_weight", f"{theirs}.norm.weight", inner)
    yield same(f"{ours}.out_proj.weight", f"{theirs}.out_proj.weight", width, inner)


def mamba1(ours: str, theirs: str, spec: Mamba1, width: int) -> Iterator[Piece]:
    """Of one head; the norms of dt, B and C if the spec has them."""
    inner, rank, size = spec.inner(width), spec.rank(width), spec.state_size
    yield from _mamba1_around(ours, theirs, spec, width, None)
    yield same(f"{ours}.x_proj", f"{theirs}.x_proj.weight", rank + 2 * size, inner)
    yield same(f"{ours}.dt_proj", f"{theirs}.dt_proj.weight", inner, rank)
    yield same(f"{ours}.dt_bias", f"{theirs}.dt_proj.bias", inner)
    yield same(f"{ours}.A_log", f"{theirs}.A_log", inner, size)
    yield same(f"{ours}.D", f"{theirs}.D", inner)
    for number, (name, part) in enumerate((("dt", rank), ("b", size), ("c", size)) if spec.inner_norms else ()):
        yield same(f"{ours}.norms.{number}.weight", f"{theirs}.{name}_layernorm.weight", part)


def mamba1_heads(ours: str, theirs: str, spec: Mamba1, width: int) -> Iterator[Piece]:
    """Zamba's, head by head; the rows of in_proj alternate between x and the gate."""
    inner, rank, size, heads = spec.inner(width), spec.rank(width), spec.state_size, spec.heads
    each = inner // heads
    yield from _mamba1_around(ours, theirs, spec, width, (inner, 2))
    yield same(f"{ours}.x_proj", f"{theirs}.x_proj_weight", heads, rank + 2 * size, each)
    yield same(f"{ours}.dt_proj", f"{theirs}.dt_proj_weight", heads, each, rank)
    yield same(f"{ours}.dt_bias", f"{theirs}.dt_proj_bias", heads, each)
    yield same(f"{ours}.A_log", f"{theirs}.A_log", heads, each, size)
    yield same(f"{ours}.D", f"{theirs}.D", heads, each)


def _mamba1_around(
    ours: str, theirs: str, spec: Mamba1, width: int, swapped: tuple[int, int] | None
) -> Iterator[Piece]:
    """The projections from and to the residual stream, and the convolution."""
    inner = spec.inner(width)
    yield Piece(f"{ours}.in_proj.weight", (Theirs(f"{theirs}.in_proj.weight", (2 * inner, width)),), swapped)
    yield same(f"{ours}.out_proj.weight", f"{theirs}.out_proj.weight", width, inner)
    if spec.bias:
        yield Piece(f"{ours}.in_proj.bias", (Theirs(f"{theirs}.in_proj.bias", (2 * inner,)),), swapped)
        yield same(f"{ours}.out_proj.bias", f"{theirs}.out_proj.bias", width)
    yield same(f"{ours}.conv_weight", f"{theirs}.conv1d.weight", inner, 1, spec.conv_width)
    if spec.conv_bias:
        yield same(f"{ours}.conv_bias", f"{theirs}.conv1d.bias", inner)


def experts(
    ours: str, theirs: str, spec: Moe, width: int, *, router: str = "gate", up: tuple[str, ...], down: str = "down_proj"
) -> Iterator[Piece]:
    """The router, and each expert's matrices. up: the names of what reads the input, the gate first."""
    yield same(f"{ours}.router.weight", f"{theirs}.{router}.weight", spec.experts, width)
    each = [f"{theirs}.experts.{number}" for number in range(spec.experts)]
    rows = tuple(Theirs(f"{one}.{name}.weight", (spec.width, width)) for one in each for name in up)
    yield Piece(f"{ours}.up", rows)
    yield Piece(f"{ours}.down", tuple(Theirs(f"{one}.{down}.weight", (width, spec.width)) for one in each))
