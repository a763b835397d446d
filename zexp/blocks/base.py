"""What every block's Spec answers.

D model width · s sequence length. FLOPs count a multiply-add as two and are those of one forward pass per token;
attention scores are causal. Bytes are those of decoding one sequence.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from zexp.config.identity import absents, table_dict

Role = Literal["mixer", "channel", "feeder"]


@dataclass(frozen=True, kw_only=True)
class BlockSpec(ABC):
    """The keys of one block; a subclass adds its own as dataclass fields.

    All of them are semantic. A key that is added to a block that results were made with declares the value that means
    "as before": `softcap: float = semantic(0.0, absent=0.0)`, see zexp.config.identity. `completed` gets that value
    too; where it makes something else of it (null -> heads), that something is as before and must stay so.

    ROLE: mixer (mixes along the sequence), channel (mixes channels), feeder (a shared block whose output is added
    to the input of the layer it is written with).
    NUMERICS: version of the mathematics of the block and of the kernels it calls; enters the ids that use it.
    SCALED_WIDTHS, SCALED_HEADS: keys that grow with the model width where a size is solved for (zexp.calc.match): inner
    widths, and counts of heads whose own width stays.
    BF16_SAVED: mean bytes of one of the saved_elements under bf16 autocast: 2 where products of activations are most of
    it, 4 where the block computes in fp32 whatever the precision.
    """

    ROLE: ClassVar[Role]
    NAME: ClassVar[str]
    NUMERICS: ClassVar[dict[str, int]]
    SCALED_WIDTHS: ClassVar[tuple[str, ...]] = ()
    SCALED_HEADS: ClassVar[tuple[str, ...]] = ()
    BF16_SAVED: ClassVar[float] = 4.0

    def numerics(self) -> dict[str, int]:
        """NUMERICS, with what further options add to it."""
        return self.NUMERICS

    def completed(self, width: int) -> BlockSpec:
        """The same spec with every default that depends on the width filled in."""
        return self

    @abstractmethod
    def problems(self, width: int, where: str) -> list[str]:
        """What is illegal, one text each; `where` is the table's name ("arch.blocks.a")."""

    @abstractmethod
    def parameters(self, width: int) -> int:
        """Parameters of one layer, or of one copy of a feeder; the norm before a layer is not included."""

    def missing_in_first(self, width: int) -> int:
        """Of `parameters`, those that the model's first layer of this block does not have."""
        return 0

    def active_parameters(self, width: int) -> int:
        """Of `parameters`, those that one token is computed with."""
        return self.parameters(width)

    @abstractmethod
    def flops(self, width: int, seq_len: int) -> float:
        """Forward FLOPs per token of one layer, or of one call of a feeder."""

    @abstractmethod
    def matmul_flops(self, width: int) -> float:
        """The part of `flops` in products of activations with weight matrices (torch's aten.mm and addmm): without
        convolutions, scans and scores.
        """

    @abstractmethod
    def saved_elements(self, width: int, seq_len: int) -> float:
        """Numbers per token that one layer or call keeps for its backward pass with the torch backend, in fp32, its
        normed input included.
        """

    def kv_bytes_per_token(self, width: int, element_bytes: int) -> int:
        """Cache that grows with the context, per layer or call."""
        return 0

    def state_bytes(self, width: int, element_bytes: int) -> int:
        """Cache of fixed size, per layer or call. Recurrent states are kept in fp32 at least (scan_bytes), what a
        convolution or a shift looks back at in the model's own precision.
        """
        return 0

    def cache_bytes(self, width: int, context: int, element_bytes: int) -> int:
        """The whole cache of one sequence after `context` tokens, per layer or call."""
        return context * self.kv_bytes_per_token(width, element_bytes) + self.state_bytes(width, element_bytes)

    def decode_flops(self, width: int, context: int) -> float:
        """FLOPs of one further token after `context` - 1 others: for a recurrence, those of a sequence of one."""
        return self.flops(width, 1)

    def expert_parameters(self, width: int) -> int:
        """Of `parameters`, those that expert parallelism spreads over devices."""
        return 0

    def expert_divides(self) -> dict[str, int]:
        """Sizes that a degree of expert parallelism must divide, by key."""
        return {}

    def tensor_divides(self, width: int) -> dict[str, int] | None:
        """Sizes that a degree of tensor parallelism must divide, by name; None = the block cannot be cut."""
        return None

    def tensor_parameters(self, width: int, degree: int) -> int:
        """Of `parameters`, those that each of `degree` tensor-parallel devices holds."""
        return self.parameters(width)

    def saved_whole(self, width: int) -> float:
        """Of `saved_elements`, those that every tensor-parallel device keeps in full: the inputs of cut matrices."""
        return width

    def table(self, width: int) -> dict[str, Any]:
        """The completed keys as plain data, as they stand in a model's semantic block.

        A key is left out where its `absent` value, completed, makes the same spec: so an explicit kv_heads=heads and
        a null that becomes it are one block.
        """
        full = self.completed(width)
        short = full
        left_out: set[str] = set()
        for key, absent in absents(full).items():
            without = replace(short, **{key: absent})
            if without.completed(width) == full:
                short = without
                left_out.add(key)
        return {key: value for key, value in table_dict(full).items() if key not in left_out}


@dataclass(frozen=True, kw_only=True)
class FeederSpec(BlockSpec):
    """A block with `copies` sets of shared weights, called in turn, and weights of its own for every call."""

    ROLE: ClassVar[Role] = "feeder"
    copies: int = 1

    @abstractmethod
    def call_parameters(self, width: int) -> int:
        """Parameters that belong to one call alone."""

    def call_tensor_parameters(self, width: int, degree: int) -> int:
        """Of `call_parameters`, those that each of `degree` tensor-parallel devices holds."""
        return self.call_parameters(width)


def scan_bytes(element_bytes: int) -> int:
    """Bytes of one number of a recurrent state in a model whose numbers have element_bytes."""
    return max(4, element_bytes)


def unit_problems(values: dict[str, int], where: str) -> list[str]:
    """A problem for each size below 1."""
    return [f"{where}.{key} = {value}: it must be at least 1." for key, value in values.items() if value < 1]
