"""Text from a model, token by token, with its decoding caches. V vocabulary."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from tokenizers import Tokenizer
from torch import Tensor

from zexp.model.language_model import LanguageModel

UNFINISHED = "\ufffd"  # what a decoder makes of bytes that are no whole character
LONGEST = 3  # bytes of a character that lacks its last


@torch.no_grad()
def generate(
    model: LanguageModel,
    prompt: Sequence[int],
    *,
    tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    eod_id: int,
    vocab_size: int | None = None,
) -> Iterator[int]:
    """Up to `tokens` new token ids after a prompt of at least one; ends before the end-of-document token.

    temperature: the logits are divided by it; 0 = the most probable token, whatever top_p. top_p: drawn from the smallest
    set of most probable tokens that have at least this probability together (Holtzman et al. 2019, arXiv:1904.09751).
    seed: of the draws, which are made on the CPU: the same on every device but for rounding of the logits.
    vocab_size: ids from this on are never chosen (rows of the embedding that no token has); None = all may be.
    """
    device = model.embedding.weight.device
    draws = torch.Generator("cpu").manual_seed(seed)
    cache = model.new_cache(1)
    following = list(prompt)
    for _ in range(tokens):
        hidden_1TD = model.decode(torch.tensor([following], device=device), cache)
        logits_V = model.logits(hidden_1TD[0, -1])[:vocab_size].cpu()
        chosen = int(logits_V.argmax()) if temperature == 0 else _drawn(logits_V / temperature, top_p, draws)
        if chosen == eod_id:
            return
        yield chosen
        following = [chosen]


def _drawn(logits_V: Tensor, top_p: float, draws: torch.Generator) -> int:
    return int(torch.multinomial(nucleus(logits_V.double().softmax(-1), top_p), 1, generator=draws))


def nucleus(probabilities_V: Tensor, top_p: float) -> Tensor:
    """The probabilities of the smallest set of most probable tokens that have at least top_p together, the others' 0."""
    if top_p >= 1:
        return probabilities_V
    ordered_V, order_V = probabilities_V.sort(descending=True, stable=True)
    before_V = ordered_V.cumsum(-1) - ordered_V
    return torch.zeros_like(probabilities_V).scatter(-1, order_V, ordered_V * (before_V < top_p))


def text_of(tokenizer: Tokenizer, ids: Iterator[int]) -> Iterator[str]:
    """The text of tokens as they come; bytes of a character that is not whole yet wait for the rest.

    Everything is decoded again with each token, as decoders look at what is before it: 0.1 ms at a thousand tokens.
    """
    seen: list[int] = []
    text, said = "", 0
    for id_ in ids:
        seen.append(id_)
        text = tokenizer.decode(seen)
        sure = len(text) - min(LONGEST, len(text) - len(text.rstrip(UNFINISHED)))
        if sure > said:
            yield text[said:sure]
            said = sure
    if len(text) > said:
        yield text[said:]
