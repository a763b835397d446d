"""A resolved pattern as a stack of blocks between an embedding and a head. B batch · T positions · D width · V vocabulary."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from zexp.blocks import pattern
from zexp.blocks.base import BlockSpec, FeederSpec
from zexp.blocks.cache import Cache, KeyValues
from zexp.blocks.context import Context
from zexp.blocks.init import Draw
from zexp.blocks.layer import BlockLayer, Place
from zexp.blocks.norm import norm
from zexp.blocks.resolve import Stack, specs_of, stack_of
from zexp.blocks.table import layer_module
from zexp.kernels.dispatch import TORCH, Kernels
from zexp.kernels.documents import Documents


@dataclass
class LayerCache:
    """What one layer remembers: each branch by its letter, and the call of the shared block that feeds it."""

    branches: dict[str, Cache | None]
    call: KeyValues | None

    def caches(self) -> Iterator[Cache]:
        yield from (cache for cache in self.branches.values() if cache is not None)
        if self.call is not None:
            yield self.call


@dataclass
class ModelCache:
    """What a model remembers of B sequences of the same length."""

    layers: list[LayerCache]

    def bytes(self) -> int:
        return sum(cache.bytes() for layer in self.layers for cache in layer.caches())


class Residual(nn.Module):
    """h + joined branches of norm(h + fed); what is fed does not stay in the residual."""

    def __init__(self, layer: str, specs: Mapping[str, BlockSpec], stack: Stack, places: Mapping[str, Place]):
        super().__init__()
        width, eps, kind = stack.width, stack.norm.eps, stack.norm.kind
        letters = pattern.branches(layer)
        self.parallel = stack.parallel if len(letters) > 1 else None
        separate = self.parallel is not None and self.parallel.norms == "separate"
        self.norm = None if separate else norm(kind, width, eps)
        self.norms = nn.ModuleDict({letter: norm(kind, width, eps) for letter in letters}) if separate else None
        self.branches = nn.ModuleDict(
            {letter: layer_module(letter).Layer(specs[letter], width, eps, places[letter]) for letter in letters}
        )
        scaled = self.parallel is not None and self.parallel.combine == "scaled_mean"
        self.out_norms = nn.ModuleDict({letter: norm(kind, width, eps) for letter in letters}) if scaled else None
        self.feeder = pattern.feeder(layer)
        self.call = None if self.feeder is None else layer_module(self.feeder).Call(specs[self.feeder], width, eps)

    def initialise(self, draw: Draw) -> None:
        parts: list[Any] = [self.norm, *(self.norms or {}).values(), self.call, *self.branches.values()]
        for part in (*parts, *(self.out_norms or {}).values()):
            if part is not None:
                part.initialise(draw)

    def forward(self, hidden_BTD: Tensor, fed_BTD: Tensor | None, context: Context) -> Tensor:
        inputs = self._normed(hidden_BTD, fed_BTD)
        outputs = {letter: branch(inputs[letter], context) for letter, branch in self.branches.items()}
        return self._joined(hidden_BTD, outputs)

    def new_cache(self, batch: int, like: Tensor, shared: nn.Module | None) -> LayerCache:
        branches = {letter: branch.new_cache(batch, like) for letter, branch in self.branches.items()}  # type: ignore[operator]
        return LayerCache(branches, None if shared is None else shared.new_cache())  # type: ignore[operator]

    def decode(self, hidden_BTD: Tensor, fed_BTD: Tensor | None, cache: LayerCache, context: Context) -> Tensor:
        inputs = self._normed(hidden_BTD, fed_BTD)
        outputs = {
            letter: branch.decode(inputs[letter], cache.branches[letter], context)  # type: ignore[operator]
            for letter, branch in self.branches.items()
        }
        return self._joined(hidden_BTD, outputs)

    def _normed(self, hidden_BTD: Tensor, fed_BTD: Tensor | None) -> dict[str, Tensor]:
        """Each branch's input."""
        entered = hidden_BTD if fed_BTD is None else hidden_BTD + fed_BTD
        if self.norms is not None:
            return {letter: one(entered) for letter, one in self.norms.items()}
        assert self.norm is not None
        return dict.fromkeys(self.branches, self.norm(entered))

    def _joined(self, hidden_BTD: Tensor, outputs: dict[str, Tensor]) -> Tensor:
        mean = self.parallel is not None and self.parallel.combine != "sum"
        for letter, output in outputs.items():
            scaled = output if self.out_norms is None else self.out_norms[letter](output)
            hidden_BTD = hidden_BTD + (scaled / len(outputs) if mean else scaled)
        return hidden_BTD


def _places(layers: Sequence[str]) -> list[dict[str, Place]]:
    """For every layer, which one of its letter each branch is."""
    counts = Counter(letter for layer in layers for letter in pattern.branches(layer))
    seen: Counter[str] = Counter()
    places = []
    for layer in layers:
        places.append({letter: Place(seen[letter], counts[letter]) for letter in pattern.branches(layer)})
        seen.update(pattern.branches(layer))
    return places


class _Recomputed:
    """One layer with what feeds it, which keeps its inputs alone: the backward pass runs it a second time.

    The same function of the same numbers, so the same bits; a layer draws nothing at random.
    """

    def __init__(self, layer: nn.Module, copy: nn.Module | None, context: Context):
        self._layer, self._copy, self._context = layer, copy, context
        self._notes = dict(context.notes)  # as the layer finds them, both times
        self._again = False

    def __call__(self, hidden_BTD: Tensor, embedded_BTD: Tensor) -> Tensor:
        made: list[Tensor] = checkpoint(
            self._run, hidden_BTD, embedded_BTD, use_reentrant=False, preserve_rng_state=False
        )
        hidden_BTD, *auxiliary = made
        if self._context.auxiliary is not None:
            self._context.auxiliary.extend(auxiliary)
        return hidden_BTD

    def _run(self, hidden_BTD: Tensor, embedded_BTD: Tensor) -> list[Tensor]:
        """The hidden states and the losses of the layer's own."""
        auxiliary: list[Tensor] | None = None if self._context.auxiliary is None else []
        notes = dict(self._notes) if self._again else self._context.notes
        context = replace(self._context, auxiliary=auxiliary, notes=notes, recomputed=self._again)
        self._again = True
        return [_through(self._layer, self._copy, hidden_BTD, embedded_BTD, context), *(auxiliary or [])]


def _through(
    layer: nn.Module, copy: nn.Module | None, hidden_BTD: Tensor, embedded_BTD: Tensor, context: Context
) -> Tensor:
    fed = None if copy is None else copy(hidden_BTD, embedded_BTD, layer.call, context)
    after_BTD: Tensor = layer(hidden_BTD, fed, context)
    return after_BTD


class LanguageModel(nn.Module):
    """Token ids to hidden states, logits and loss. `model` is the semantic block of resolve_model.

    recomputes: a pass with gradients keeps the inputs of layers alone and computes the rest again (activation checkpointing,
    Chen et al. 2016, arXiv:1604.06174): about a third more arithmetic, the same bits.
    """

    kernels: Kernels = TORCH
    recomputes: bool = False

    def __init__(self, model: Mapping[str, Any]):
        super().__init__()
        self.semantic = dict(model)
        specs = specs_of(model)
        stack, layers = stack_of(model), model["pattern"]
        width, eps = stack.width, stack.norm.eps
        self.softcap = stack.logit_softcap
        self.embedding = nn.Embedding(model["vocab_size"], width)
        self.embedding_norm = norm(stack.norm.kind, width, eps) if stack.norm.embedding else None
        self.shared = nn.ModuleDict(
            {
                letter: nn.ModuleList(layer_module(letter).Shared(spec, width, eps) for _ in range(spec.copies))
                for letter, spec in specs.items()
                if isinstance(spec, FeederSpec)
            }
        )
        self.layers = nn.ModuleList(
            Residual(layer, specs, stack, places) for layer, places in zip(layers, _places(layers), strict=True)
        )
        self.norm = norm(stack.norm.final or stack.norm.kind, width, eps)
        self.head = None if stack.tie_embeddings else nn.Linear(width, model["vocab_size"], bias=False)

    def initialise(self, generator: torch.Generator) -> None:
        """Draws every parameter; the model must be on the CPU in fp32."""
        writes = sum(len(pattern.branches(layer)) for layer in self.semantic["pattern"])
        draw = Draw(generator, writes)
        draw.normal(self.embedding.weight)
        if self.embedding_norm is not None:
            self.embedding_norm.initialise(draw)
        for copies in self.shared.values():
            for copy in copies:  # type: ignore[attr-defined]
                copy.initialise(draw)
        for layer in self.layers:
            layer.initialise(draw)  # type: ignore[operator]
        self.norm.initialise(draw)
        if self.head is not None:
            draw.linear(self.head)

    def forward(
        self, tokens_BT: Tensor, documents_BT: Tensor | None = None, auxiliary: list[Tensor] | None = None
    ) -> Tensor:
        """Hidden states after the final norm, (B, T, D).

        documents_BT: document id of each token, non-decreasing along T; nothing passes from one document to the next.
        None = each row is one document, and no mask is computed.
        auxiliary: the blocks' own losses are appended to it, scalars summed over the batch's tokens; None = not computed.
        """
        context = Context(None if documents_BT is None else Documents(documents_BT), auxiliary)
        embedded = hidden = self._embedded(tokens_BT)
        for layer, copy in zip(self.layers, self._copies(), strict=True):
            if self.recomputes and torch.is_grad_enabled():
                hidden = _Recomputed(layer, copy, context)(hidden, embedded)
            else:
                hidden = _through(layer, copy, hidden, embedded, context)
        return self.norm(hidden)

    def new_cache(self, batch: int) -> ModelCache:
        """The memory before the first token of `batch` sequences."""
        like = self.embedding.weight
        copies = self._copies()
        return ModelCache(
            [layer.new_cache(batch, like, copy) for layer, copy in zip(self.layers, copies, strict=True)]  # type: ignore[operator]
        )

    @torch.no_grad()
    def decode(self, tokens_BT: Tensor, cache: ModelCache) -> Tensor:
        """Hidden states after the final norm, (B, T, D), of the next T >= 1 tokens after those that the cache has seen."""
        context = Context()
        embedded = hidden = self._embedded(tokens_BT)
        for layer, copy, own in zip(self.layers, self._copies(), cache.layers, strict=True):
            fed = None if copy is None else copy.decode(hidden, embedded, layer.call, own.call)  # type: ignore[operator]
            hidden = layer.decode(hidden, fed, own, context)  # type: ignore[operator]
        return self.norm(hidden)

    def step_counts(self) -> list[Tensor]:
        """What the blocks counted over this step's tokens for after_step (BlockLayer.step_counts)."""
        return [counts for branch in self._branches() for counts in branch.step_counts()]

    def after_step(self) -> None:
        """To be called after every optimizer step: what blocks change by a rule and not by a gradient."""
        for branch in self._branches():
            branch.after_step()

    def _branches(self) -> Iterator[BlockLayer]:
        for layer in self.layers:
            yield from layer.branches.values()  # type: ignore[union-attr,operator,misc]

    @property
    def head_weight(self) -> Tensor:
        """(V, D): the head's own matrix, or the embedding."""
        return self.embedding.weight if self.head is None else self.head.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., V) in fp32 at least, from (..., D)."""
        logits = self.kernels.linear(hidden, self.head_weight.to(hidden.dtype))
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def loss_sum(self, hidden_BTD: Tensor, labels_BT: Tensor) -> Tensor:
        """Sum of -log p(label) in nats over all labels but -100: a differentiable fp32 scalar.

        Logits exist for a slice of tokens at a time and are not kept for the backward pass.
        """
        return self.kernels.linear_cross_entropy(
            hidden_BTD.flatten(0, 1), self.head_weight, labels_BT.flatten(), softcap=self.softcap
        )

    def _embedded(self, tokens_BT: Tensor) -> Tensor:
        embedded = self.embedding(tokens_BT)
        return embedded if self.embedding_norm is None else self.embedding_norm(embedded)

    def _copies(self) -> list[nn.Module | None]:
        """The shared block that feeds each layer: its copies in turn, or None."""
        calls = dict.fromkeys(self.shared, 0)
        chosen: list[nn.Module | None] = []
        for layer in self.layers:
            feeder: Any = layer.feeder
            if feeder is None:
                chosen.append(None)
                continue
            copies: Any = self.shared[feeder]
            chosen.append(copies[calls[feeder] % len(copies)])
            calls[feeder] += 1
        return chosen
