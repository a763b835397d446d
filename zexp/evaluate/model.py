"""zexp's models behind lm-eval's interface.

Scores do not depend on the batch: a sequence is padded on the right to a multiple of CHUNK, which a causal model does
not see, and every forward pass on a CPU has ROWS rows, because a matrix product's last bits change with its number of rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.utils import get_rolling_token_windows
from tokenizers import Tokenizer

from zexp.data.tokenizer import EOD_ID, encode
from zexp.model.language_model import LanguageModel

CHUNK = 64
ROWS = 8

# (tokens that are seen, tokens that are scored)
Pair = tuple[tuple[int, ...], tuple[int, ...]]


class ZexpLM(LM):
    """Log-likelihoods of a LanguageModel. A text begins after <|eod|>, as documents do in training.

    context_tokens: what the model sees at most; longer contexts lose their beginning. batch_size: rows per forward
    pass on a GPU; on a CPU it is ROWS. on_progress(done, total) is told sequences.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        *,
        context_tokens: int,
        batch_size: int,
        device: str = "cpu",
        on_progress: Callable[[int, int], None] | None = None,
    ):
        super().__init__()
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.context_tokens = context_tokens
        self.rows = ROWS if device == "cpu" else batch_size
        self._device = torch.device(device)
        self._on_progress = on_progress
        self._known: dict[Pair, tuple[float, bool]] = {}

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """(log p(continuation | context) in nats, whether greedy decoding gives it) of each request."""
        pairs = [self._pair(*request.args) for request in requests]
        self._score(pairs)
        return [self._known[pair] for pair in pairs]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """log p(text) in nats of each request: every token once, with as much context as fits."""
        pairs: list[list[Pair]] = []
        for (text,), ids in zip((r.args for r in requests), encode(self.tokenizer, [r.args[0] for r in requests]), strict=True):
            assert isinstance(text, str)
            windows = get_rolling_token_windows(ids, prefix_token=EOD_ID, max_seq_len=self.context_tokens, context_len=1)
            pairs.append([(tuple(context), tuple(scored)) for context, scored in windows])
        self._score([pair for of_text in pairs for pair in of_text])
        return [math.fsum(self._known[pair][0] for pair in of_text) for of_text in pairs]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Not supported: the tasks that zexp ships score likelihoods."""
        names = sorted({str(request.task_name) for request in requests})
        raise ValueError(
            f"{', '.join(names)}: the task generates text, and zexp's lm-eval adapter scores likelihoods only. "
            "Take it out of eval.tasks."
        )

    def _pair(self, context: str, continuation: str) -> Pair:
        """Token ids as lm-eval's own models make them: trailing blanks belong to the continuation, one encoding for both."""
        blanks = len(context) - len(context.rstrip())
        if blanks:
            context, continuation = context[:-blanks], context[-blanks:] + continuation
        whole, seen = encode(self.tokenizer, [context + continuation, context])
        return (EOD_ID, *whole[: len(seen)]), tuple(whole[len(seen) :])

    def _score(self, pairs: Sequence[Pair]) -> None:
        """Fill self._known; equal requests (the same answer in several questions) are computed once."""
        new = sorted({pair for pair in pairs if pair not in self._known}, key=lambda p: (_padded(p, self.context_tokens), p))
        groups: dict[int, list[Pair]] = {}
        for pair in new:
            groups.setdefault(_padded(pair, self.context_tokens), []).append(pair)
        done = 0
        for length, group in groups.items():
            for start in range(0, len(group), self.rows):
                batch = group[start : start + self.rows]
                self._forward(batch, length)
                done += len(batch)
                if self._on_progress is not None:
                    self._on_progress(done, len(new))

    @torch.inference_mode()
    def _forward(self, batch: Sequence[Pair], length: int) -> None:
        tokens_RT = torch.full((self.rows, length), EOD_ID, dtype=torch.int64)
        spans: list[tuple[int, int]] = []
        for row, (seen, scored) in enumerate(batch):
            ids = (seen + scored)[-(self.context_tokens + 1) :]
            tokens_RT[row, : len(ids) - 1] = torch.tensor(ids[:-1])
            spans.append((len(ids) - 1 - len(scored), len(ids) - 1))
        hidden_RTD = self.model(tokens_RT.to(self._device), None)
        for row, (pair, (first, stop)) in enumerate(zip(batch, spans, strict=True)):
            # All positions of a row: the head's product has the same shape whatever is scored.
            logits_SV = self.model.logits(hidden_RTD[row])[first:stop]
            target_S = torch.tensor(pair[1][-(stop - first) :], device=self._device)
            log_p_S = torch.log_softmax(logits_SV.float(), dim=-1).gather(1, target_S[:, None])[:, 0]
            greedy = bool((logits_SV.argmax(dim=-1) == target_S).all())
            self._known[pair] = (float(log_p_S.double().sum()), greedy)


def _padded(pair: Pair, context_tokens: int) -> int:
    """Length of the forward pass: the next multiple of CHUNK."""
    seen = min(len(pair[0]) + len(pair[1]) - 1, context_tokens)
    return -(-seen // CHUNK) * CHUNK
