"""Mixture of experts: keys, legality, formulas.

E experts · K chosen for a token · F expert width · D model width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from zexp.blocks.base import BlockSpec, Role, unit_problems
from zexp.kernels.activation.names import GATED, Activation, kept_between


@dataclass(frozen=True, kw_only=True)
class Spec(BlockSpec):
    """E MLPs without biases, of which each token is computed with the K that a linear router chooses for it, weighted
    by the router's probabilities (Shazeer et al. 2017, arXiv:1701.06538). Dropless: every chosen expert computes,
    however uneven their loads are.

    experts: E. top_k: K. width: F of one expert. activation: as an MLP's.
    router: softmax of the logits over all experts, or the sigmoid of each. router_bias: on the logits.
    normalise: the chosen probabilities are divided by their sum (Mixtral: a softmax over the chosen logits); null =
    if K is above 1, for the single weight of K = 1 would always be 1 and the router would learn nothing. Jamba and
    BlackMamba do not. routed_scale: a factor on the weights, after that (DeepSeek-V3, arXiv:2412.19437, eq. 12: 2.5).

    aux_loss: coefficient of E · sum over experts of (share of the choices) · (mean probability), in nats a token and
    layer; 1 at perfect balance for any K (Switch Transformer, arXiv:2101.03961, eq. 4; DeepSeek-V3, eq. 17). A
    sigmoid's probabilities are divided by their sum first.
    z_loss: coefficient of the squared log-sum-exp of the logits, in nats a token and layer (ST-MoE, arXiv:2202.08906,
    eq. 5).
    sinkhorn_iterations: above 0, training chooses from the logits plus an offset per expert that evens out their loads,
    found by so many Sinkhorn iterations (Clark et al. 2022, arXiv:2202.01169; BlackMamba, arXiv:2402.01771); the weights
    stay those of the router, and evaluation chooses from its probabilities. 0 = not.
    bias_rate: above 0, experts are chosen by their probability plus a bias each, which moves by bias_rate after every
    optimizer step: up if the expert had less than the mean load of the global batch, down if more (Wang et al. 2024,
    arXiv:2408.15664, algorithm 1). The biases are part of a state. 0 = not.
    Sinkhorn lets a token's experts depend on the other tokens of its group in training, later ones included.
    routing_group: what aux_loss and Sinkhorn are computed over: each sequence, or each of its documents (where
    document_mask is off, nothing tells the model where one ends: the sequence).

    shared_width: F of an MLP beside the experts that computes every token, 0 = none. shared_gate: its output is scaled
    by the sigmoid of a linear map to one number (Qwen2-MoE, Qwen3-Next).
    """

    ROLE: ClassVar[Role] = "channel"
    NAME: ClassVar[str] = "moe"
    NUMERICS: ClassVar[dict[str, int]] = {"block.moe": 1, "kernel.activation": 1, "kernel.moe": 1}

    SCALED_WIDTHS: ClassVar[tuple[str, ...]] = ("width", "shared_width")
    BF16_SAVED: ClassVar[float] = 3.0

    width: int
    experts: int = 8
    top_k: int = 2
    activation: Activation = "swiglu"
    router: Literal["softmax", "sigmoid"] = "softmax"
    router_bias: bool = False
    normalise: bool | None = None
    routed_scale: float = 1.0
    aux_loss: float = 0.01
    z_loss: float = 0.0
    sinkhorn_iterations: int = 0
    bias_rate: float = 0.0
    routing_group: Literal["sequence", "document"] = "sequence"
    shared_width: int = 0
    shared_gate: bool = False

    @property
    def gated(self) -> bool:
        return self.activation in GATED

    def completed(self, width: int) -> Spec:
        return replace(self, normalise=self.top_k > 1 if self.normalise is None else self.normalise)

    def problems(self, width: int, where: str) -> list[str]:
        found = unit_problems({key: getattr(self, key) for key in ("width", "experts", "top_k")}, where)
        if self.experts >= 1 and self.top_k > self.experts:
            found.append(
                f"{where}.top_k = {self.top_k}: there are only {self.experts} experts to choose from.\n"
                f"  Choose at most {self.experts}, or more experts."
            )
        if self.top_k == 1 and self.normalise:
            found.append(
                f"{where}.normalise = true: with top_k = 1 the one weight would always be 1, and the router would learn "
                f"nothing.\n  Set {where}.normalise to false or null, or choose top_k = 2 or more."
            )
        if self.routed_scale <= 0:
            found.append(f"{where}.routed_scale = {self.routed_scale}: it must be above 0; 1.0 leaves the weights alone.")
        for key in ("aux_loss", "z_loss", "sinkhorn_iterations", "bias_rate", "shared_width"):
            if getattr(self, key) < 0:
                found.append(f"{where}.{key} = {getattr(self, key)}: it must be 0 (none) or above.")
        if self.sinkhorn_iterations > 0 and self.bias_rate > 0:
            found.append(
                f"{where}: sinkhorn_iterations = {self.sinkhorn_iterations} and bias_rate = {self.bias_rate} both say "
                "how experts are chosen.\n  Set one of them to 0."
            )
        if self.experts == 1 and self.router == "softmax":
            found.append(
                f"{where}.experts = 1: a softmax over one expert is always 1, and the router would learn nothing.\n"
                "  Choose more experts, or write the layer as an MLP (d)."
            )
        if self.routing_group == "document" and self.aux_loss == 0 and self.sinkhorn_iterations == 0:
            found.append(
                f"{where}.routing_group = document: neither aux_loss nor sinkhorn_iterations is above 0, so nothing is "
                "computed over groups.\n  Leave routing_group out, or set one of them."
            )
        if self.shared_gate and self.shared_width == 0:
            found.append(
                f"{where}.shared_gate = true: there is no shared expert to gate.\n"
                f"  Set {where}.shared_width, or leave shared_gate out."
            )
        return found

    def _matrices(self, width: int, inner: int) -> int:
        """Parameters of one MLP of that inner width."""
        return (3 if self.gated else 2) * width * inner

    def _around(self, width: int) -> int:
        """Parameters that every token is computed with: the router and the shared expert."""
        router = self.experts * (width + self.router_bias)
        return router + self._matrices(width, self.shared_width) + self.shared_gate * width

    def parameters(self, width: int) -> int:
        return self._around(width) + self.experts * self._matrices(width, self.width)

    def active_parameters(self, width: int) -> int:
        return self._around(width) + self.top_k * self._matrices(width, self.width)

    def flops(self, width: int, seq_len: int) -> float:
        return self.matmul_flops(width)

    def matmul_flops(self, width: int) -> float:
        return 2 * (self.active_parameters(width) - self.experts * self.router_bias)

    def expert_parameters(self, width: int) -> int:
        return self.experts * self._matrices(width, self.width)

    def expert_divides(self) -> dict[str, int]:
        return {"experts": self.experts}

    def tensor_divides(self, width: int) -> dict[str, int] | None:
        return {"width": self.width} | ({"shared_width": self.shared_width} if self.shared_width else {})

    def tensor_parameters(self, width: int, degree: int) -> int:
        cut = self.expert_parameters(width) + self._matrices(width, self.shared_width)
        return self.parameters(width) - cut + cut // degree

    def saved_elements(self, width: int, seq_len: int) -> float:
        parts = 2 if self.gated else 1
        # Probabilities; the order of the choices and the choices themselves, in 8 bytes each; their weights.
        kept = self.experts + 5 * self.top_k
        kept += (self.top_k + 1) * bool(self.completed(width).normalise)  # before their sum divides them, and the sum
        if self.z_loss > 0:
            kept += self.experts + 1  # logits and their log-sum-exp
        if self.aux_loss > 0 and self.router == "sigmoid":
            kept += 1  # the sum of the probabilities
        kept += self.top_k * parts * self.width  # the experts' activations are computed again
        kept += self.shared_width * kept_between(self.activation)
        return width + kept + self.shared_gate * (width + 1)
