"""A resolved pattern as a stack of blocks between an embedding and a head. B batch · T positions · D width · V vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zexp.blocks import pattern
from zexp.blocks.base import BlockSpec, FeederSpec
from zexp.blocks.init import Draw
from zexp.blocks.norm import RmsNorm
from zexp.blocks.resolve import specs_of, stack_of
from zexp.blocks.table import layer_module
from zexp.kernels.cross_entropy.torch_backend import linear_cross_entropy
from zexp.kernels.documents import Documents


class Residual(nn.Module):
    """h + sum of branch(norm(h + fed)): one norm before all branches; what is fed does not stay in the residual."""

    def __init__(self, layer: str, specs: Mapping[str, BlockSpec], width: int, eps: float):
        super().__init__()
        self.norm = RmsNorm(width, eps)
        self.branches = nn.ModuleDict(
            {letter: layer_module(letter).Layer(specs[letter], width, eps) for letter in pattern.branches(layer)}
        )
        self.feeder = pattern.feeder(layer)
        self.call = None if self.feeder is None else layer_module(self.feeder).Call(specs[self.feeder], width, eps)

    def initialise(self, draw: Draw) -> None:
        self.norm.initialise(draw)
        if self.call is not None:
            self.call.initialise(draw)
        for branch in self.branches.values():
            branch.initialise(draw)  # type: ignore[operator]

    def forward(self, hidden_BTD: Tensor, fed_BTD: Tensor | None, documents: Documents | None) -> Tensor:
        normed = self.norm(hidden_BTD if fed_BTD is None else hidden_BTD + fed_BTD)
        for branch in self.branches.values():
            hidden_BTD = hidden_BTD + branch(normed, documents)
        return hidden_BTD


class LanguageModel(nn.Module):
    """Token ids to hidden states, logits and loss. `model` is the semantic block of resolve_model."""

    def __init__(self, model: Mapping[str, Any]):
        super().__init__()
        self.semantic = dict(model)
        specs = specs_of(model)
        stack, layers = stack_of(model), model["pattern"]
        width, eps = stack.width, stack.norm.eps
        self.embedding = nn.Embedding(model["vocab_size"], width)
        self.shared = nn.ModuleDict(
            {
                letter: nn.ModuleList(layer_module(letter).Shared(spec, width, eps) for _ in range(spec.copies))
                for letter, spec in specs.items()
                if isinstance(spec, FeederSpec)
            }
        )
        self.layers = nn.ModuleList(Residual(layer, specs, width, eps) for layer in layers)
        self.norm = RmsNorm(width, eps)
        self.head = None if stack.tie_embeddings else nn.Linear(width, model["vocab_size"], bias=False)

    def initialise(self, generator: torch.Generator) -> None:
        """Draws every parameter; the model must be on the CPU in fp32."""
        writes = sum(len(pattern.branches(layer)) for layer in self.semantic["pattern"])
        draw = Draw(generator, writes)
        draw.normal(self.embedding.weight)
        for copies in self.shared.values():
            for copy in copies:  # type: ignore[attr-defined]
                copy.initialise(draw)
        for layer in self.layers:
            layer.initialise(draw)  # type: ignore[operator]
        self.norm.initialise(draw)
        if self.head is not None:
            draw.linear(self.head)

    def forward(self, tokens_BT: Tensor, documents_BT: Tensor | None = None) -> Tensor:
        """Hidden states after the final norm, (B, T, D).

        documents_BT: document id of each token, non-decreasing along T; nothing passes from one document to the next.
        None = each row is one document, and no mask is computed.
        """
        documents = None if documents_BT is None else Documents(documents_BT)
        embedded = hidden = self.embedding(tokens_BT)
        calls = dict.fromkeys(self.shared, 0)
        for layer in self.layers:
            fed = None
            if layer.feeder is not None:
                copies: Any = self.shared[layer.feeder]  # type: ignore[index]
                copy = copies[calls[layer.feeder] % len(copies)]  # type: ignore[index]
                calls[layer.feeder] += 1  # type: ignore[index]
                fed = copy(hidden, embedded, layer.call, documents)
            hidden = layer(hidden, fed, documents)
        return self.norm(hidden)

    @property
    def head_weight(self) -> Tensor:
        """(V, D): the head's own matrix, or the embedding."""
        return self.embedding.weight if self.head is None else self.head.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., V) in fp32, from (..., D)."""
        return F.linear(hidden, self.head_weight.to(hidden.dtype)).float()

    def loss_sum(self, hidden_BTD: Tensor, labels_BT: Tensor) -> Tensor:
        """Sum of -log p(label) in nats over all labels but -100: a differentiable fp32 scalar.

        Logits exist for a slice of tokens at a time and are not kept for the backward pass.
        """
        return linear_cross_entropy(hidden_BTD.flatten(0, 1), self.head_weight, labels_BT.flatten())
