import shutil

import pytest
import torch

from tests.train import runs
from tests.train.runs import STEP, chain, train
from zexp.blocks.resolve import resolve_model
from zexp.model.build import build, decayed
from zexp.store.errors import StoreError
from zexp.train import checkpoint, optimizer

OPTIM = {"kind": "adamw", "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1, "clip": 1.0}


def test_a_saved_model_gives_the_same_logits(tiny_store, tiny_corpus):
    whole = chain(tiny_corpus, 3, arch="zamba2", then=runs.anneal(2, fraction=0.5))
    runs.train_all(tiny_store, whole)
    tokens = torch.arange(32)[None] % tiny_corpus.vocab_size
    ends = []
    for segment in whole.segments:
        model, semantic, tokenizer = checkpoint.load_model(tiny_store, segment.id, segment.to)
        assert (semantic, tokenizer) == (whole.segments[0].semantic["model"], tiny_corpus.tokenizer)
        ends.append(model.logits(model(tokens)))
    again = checkpoint.load_model(tiny_store, whole.segments[1].id, 5 * STEP)[0]
    assert torch.equal(ends[1], again.logits(again(tokens)))
    assert not torch.equal(ends[0], ends[1])


def test_a_state_that_is_not_there_is_said(tiny_store, tiny_corpus):
    (segment,) = chain(tiny_corpus, 2).segments
    train(tiny_store, segment)
    with pytest.raises(StoreError, match=r"has no states/128: .* It has states at: 256"):
        checkpoint.load_model(tiny_store, segment.id, STEP)


def test_a_damaged_state_is_not_loaded(tiny_store, tiny_corpus):
    (segment,) = chain(tiny_corpus, 1).segments
    train(tiny_store, segment)
    state = tiny_store.folder("trajectory", segment.id).state(STEP)
    file = next((state / "weights").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(StoreError, match=r"safetensors.* set aside in .*run the same command again"):
        checkpoint.load_model(tiny_store, segment.id, STEP)
    assert tiny_store.folder("trajectory", segment.id).state(STEP) is None, "the next plan trains it again"
    assert train(tiny_store, segment) == "done"
    assert checkpoint.load_model(tiny_store, segment.id, STEP)


def small(width=16):
    arch = runs.ARCHS["transformer"] | {"width": width}
    model = build(resolve_model(arch, 300), seed=0)
    return model, optimizer.build(model, OPTIM, decayed(model))


def test_weights_alone_are_a_state_that_cannot_carry_an_optimizer(tmp_path):
    model, adamw = small()
    checkpoint.write(tmp_path, model, adamw, {"tokens": 0})
    shutil.rmtree(tmp_path / "optimizer")
    other = build(model.semantic, seed=1)
    checkpoint.load_weights(tmp_path, other)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    with pytest.raises(StoreError, match="weights-only state"):
        checkpoint.load_optimizer(tmp_path, model, adamw)


def test_the_weights_of_another_model_are_refused(tmp_path):
    model, adamw = small()
    checkpoint.write(tmp_path, model, adamw, {})
    mamba = build(resolve_model(runs.ARCHS["zamba2"], 300), seed=0)
    with pytest.raises(StoreError, match="does not hold this model"):
        checkpoint.load_weights(tmp_path, mamba)
    with pytest.raises(StoreError, match=r"\(300, 16\) in the file, \(300, 32\) in the model"):
        checkpoint.load_weights(tmp_path, small(width=32)[0])


def test_tied_embeddings_are_stored_once():
    model, _ = small()
    assert checkpoint.weight_tensors(model).keys() == dict(model.named_parameters()).keys()
