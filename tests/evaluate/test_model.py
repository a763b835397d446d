"""Scores: the same bits whatever they are computed with, and what a direct computation gives."""

from __future__ import annotations

import math
import random

import pytest
import torch
from lm_eval.api.instance import Instance

from tests.conftest import TinyCorpus, made_up_text
from tests.evaluate.models import ARCHES, adapter_of
from zexp.data.tokenizer import EOD_ID
from zexp.evaluate.model import Adapter
from zexp.store.folder import Store

WORDS = made_up_text(7, 8_000).split()


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def pairs_of(n: int, seed: int = 0) -> list[tuple[list[int], list[int]]]:
    """Token ids of n contexts and targets, of 2 to 90 tokens together."""
    draw = random.Random(seed)
    return [
        (
            [EOD_ID, *draw.choices(range(1, 290), k=draw.randint(0, 60))],
            draw.choices(range(1, 290), k=draw.randint(1, 28)),
        )
        for _ in range(n)
    ]


def direct(adapter: Adapter, context: list[int], targets: list[int]) -> float:
    """log p(targets | context) by one unpadded forward pass in fp64."""
    model = adapter.model.double()
    with torch.inference_mode():
        logits_TV = torch.nn.functional.linear(model(torch.tensor([context + targets]))[0], model.head_weight)
    model.float()
    logprobs_TV = logits_TV.log_softmax(dim=-1)
    return sum(float(logprobs_TV[len(context) - 1 + k, id_]) for k, id_ in enumerate(targets))


def instance(*arguments: object, kind: str = "loglikelihood") -> Instance:
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0, metadata=("task", 0, 1))


@pytest.mark.parametrize("arch", ARCHES)
def test_scores_have_the_same_bits_for_every_batch_size(tiny_store: Store, tiny_corpus: TinyCorpus, arch: str) -> None:
    pairs = pairs_of(40)
    alone = adapter_of(tiny_store, tiny_corpus.tokenizer, arch, batch_size=1).score(pairs)
    for batch_size in (2, 3, 7, 16, 64):
        assert adapter_of(tiny_store, tiny_corpus.tokenizer, arch, batch_size=batch_size).score(pairs) == alone


@pytest.mark.parametrize("arch", ARCHES)
def test_a_score_does_not_depend_on_the_other_requests(tiny_store: Store, tiny_corpus: TinyCorpus, arch: str) -> None:
    pairs = pairs_of(24)
    adapter = adapter_of(tiny_store, tiny_corpus.tokenizer, arch, batch_size=8)
    together = adapter.score(pairs)
    assert adapter.score(reversed(pairs)) == together[::-1]
    assert [adapter.score([pair])[0] for pair in pairs] == together


@pytest.mark.parametrize("arch", ARCHES)
def test_scores_are_those_of_an_unpadded_forward_pass(tiny_store: Store, tiny_corpus: TinyCorpus, arch: str) -> None:
    adapter = adapter_of(tiny_store, tiny_corpus.tokenizer, arch)
    pairs = pairs_of(12)
    for (context, targets), (logprob, _) in zip(pairs, adapter.score(pairs), strict=True):
        # fp32 against fp64, over up to 28 tokens of some 6 nats each.
        assert logprob == pytest.approx(direct(adapter, context, targets), rel=2e-4)


def test_requests_that_share_their_inputs_share_a_forward_pass(tiny_store: Store, tiny_corpus: TinyCorpus) -> None:
    adapter = adapter_of(tiny_store, tiny_corpus.tokenizer, "transformer")
    said: list[tuple[int, int]] = []
    adapter.on_progress = lambda done, total: said.append((done, total))
    scores = adapter.score([([EOD_ID, 5, 6], [id_]) for id_ in range(1, 30)] + [([EOD_ID, 5], [6, 7])])
    assert said == [(1, 1)]
    assert scores[28][0] == pytest.approx(direct(adapter, [EOD_ID, 5, 6], [29]), rel=1e-4)
    assert scores[29][0] == pytest.approx(direct(adapter, [EOD_ID, 5], [6, 7]), rel=1e-4)


def test_greedy_is_said_of_the_most_probable_tokens_alone(tiny_store: Store, tiny_corpus: TinyCorpus) -> None:
    adapter = adapter_of(tiny_store, tiny_corpus.tokenizer, "mamba2")
    context = "badu kefi"
    text = adapter.generate_until([instance(context, {"until": [], "max_gen_toks": 4}, kind="generate_until")])[0]
    prompt = [EOD_ID, *adapter.tok_encode(context)]
    ids = []
    for _ in range(4):
        with torch.inference_mode():
            ids.append(int(adapter.model.logits(adapter.model(torch.tensor([prompt + ids])))[0, -1].argmax()))
    assert text == adapter.tokenizer.decode(ids)
    assert adapter.score([(prompt, ids)])[0][1]
    assert not adapter.score([(prompt, [*ids[:-1], ids[-1] + 1])])[0][1]


def test_a_context_that_is_too_long_loses_its_beginning(tiny_store: Store, tiny_corpus: TinyCorpus) -> None:
    adapter = adapter_of(tiny_store, tiny_corpus.tokenizer, "mamba2", context_tokens=16)
    context, targets = [EOD_ID, *range(1, 60)], [60, 61]
    assert adapter.score([(context, targets)]) == adapter.score([(context[-15:], targets)])
    with pytest.raises(ValueError, match=r"eval\.context_tokens"):
        adapter.score([(context, list(range(1, 20)))])


def test_a_text_is_scored_after_an_eod_each_token_once(tiny_store: Store, tiny_corpus: TinyCorpus) -> None:
    adapter = adapter_of(tiny_store, tiny_corpus.tokenizer, "zamba2", context_tokens=64)
    short, long = " ".join(WORDS[:6]), " ".join(WORDS[:120])
    ids = adapter.tok_encode(long)
    assert len(ids) > 3 * 64
    rolled = adapter.loglikelihood_rolling([instance(text, kind="loglikelihood_rolling") for text in (short, long)])
    assert rolled[0] == pytest.approx(direct(adapter, [EOD_ID], adapter.tok_encode(short)), rel=2e-4)
    total = direct(adapter, [EOD_ID], ids[:64])
    for start in range(
        64, len(ids), 64
    ):  # lm-eval's windows: each sees the last token before it, and the last is filled up
        targets = ids[start : start + 64]
        total += direct(adapter, ids[start + len(targets) - 65 : start], targets)
    assert rolled[1] == pytest.approx(total, rel=2e-4)


def test_a_continuation_is_what_encoding_both_together_adds(tiny_store: Store, tiny_corpus: TinyCorpus) -> None:
    adapter = adapter_of(tiny_store, tiny_corpus.tokenizer, "transformer")
    (scored,) = adapter.loglikelihood([instance("badu kefi ", "lomi ta")])  # the blank goes to the continuation
    whole, seen = adapter.tok_encode("badu kefi lomi ta"), adapter.tok_encode("badu kefi")
    assert scored[0] == pytest.approx(direct(adapter, [EOD_ID, *seen], whole[len(seen) :]), rel=1e-4)
    (empty,) = adapter.loglikelihood([instance("", "lomi ta")])
    assert empty[0] == pytest.approx(direct(adapter, [EOD_ID], adapter.tok_encode("lomi ta")), rel=1e-4)


def test_generation_stops_at_a_stop_string_and_refuses_to_sample(tiny_store: Store, tiny_corpus: TinyCorpus) -> None:
    adapter = adapter_of(tiny_store, tiny_corpus.tokenizer, "mamba2")
    (text,) = adapter.generate_until([instance("badu", {"until": [], "max_gen_toks": 8}, kind="generate_until")])
    stop = text[len(text) // 2]
    (cut,) = adapter.generate_until([instance("badu", {"until": [stop], "max_gen_toks": 8}, kind="generate_until")])
    assert cut == text[: text.index(stop)]
    with pytest.raises(ValueError, match="do_sample: false"):
        adapter.generate_until([instance("badu", {"do_sample": True, "temperature": 0.7}, kind="generate_until")])


def test_scores_are_log_probabilities(tiny_store: Store, tiny_corpus: TinyCorpus) -> None:
    adapter = adapter_of(tiny_store, tiny_corpus.tokenizer, "mamba2")
    vocabulary = adapter.tokenizer.get_vocab_size()
    scores = adapter.score([([EOD_ID, 5], [id_]) for id_ in range(vocabulary)])
    assert math.fsum(math.exp(logprob) for logprob, _ in scores) == pytest.approx(1.0, abs=1e-5)
    assert sum(greedy for _, greedy in scores) == 1
