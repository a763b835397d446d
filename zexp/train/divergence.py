"""When a training has diverged.

Diverged is a result, not a crash: it is recorded once and shown in the table. Two rules:

    at once     the loss or the gradients' norm of a step is not finite (its update is never applied);
    sustained   for `steps` consecutive steps the loss is above ln V + `margin`.

ln V is the loss of the uniform guess over a vocabulary of V, about where every model starts, so a model that stays
`margin` nats above it knows less than nothing. A spike that recovers is no divergence.
"""

import math
from dataclasses import dataclass


@dataclass
class Watch:
    """Sees each step's loss and gradient norm. `above` counts the consecutive steps above the bound; it is part of
    a state, so that an interrupted run diverges at the same step as an undisturbed one."""

    vocab_size: int
    margin: float
    steps: int
    above: int = 0

    def see(self, loss: float, grad_norm: float) -> str | None:
        """The reason, in words, if the training has diverged at this step."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not math.isfinite(grad_norm):
            return f"the gradients' norm is {grad_norm} at a loss of {loss:.4g}"
        bound = math.log(self.vocab_size) + self.margin
        self.above = self.above + 1 if loss > bound else 0
        if self.above >= self.steps:
            return f"the loss is {loss:.4g}, {self.above} steps in a row above ln V + {self.margin:g} = {bound:.4g}"
        return None
