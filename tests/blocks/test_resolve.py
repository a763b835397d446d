"""An architecture is completed, or refused with all of its mistakes."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.blocks.archs import MIXED, SHARED, TINY, architectures
from zexp.blocks import options, resolve
from zexp.blocks.attention import spec as attention
from zexp.blocks.resolve import Norm, Stack, numerics, resolve_model, specs_of, stack_of
from zexp.config.errors import ConfigError
from zexp.config.identity import semantic
from zexp.store.ids import semantic_id


def test_every_default_is_filled_in():
    model = resolve_model(TINY["transformer_tiny"], 4096)
    assert model == {
        "pattern": ["a", "d"] * 4,
        "vocab_size": 4096,
        "width": 128,
        "tie_embeddings": True,
        "norm": {"kind": "rmsnorm", "eps": 1e-5},
        "blocks": {
            "a": {"heads": 4, "kv_heads": 4, "head_dim": 32, "rope_theta": 10000.0, "qk_norm": False, "bias": False},
            "d": {"width": 341, "activation": "swiglu", "bias": False},
        },
    }


@given(architectures())
def test_a_resolved_model_resolves_to_itself_and_is_plain_json(arch):
    model = resolve_model(arch, 64)
    assert resolve_model({key: value for key, value in model.items() if key != "vocab_size"}, 64) == model
    assert json.loads(json.dumps(model)) == model


def test_an_integer_where_a_float_is_meant_is_the_same_model():
    blocks = {"a": {"heads": 4, "rope_theta": 10000}}
    model = resolve_model({"pattern": "a", "width": 16, "blocks": blocks}, 8)
    assert type(model["blocks"]["a"]["rope_theta"]) is float


def test_all_mistakes_are_reported_at_once():
    arch = {
        "pattern": "g q dm gd",
        "widht": 128,
        "blocks": {"z": {}, "m": {"expnd": 3}, "g": {**SHARED, "heads": "four"}, "d": {"width": 3.5}},
    }
    with pytest.raises(ConfigError) as error:
        resolve_model(arch, 10)
    text = str(error.value)
    for part in (
        "arch.widht: there is no such key. Did you mean width?",
        "arch.width: this key has no default and is missing.",
        "there is no block 'q'. The blocks are a (attention), ",
        "arch.blocks.z: the pattern has no layer 'z', so this table would be ignored.",
        "arch.blocks.m.expnd: there is no such key. Did you mean expand?",
        "arch.blocks.g.heads = 'four': an integer is expected.",
        "arch.blocks.d.width = 3.5: an integer is expected.",
        "'g' has the shared block 'g' where a layer is expected",
        "'dm' writes 'd' before a layer, but it is no shared block",
        "'gd' feeds the shared block 'g' into a channel mixer",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("pattern", "blocks", "message"),
    [
        ("a", {"a": {"heads": 3}}, "arch.blocks.a.heads = 3: the width 16 cannot be cut into 3 equal heads."),
        ("a", {"a": {"heads": 4, "kv_heads": 3}}, "arch.blocks.a.kv_heads = 3: 4 query heads cannot share 3 evenly."),
        ("a", {"a": {"heads": 16}}, "rotary embedding pairs channels, but a head has 1."),
        ("a", {"a": {"heads": 0}}, "arch.blocks.a.heads = 0: it must be at least 1."),
        ("a", {"a": {}}, "arch.blocks.a.heads: this key has no default and is missing."),
        ("a", {}, "arch.blocks.a: the pattern has a layer 'a' (attention) and no table says its sizes."),
        ("e", {}, "write at least e: {width: ...}."),
        ("x", {"x": {"heads": 3}}, "cannot be cut into 3 heads.\n  Choose a multiple of 0.1875, or a number of heads"),
        ("d", {"d": {"width": 8, "activation": "swish"}}, "choose one of swiglu, geglu_erf"),
        ("m", {"m": {"head_dim": 5}}, "the inner width 32 (expand 2 × width 16) cannot be cut into heads of 5."),
        ("m", {"m": {"head_dim": 8, "groups": 3}}, "4 heads cannot be shared evenly by 3 groups."),
        ("m", {"m": {"head_dim": 8, "chunk": True}}, "arch.blocks.m.chunk = True: an integer is expected."),
        ("gm", {"g": {"heads": 3, "mlp_width": 8}, "m": {"head_dim": 8}}, "input of width 32 cannot be cut into 3"),
        ("gm", {"g": {"heads": 2, "mlp_width": 8, "copies": 2}, "m": {"head_dim": 8}}, "calls 'g' 1 times"),
        (
            "gm",
            {"g": {"heads": 2, "mlp_width": 8, "lora_rank": {"mlp": -1}}, "m": {"head_dim": 8}},
            "arch.blocks.g.lora_rank.mlp = -1: a rank is 0 (none) or more.",
        ),
        ("(a|a)", {"a": {"heads": 4}}, "the branches of '(a|a)' repeat a letter"),
        ("ag", {"a": {"heads": 4}, "g": {"heads": 2, "mlp_width": 8}}, "Write it before one, without a blank: 'gm'."),
    ],
)
def test_what_does_not_fit_is_refused_by_name(pattern, blocks, message):
    with pytest.raises(ConfigError) as error:
        resolve_model({"pattern": pattern, "width": 16, "blocks": blocks}, 8)
    assert message in str(error.value)


def test_numerics_are_those_of_what_the_model_uses():
    assert "kernel.attention" not in numerics(resolve_model(TINY["mamba2_tiny"], 64))
    mixed = numerics(resolve_model(MIXED, 64))
    assert {"block.attention", "block.mamba2", "block.mlp", "block.shared", "kernel.ssd", "model.init"} <= set(mixed)


def test_resolving_and_counting_do_not_import_torch():
    code = (
        "import sys, zexp.calc.model, zexp.kernels.select\nfrom zexp.blocks.resolve import resolve_model\n"
        "from tests.blocks.archs import MIXED\n"
        "zexp.calc.model.block_table(resolve_model(MIXED, 64), 32)\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@dataclass(frozen=True, kw_only=True)
class LaterAttention(attention.Spec):
    """Attention with keys that came later.

    softcap: a plain one. value_heads: null = heads. inner, outer: null = the other, or 1.
    """

    softcap: float = semantic(30.0, absent=0.0)
    value_heads: int | None = semantic(None, absent=None)
    inner: int | None = semantic(None, absent=None)
    outer: int | None = semantic(None, absent=None)

    def completed(self, width: int) -> LaterAttention:
        full = super().completed(width)
        assert isinstance(full, LaterAttention)
        return replace(
            full,
            value_heads=self.heads if self.value_heads is None else self.value_heads,
            inner=self.inner or self.outer or 1,
            outer=self.outer or self.inner or 1,
        )


@dataclass(frozen=True, kw_only=True)
class LaterNorm(Norm):
    offset: bool = semantic(True, absent=False)


@dataclass(frozen=True, kw_only=True)
class LaterStack(Stack):
    norm: LaterNorm = field(default_factory=LaterNorm)
    embedding_scale: float = semantic(2.0, absent=1.0)


def arch(**keys):
    return {"pattern": "a", "width": 16, "blocks": {"a": {"heads": 4, **keys}}}


@pytest.fixture
def later_attention(monkeypatch):
    before = resolve_model(arch(), 8)
    monkeypatch.setattr(attention, "Spec", LaterAttention)
    return before


def test_a_blocks_later_key_that_means_as_before_changes_no_id(later_attention):
    assert semantic_id(resolve_model(arch(softcap=0.0), 8)) == semantic_id(later_attention)
    changed = resolve_model(arch(), 8)["blocks"]["a"]
    assert changed == {**later_attention["blocks"]["a"], "softcap": 30.0}


def test_an_older_block_is_read_as_before_whatever_the_default_is_now(later_attention):
    spec = specs_of(later_attention)["a"]
    assert isinstance(spec, LaterAttention)
    assert (spec.softcap, spec.value_heads, spec.inner, spec.outer) == (0.0, 4, 1, 1)


def test_a_later_key_that_the_width_completes_is_left_out_when_it_becomes_what_it_was(later_attention):
    assert resolve_model(arch(softcap=0.0, value_heads=4), 8) == later_attention
    assert resolve_model(arch(softcap=0.0, value_heads=2), 8)["blocks"]["a"]["value_heads"] == 2
    # One of the two says both; without either, both would be 1.
    both = resolve_model(arch(softcap=0.0, inner=4, outer=4), 8)["blocks"]["a"]
    assert len({"inner", "outer"} & set(both)) == 1


SIZE = st.sampled_from([None, 1, 2, 4])


@given(st.fixed_dictionaries({}, optional={"softcap": st.floats(0, 9), "value_heads": SIZE, "inner": SIZE, "outer": SIZE}))
def test_what_a_block_leaves_out_is_read_back(keys):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "Spec", LaterAttention)
        model = resolve_model(arch(**keys), 8)
        asked, _ = options.read(LaterAttention, arch(**keys)["blocks"]["a"], "here")
        assert asked is not None
        assert specs_of(model)["a"] == asked.completed(16)


def test_a_block_that_lacks_a_key_of_its_time_is_refused():
    model = resolve_model(arch(), 8)
    del model["blocks"]["a"]["bias"]
    with pytest.raises(ConfigError, match=r"arch\.blocks\.a\.bias: this semantic block lacks the key"):
        specs_of(model)


def test_later_keys_of_the_stack_and_its_norm_stay_out_while_they_mean_as_before(monkeypatch):
    before = resolve_model(arch(), 8)
    assert stack_of(before) == Stack(width=16)
    monkeypatch.setattr(resolve, "Stack", LaterStack)
    as_before = {**arch(), "embedding_scale": 1.0, "norm": {"offset": False}}
    assert resolve_model(as_before, 8) == before
    assert stack_of(before) == LaterStack(width=16, norm=LaterNorm(offset=False), embedding_scale=1.0)
    now = resolve_model(arch(), 8)
    assert (now["embedding_scale"], now["norm"]["offset"]) == (2.0, True)
    assert stack_of(now) == LaterStack(width=16)


def test_numbers_with_more_digits_than_ids_have_are_rounded_before_anything_reads_them():
    table = {**arch(rope_theta=10_000.123456789012), "norm": {"eps": 1.2345678901234e-5}}
    model = resolve_model(table, 8)
    assert model["norm"]["eps"] == 1.23456789012e-5
    assert model["blocks"]["a"]["rope_theta"] == 10_000.1234568
    semantic_id(model)


def test_stack_options_that_say_nothing_are_left_out_of_the_block():
    plain = resolve_model(TINY["transformer_tiny"], 10)
    said = {"norm": {"final": None, "embedding": False}, "parallel": {"combine": "sum"}, "logit_softcap": None}
    assert resolve_model(TINY["transformer_tiny"] | said | {"vocab_size": None}, 10) == plain
    assert "kernel.layer_norm" not in numerics(plain)
    other = resolve_model(TINY["transformer_tiny"] | {"norm": {"final": "layernorm"}, "logit_softcap": 30.0}, 10)
    assert other["norm"]["final"] == "layernorm" and other["logit_softcap"] == 30.0
    assert numerics(other)["kernel.layer_norm"] == 1


def test_a_model_may_have_more_rows_than_the_tokenizer_has_tokens():
    assert resolve_model(TINY["mamba2_tiny"] | {"vocab_size": 50288}, 4096)["vocab_size"] == 50288


def test_mistakes_of_the_stack_are_reported_at_once():
    arch = TINY["transformer_tiny"] | {
        "vocab_size": 100,
        "logit_softcap": 0.0,
        "norm": {"kind": "rmsnorm", "final": "batchnorm"},
        "parallel": {"norms": "separate"},
    }
    with pytest.raises(ConfigError) as error:
        resolve_model(arch, 4096)
    assert "arch.vocab_size = 100: the tokenizer has 4096 tokens" in str(error.value)
    assert "arch.norm.final = 'batchnorm'" in str(error.value)
    arch["norm"] = {"kind": "rmsnorm"}
    with pytest.raises(ConfigError) as error:
        resolve_model(arch, 4096)
    for part in (
        "arch.vocab_size = 100",
        "arch.logit_softcap = 0.0: it must be above 0",
        "arch.parallel: the pattern has no parallel branches",
    ):
        assert part in str(error.value)


def test_a_pattern_that_cannot_be_read_hides_no_mistake_of_the_tables():
    arch = {"pattern": "2*(a d", "width": 130, "blocks": {"a": {"heads": 3}, "d": {"width": 0}}}
    with pytest.raises(ConfigError) as error:
        resolve_model(arch, 16)
    for part in ("is never closed", "arch.blocks.a.heads = 3: the width 130", "arch.blocks.d.width = 0"):
        assert part in str(error.value)


@pytest.mark.parametrize("wrong", [{"norm": {"kind": "foo"}}, {"parallel": {"combine": "foo"}}, {"logit_softcap": "x"}])
def test_a_wrong_key_of_the_stack_hides_no_other_mistake(wrong):
    arch = {"pattern": "a d", "width": 130, "blocks": {"a": {"heads": 3}, "d": {"width": 0}}, **wrong}
    for width, said in ((130, "arch.blocks.a.heads = 3: the width 130"), (0, "arch.width = 0: it must be at least 1.")):
        with pytest.raises(ConfigError) as error:
            resolve_model({**arch, "width": width}, 16)
        assert said in str(error.value)
        assert f"arch.{next(iter(wrong))}" in str(error.value)


@pytest.mark.parametrize(
    ("letter", "table", "said"),
    [
        ("a", {"heads": 2, "logit_scale": 0.0}, "a.logit_scale = 0.0: it must be above 0"),
        ("a", {"heads": 2, "bias": True, "qkv_bias": True}, "a.qkv_bias: arch.blocks.a.bias already gives"),
        ("x", {"heads": 2, "qk_factor": 1e-9}, "x.qk_factor = 1e-09: 1.6e-08 channels"),
        ("t", {"heads": 2, "value_expansion": 1e-9}, "t.value_expansion = 1e-09: a value width of 1.6e-08"),
        ("t", {"heads": 2, "first_decay": 1e-17}, "t.first_decay = 1e-17: gamma = 1 - 2^-1e-17"),
        ("t", {"heads": 1, "last_decay": 7.0}, "t.last_decay = 7.0: the one head there is"),
        ("e", {"width": 4, "experts": 1, "top_k": 1}, "e.experts = 1: a softmax over one expert"),
        ("e", {"width": 4, "aux_loss": 0.0, "routing_group": "document"}, "e.routing_group = document: neither"),
        ("k", {"head_dim": 8, "lora_rank": {"decay": 0}}, "k.lora_rank.decay = 0: it must be at least 1"),
    ],
)
def test_keys_that_would_do_nothing_or_break_are_refused(letter, table, said):
    with pytest.raises(ConfigError) as error:
        resolve_model({"pattern": letter, "width": 16, "blocks": {letter: table}}, 16)
    assert said in str(error.value)
