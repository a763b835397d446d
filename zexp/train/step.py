"""The gradient of one optimizer step: the global batch in micro-batches.

The loss is the mean over the labels of the *global* batch, so how it is cut changes the last bits and nothing else.
A step draws no random numbers: there is no generator whose state would have to be stored.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from zexp.model.language_model import LanguageModel
from zexp.train.batches import Batch
from zexp.train.legality import PRECISIONS


def backward(
    model: LanguageModel,
    batch: Batch,
    *,
    micro_batch: int,
    precision: str,
    document_mask: bool,
    labels: int | None = None,
) -> Tensor:
    """Add the gradients of the batch's mean loss to the parameters' .grad; the loss in nats a token, a scalar.

    The blocks' own losses (a router's balance) add to the gradients and not to the loss that is returned.

    micro_batch: sequences of a forward pass. precision: fp32, or bf16 (autocast; weights, gradients and the loss stay
    fp32). document_mask: nothing passes from one document to the next. labels: of the global batch, where `batch` is a
    part of it, and loss and gradients are this part's addends; None = the batch is whole.
    """
    count = batch.labels_BT.numel() if labels is None else labels
    total = torch.zeros((), device=batch.inputs_BT.device)
    for part in batch.micro_batches(micro_batch):
        with arithmetic(precision, batch.inputs_BT.device.type):
            auxiliary: list[Tensor] = []
            hidden_BTD = model(part.inputs_BT, part.documents_BT if document_mask else None, auxiliary)
            loss = model.loss_sum(hidden_BTD, part.labels_BT) / count
        total += loss.detach()
        for extra in auxiliary:
            loss = loss + extra / count
        loss.backward()
    return total


def arithmetic(precision: str, device_type: str) -> AbstractContextManager[None]:
    """In which a forward pass computes: fp32 as it stands, or bf16 by autocast. Raises ValueError for another precision."""
    if precision == "fp32":
        return nullcontext()
    if precision == "bf16":
        return torch.autocast(device_type, dtype=torch.bfloat16)  # type: ignore[no-any-return]
    raise ValueError(f"precision = {precision!r}; one of: {', '.join(PRECISIONS)}")
