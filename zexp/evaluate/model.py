"""zexp's models as lm-eval sees them.

A request is a text to score after a context. Both become token ids behind one eod, as a document begins in training, and
are scored in fp32, in rows of their own.

A score does not depend on the eval batch size, on the other requests or on padding, bit for bit on a CPU at fixed threads:
rows are right-padded to a multiple of PAD and only rows of equal length share a forward pass, so a row's matrices begin at
a multiple of PAD rows wherever it lies in the batch; logits are computed row by row. (Measured with 1 and 2 threads on
AVX-512: equal for every batch size from 1 to 64. A model's causality does the rest: what is right of a token is not seen.)

B batch · T positions · D width · V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tokenizers import Tokenizer
from torch import Tensor

from zexp.data import tokenizer as tokenizers
from zexp.model.language_model import LanguageModel

PAD = 64  # rows of matrices start at multiples of this; at least the chunk of the scans that the presets use
HEAD_ROWS = 16  # logits, the widest matrix, are computed for the positions asked for, in multiples of this
MOST_NEW_TOKENS = 256  # of a generation whose task does not say

Scored = tuple[float, bool]  # log-likelihood in nats, whether every token was the most probable one
Said = Callable[[int, int], None]  # (sequences done, sequences in all)


class Adapter(TemplateLM):
    """A model and its tokenizer behind lm-eval's interface.

    eod_id: the token that begins and ends documents. context_tokens: what the model sees at most; longer contexts lose their
    beginning. batch_size: rows in a forward pass.
    on_progress: called after each of them.
    """

    backend = "causal"

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        *,
        context_tokens: int,
        batch_size: int,
        eod_id: int = tokenizers.EOD_ID,
        on_progress: Said | None = None,
    ):
        super().__init__()
        self._eod_id = eod_id
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.context_tokens = context_tokens
        self.batch_size = batch_size
        self.on_progress = on_progress
        self._device = next(model.parameters()).device
        self._encoded: dict[str, list[int]] = {}

    @property
    def eot_token_id(self) -> int:
        return self._eod_id

    @property
    def max_gen_toks(self) -> int:
        return MOST_NEW_TOKENS

    @property
    def tokenizer_name(self) -> str:
        return "zexp"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids without eod. Kept: a choice is encoded for each of its requests."""
        found = self._encoded.get(string)
        if found is None:
            found = self._encoded[string] = tokenizers.encode(self.tokenizer, [string])[0]
        return list(found)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[Scored]:
        """(log p(continuation | context), whether it is the greedy continuation) of each (context, continuation)."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[Scored]:
        return self.score((self._behind_eod(context), targets) for _, context, targets in requests)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """log p(text) of each text, from an eod on; texts beyond context_tokens in windows that do not overlap."""
        windows: list[tuple[list[int], list[int]]] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            made = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.context_tokens,
                context_len=1,
            )
            for pair in made:
                windows.append(make_disjoint_window(pair))
                owners.append(owner)
        parts: list[list[float]] = [[] for _ in requests]
        for owner, (logprob, _) in zip(owners, self.score(windows), strict=True):
            parts[owner].append(logprob)
        return [math.fsum(part) for part in parts]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Greedy text of each (context, settings) up to a stop string, which is cut off, or an eod.

        Every token is a full forward pass: fine for short answers. Raises ValueError for settings that ask for sampling.
        """
        made = []
        for n, request in enumerate(requests):
            context, settings = request.args
            if settings.get("do_sample") or float(settings.get("temperature") or 0.0) > 0.0:
                raise ValueError(
                    f"The task {request.task_name} asks for sampling (do_sample, temperature); zexp generates greedily. "
                    "Set do_sample: false and temperature: 0 in its generation_kwargs."
                )
            stops = settings.get("until") or []
            most = settings.get("max_gen_toks") or settings.get("max_new_tokens") or self.max_gen_toks
            made.append(self._generate(context, [stops] if isinstance(stops, str) else list(stops), int(most)))
            self._say(n + 1, len(requests))
        return made

    @torch.inference_mode()
    def score(self, pairs: Iterable[tuple[list[int], list[int]]]) -> list[Scored]:
        """log p(targets | context) of each (context ids, target ids), and whether it is greedy.

        Equal requests are computed once; requests that differ in their last target alone share a forward pass.
        """
        wanted: dict[tuple[int, ...], dict[tuple[int, ...], Scored]] = {}
        keys = []
        for context, targets in pairs:
            seen = self.context_tokens
            if len(targets) > seen:
                raise ValueError(
                    f"A continuation of {len(targets)} tokens does not fit into {seen}. Raise eval.context_tokens."
                )
            inputs = tuple((context + targets)[-seen - 1 : -1])
            keys.append((inputs, tuple(targets)))
            wanted.setdefault(inputs, {})[keys[-1][1]] = (math.nan, False)
        done = 0
        for batch in self._batches(wanted):
            for inputs, hidden_TD in zip(batch, self._forward(batch), strict=True):
                self._score_row(inputs, hidden_TD, wanted[inputs])
            done += len(batch)
            self._say(done, len(wanted))
        return [wanted[inputs][targets] for inputs, targets in keys]

    def _score_row(self, inputs: tuple[int, ...], hidden_TD: Tensor, wanted: dict[tuple[int, ...], Scored]) -> None:
        """Fill in the scores of the targets that end one row of inputs."""
        longest = max(len(targets) for targets in wanted)
        first = (len(inputs) - longest) // HEAD_ROWS * HEAD_ROWS
        end = -(-len(inputs) // HEAD_ROWS) * HEAD_ROWS
        logprobs_TV = self.model.logits(hidden_TD[first:end]).log_softmax(dim=-1)[: len(inputs) - first]
        greedy_T = logprobs_TV.argmax(dim=-1)
        for targets in wanted:
            ids = torch.tensor(targets, device=self._device)
            here = logprobs_TV[-len(targets) :].gather(1, ids[:, None])[:, 0]
            wanted[targets] = (math.fsum(here.tolist()), bool((greedy_T[-len(targets) :] == ids).all()))

    def _forward(self, batch: list[tuple[int, ...]]) -> Tensor:
        """Hidden states, (B, T, D), of rows whose padded lengths are equal."""
        length = _padded(len(batch[0]))
        tokens_BT = torch.full((len(batch), length), self.eot_token_id)
        for row, inputs in enumerate(batch):
            tokens_BT[row, : len(inputs)] = torch.tensor(inputs)
        hidden_BTD: Tensor = self.model(tokens_BT.to(self._device))
        return hidden_BTD

    def _batches(self, rows: Iterable[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
        """Rows of equal padded length, at most batch_size at a time, the longest first: memory runs out at once or never."""
        by_length: dict[int, list[tuple[int, ...]]] = {}
        for row in rows:
            by_length.setdefault(_padded(len(row)), []).append(row)
        for _, equal in sorted(by_length.items(), reverse=True):
            for start in range(0, len(equal), self.batch_size):
                yield equal[start : start + self.batch_size]

    @torch.inference_mode()
    def _generate(self, context: str, stops: list[str], most: int) -> str:
        prompt = self._behind_eod(self.tok_encode(context))
        new: list[int] = []
        while len(new) < most:
            inputs = tuple((prompt + new)[-self.context_tokens :])
            logits_V = self.model.logits(self._forward([inputs])[0, : len(inputs)])[-1]
            following = int(logits_V.argmax())
            if following == self.eot_token_id:
                break
            new.append(following)
            text = self.tokenizer.decode(new)
            ends = [text.index(stop) for stop in stops if stop and stop in text]
            if ends:
                return text[: min(ends)]
        return self.tokenizer.decode(new)

    def _behind_eod(self, ids: list[int]) -> list[int]:
        """The ids as the beginning of a document; an empty context is lm-eval's prefix token, which is the eod."""
        return ids if ids[:1] == [self.eot_token_id] else [self.eot_token_id, *ids]

    def _say(self, done: int, total: int) -> None:
        if self.on_progress is not None:
            self.on_progress(done, total)


def _padded(length: int) -> int:
    return -(-length // PAD) * PAD
