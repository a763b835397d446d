"""Mixture of experts as a module.

B batch · T positions · M = B · T tokens · D model width · E experts · K chosen for a token · F expert width · H rows of
`up`: F, or 2F with a gate.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from zexp.blocks.cache import Cache
from zexp.blocks.context import Context
from zexp.blocks.init import Draw
from zexp.blocks.layer import BlockLayer, Place
from zexp.blocks.linear import Linear
from zexp.blocks.moe.balance import Groups, aux_loss, sinkhorn_offsets, z_loss
from zexp.blocks.moe.spec import Spec
from zexp.kernels.moe.torch_backend import load
from zexp.kernels.precision import at_least_fp32

SMALLEST_SUM = 1e-20  # of sigmoids: all of them may be 0 in fp32


class Layer(BlockLayer):
    """sum over the K chosen experts of weight · down(act(up(x))), plus the shared expert.

    Of a gated activation `up` holds the gate's rows first, then up's.
    """

    DECAYED = ("up", "down")

    def __init__(self, spec: Spec, width: int, eps: float, place: Place):
        super().__init__()
        self.spec = spec
        parts = 2 if spec.gated else 1
        self.router = Linear(width, spec.experts, bias=spec.router_bias)
        self.up = nn.Parameter(torch.empty(spec.experts, parts * spec.width, width))
        self.down = nn.Parameter(torch.empty(spec.experts, width, spec.width))
        self.shared_up = self.shared_down = self.shared_gate = None
        if spec.shared_width > 0:
            self.shared_up = Linear(width, parts * spec.shared_width, bias=False)
            self.shared_down = Linear(spec.shared_width, width, bias=False)
        if spec.shared_gate:
            self.shared_gate = Linear(width, 1, bias=False)
        if spec.bias_rate > 0:
            self.register_buffer("choice_bias", torch.empty(spec.experts))
        self._load_E: Tensor | None = None  # choices of this step so far; in no state, which is of a step's end

    def initialise(self, draw: Draw) -> None:
        draw.linear(self.router)
        draw.normal(self.up)
        draw.residual(self.down)
        if self.shared_up is not None and self.shared_down is not None:
            draw.linear(self.shared_up)
            draw.linear(self.shared_down, residual=True)
        if self.shared_gate is not None:
            draw.linear(self.shared_gate)
        if self.spec.bias_rate > 0:
            draw.constant(self.get_buffer("choice_bias"), 0.0)

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        chosen_KM, weights_KM = self._routed(x_BTD, context, balanced=self.training)
        if self.training:
            return self._mixed(x_BTD, chosen_KM, weights_KM)
        # Where a token lies among those of its expert changes the last bits of its products on a CPU. A score must not
        # depend on what else is in the batch (zexp/evaluate/model.py), so each sequence is dispatched by itself.
        batch, length = x_BTD.shape[:2]
        tokens = [slice(row * length, (row + 1) * length) for row in range(batch)]
        rows = zip(x_BTD.split(1), tokens, strict=True)
        return torch.cat([self._mixed(x_1TD, chosen_KM[:, own], weights_KM[:, own]) for x_1TD, own in rows])

    def decode(self, x_BTD: Tensor, cache: Cache | None, context: Context) -> Tensor:
        return self._mixed(x_BTD, *self._routed(x_BTD, context, balanced=False))

    def step_counts(self) -> list[Tensor]:
        return [] if self._load_E is None else [self._load_E]

    @torch.no_grad()
    def after_step(self) -> None:
        """Moves the biases of the choice by the sign of the load error: integers, so however the batch was cut."""
        if self._load_E is not None:
            below_mean_E = (self._load_E.sum() - self.spec.experts * self._load_E).sign()
            bias_E = self.get_buffer("choice_bias")
            bias_E += self.spec.bias_rate * below_mean_E.to(bias_E.dtype)
            self._load_E = None

    def _routed(self, x_BTD: Tensor, context: Context, balanced: bool) -> tuple[Tensor, Tensor]:
        """(K, M) each: every token's experts and their weights. balanced: training, where Sinkhorn has a say."""
        documents = context.documents if self.spec.routing_group == "document" else None
        groups = Groups((x_BTD.shape[0], x_BTD.shape[1]), documents)
        # Routers are computed in fp32: rounding changes which experts are chosen (Switch Transformer, section 2.4).
        with torch.autocast(x_BTD.device.type, enabled=False):
            logits_EM = self._logits(x_BTD.flatten(0, 1))
            probabilities_EM = logits_EM.softmax(0) if self.spec.router == "softmax" else logits_EM.sigmoid()
            chosen_KM = self._chosen(logits_EM.detach(), probabilities_EM.detach(), groups, balanced)
            weights_KM = self._weights(probabilities_EM, chosen_KM)
            if context.auxiliary is not None:
                self._account(logits_EM, probabilities_EM, chosen_KM, groups, context)
        return chosen_KM, weights_KM

    def _mixed(self, x_BTD: Tensor, chosen_KM: Tensor, weights_KM: Tensor) -> Tensor:
        x_MD = x_BTD.flatten(0, 1)
        out_MD = self.kernels.moe(x_MD, chosen_KM, weights_KM, self.up, self.down, self.spec.activation)
        return (out_MD if self.shared_up is None else out_MD + self._shared(x_MD)).view_as(x_BTD)

    def _logits(self, x_MD: Tensor) -> Tensor:
        bias_E = self.router.bias
        logits_EM: Tensor = _Logits.apply(x_MD, self.router.weight)
        return logits_EM if bias_E is None else logits_EM + bias_E.to(logits_EM.dtype)[:, None]

    @torch.no_grad()
    def _chosen(self, logits_EM: Tensor, probabilities_EM: Tensor, groups: Groups, balanced: bool) -> Tensor:
        """(K, M): each token's experts, the first choice first."""
        scores_EM = logits_EM  # in the order of the probabilities, which may round to 1 or 0 and tie
        if balanced and self.spec.sinkhorn_iterations > 0:
            scores_EM = logits_EM + sinkhorn_offsets(logits_EM, groups, self.spec.sinkhorn_iterations)
        elif self.spec.bias_rate > 0:
            scores_EM = probabilities_EM + self.get_buffer("choice_bias")[:, None]
        return scores_EM.topk(self.spec.top_k, dim=0).indices

    def _weights(self, probabilities_EM: Tensor, chosen_KM: Tensor) -> Tensor:
        weights_KM = probabilities_EM.gather(0, chosen_KM)
        if self.spec.normalise:
            weights_KM = weights_KM / (weights_KM.sum(0) + SMALLEST_SUM)
        return weights_KM if self.spec.routed_scale == 1.0 else weights_KM * self.spec.routed_scale

    def _account(
        self, logits_EM: Tensor, probabilities_EM: Tensor, chosen_KM: Tensor, groups: Groups, context: Context
    ) -> None:
        """The losses of this layer's own, and the loads that after_step reads."""
        auxiliary = context.auxiliary
        assert auxiliary is not None
        if self.spec.aux_loss > 0:
            shares_EM = probabilities_EM
            if self.spec.router == "sigmoid":
                shares_EM = probabilities_EM / (probabilities_EM.sum(0) + SMALLEST_SUM)
            auxiliary.append(self.spec.aux_loss * aux_loss(shares_EM, chosen_KM, groups))
        if self.spec.z_loss > 0:
            auxiliary.append(self.spec.z_loss * z_loss(logits_EM))
        if self.training and self.spec.bias_rate > 0 and not context.recomputed:
            load_E = load(chosen_KM, self.spec.experts)
            self._load_E = load_E if self._load_E is None else self._load_E + load_E

    def _shared(self, x_MD: Tensor) -> Tensor:
        """What the expert that computes every token adds."""
        assert self.shared_up is not None and self.shared_down is not None
        shared_MD: Tensor = self.shared_down(self.kernels.mlp_activation(self.shared_up(x_MD), self.spec.activation))
        return shared_MD if self.shared_gate is None else shared_MD * self.shared_gate(x_MD).sigmoid()


class _Logits(torch.autograd.Function):
    """weight x^T, (E, M), in fp32 at least. Of x nothing is kept in fp32: it is made again where it is used again."""

    @staticmethod
    def forward(ctx: Any, x_MD: Tensor, weight_ED: Tensor) -> Tensor:
        ctx.save_for_backward(x_MD, weight_ED)
        exact_MD = at_least_fp32(x_MD)
        return torch.mm(weight_ED.to(exact_MD.dtype), exact_MD.t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (dlogits_EM,), (x_MD, weight_ED) = grads, ctx.saved_tensors
        dx_MD = torch.mm(weight_ED.to(dlogits_EM.dtype).t(), dlogits_EM).t()
        dweight_ED = torch.mm(dlogits_EM, at_least_fp32(x_MD))
        return dx_MD.to(x_MD.dtype), dweight_ED.to(weight_ED.dtype)
