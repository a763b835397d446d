"""What one pass through the model, over whole sequences or in decoding, hands to every block besides its input."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from zexp.kernels.documents import Documents


@dataclass(frozen=True)
class Context:
    """documents: boundaries that nothing may cross; None = each row is one document.

    auxiliary: where a block puts losses of its own (a router's balance), each a differentiable scalar *summed* over
    the batch's tokens, in nats, so that micro-batches add up; None = nobody collects them, and none is computed.

    notes: what a layer leaves for later ones of the same pass, by name (RWKV-7's values of the first layer).

    recomputed: the pass is run again for its gradients, so that nothing is counted a second time.
    """

    documents: Documents | None = None
    auxiliary: list[Tensor] | None = None
    notes: dict[str, Tensor] = field(default_factory=dict)
    recomputed: bool = False
