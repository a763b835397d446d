"""What a layer remembers of the tokens that it has seen, for decoding.

B batch · S positions seen · H heads · P head width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor


class Cache(ABC):
    """The memory of one layer (or of one call of a shared block) for B sequences of the same length."""

    @abstractmethod
    def tensors(self) -> Iterator[Tensor]:
        """What is remembered, without room that is not used yet."""

    def bytes(self) -> int:
        """Size of what is remembered, all sequences together."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors())


class Recurrent(Cache):
    """Tensors of fixed size by name (`cache["state"]`); a layer replaces them, or writes over them, as it reads on.

    Whoever wants to go back keeps a copy (copy.deepcopy of a cache), not the tensors.
    """

    def __init__(self, **tensors: Tensor):
        self._tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        assert tensor.shape == self._tensors[name].shape, f"{name}: {tensor.shape} is not {self._tensors[name].shape}"
        self._tensors[name] = tensor

    def tensors(self) -> Iterator[Tensor]:
        yield from self._tensors.values()


class KeyValues(Cache):
    """Keys and values, (B, S, H, P) each, in room that doubles when it is full.

    window: only the last so many positions are kept; None = all.
    """

    def __init__(self, window: int | None = None):
        self.window = window
        self.seen = 0  # positions, the forgotten ones included: where the next rotary angle starts
        self._kept = 0
        self._room: tuple[Tensor, Tensor] | None = None

    def append(self, k_BTHP: Tensor, v_BTHP: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values that some of the new T positions may see, the new ones last."""
        new = k_BTHP.shape[1]
        self._forget()
        if self._room is None or self._kept + new > self._room[0].shape[1]:
            self._grow(k_BTHP, v_BTHP, new)
        assert self._room is not None
        for room, added in zip(self._room, (k_BTHP, v_BTHP), strict=True):
            room[:, self._kept : self._kept + new] = added
        self._kept += new
        self.seen += new
        keys, values = (room[:, : self._kept] for room in self._room)
        return keys, values

    def tensors(self) -> Iterator[Tensor]:
        self._forget()
        for room in self._room or ():
            yield room[:, : self._kept]

    def _forget(self) -> None:
        if self.window is None or self._room is None or self._kept <= self.window:
            return
        for room in self._room:
            room[:, : self.window] = room[:, self._kept - self.window : self._kept].clone()
        self._kept = self.window

    def _grow(self, k_BTHP: Tensor, v_BTHP: Tensor, new: int) -> None:
        size = 1 << (self._kept + new - 1).bit_length() if self.window is None else self._kept + max(new, self.window)
        grown = []
        for number, added in enumerate((k_BTHP, v_BTHP)):
            room = torch.empty(added.shape[0], size, *added.shape[2:], dtype=added.dtype, device=added.device)
            if self._room is not None:
                room[:, : self._kept] = self._room[number][:, : self._kept]
            grown.append(room)
        self._room = (grown[0], grown[1])
