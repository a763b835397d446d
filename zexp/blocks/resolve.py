"""An architecture as written to a model's semantic block: expanded, complete and legal, or a ConfigError."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from zexp.blocks import options, pattern
from zexp.blocks.base import BlockSpec, FeederSpec
from zexp.blocks.table import TABLE, spec_class
from zexp.config.errors import ConfigError, Problems
from zexp.config.identity import semantic, table_dict

# Mathematics outside the blocks: embedding, residual stream, final norm, head, loss, initial weights.
MODEL_NUMERICS = {"kernel.cross_entropy": 1, "kernel.rms_norm": 1, "model.init": 1, "model.stack": 1}


@dataclass(frozen=True, kw_only=True)
class Norm:
    """The norm before every layer and after the last. eps: added to the mean square (or variance).

    kind: rmsnorm has a weight per channel, layernorm a weight and a bias. final: another kind after the last layer.
    embedding: one more norm, of the layers' kind, after the embedding (RWKV).
    """

    kind: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    eps: float = 1e-5
    final: Literal["rmsnorm", "layernorm"] | None = semantic(None, absent=None)
    embedding: bool = semantic(False, absent=False)


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """How the branches of a layer like (a|m) are fed and joined.

    combine: sum (Falcon-H1; its fixed multipliers are factors of the branches' last matrices), mean, or scaled_mean:
    each branch's output passes a norm of its own with a weight per channel, then the mean (Hymba, arXiv:2411.13676, eq. 3).
    norms: shared, one norm feeds all branches; separate, each branch has its own (GPT-NeoX's parallel residual).
    """

    combine: Literal["sum", "mean", "scaled_mean"] = "sum"
    norms: Literal["shared", "separate"] = "shared"


@dataclass(frozen=True, kw_only=True)
class Stack:
    """The keys of an architecture besides its pattern and its block tables.

    width: D, the residual stream. tie_embeddings: the head is the embedding matrix.
    parallel: how branches are joined. logit_softcap: c, logits become c · tanh(logits / c) (xLSTM-7B: 30); null = not.
    """

    width: int
    tie_embeddings: bool = True
    norm: Norm = field(default_factory=Norm)
    parallel: Parallel = semantic(factory=Parallel, absent=Parallel())
    logit_softcap: float | None = semantic(None, absent=None)


def resolve_model(arch: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    """The semantic block of a model: pattern, vocab_size, width, tie_embeddings, norm, blocks; every key filled in.

    A key that equals its `absent` value is left out: read it with stack_of and specs_of.
    arch: pattern, width, tie_embeddings, norm, parallel, logit_softcap, vocab_size, blocks (one table a letter).
    vocab_size: the tokenizer's; arch.vocab_size, where it is given, is the model's own and at least as large.
    Raises ConfigError with every problem: the pattern, unknown letters and keys, unused tables, sizes that do not fit.
    """
    problems = Problems()
    if vocab_size < 1:
        problems.add(f"vocab_size = {vocab_size}: it must be at least 1.")
    layers = _layers(arch.get("pattern"), problems)
    own_vocab = arch.get("vocab_size")
    if own_vocab is not None and type(own_vocab) is not int:
        problems.add(f"arch.vocab_size = {own_vocab!r}: an integer or null is expected.")
    elif own_vocab is not None and own_vocab < vocab_size:
        problems.add(
            f"arch.vocab_size = {own_vocab}: the tokenizer has {vocab_size} tokens, which need an embedding each.\n"
            f"  Set arch.vocab_size to null (the tokenizer's) or at least {vocab_size}, or choose a smaller "
            "corpus.tokenizer.vocab_size."
        )
    rest = {key: value for key, value in arch.items() if key not in ("pattern", "blocks", "vocab_size")}
    stack, wrong = options.read(Stack, rest, "arch")
    problems.extend(wrong)
    # Not the stack's: a stack that cannot be read must not hide what does not fit the width.
    written_width = arch.get("width")
    if type(written_width) is int and written_width < 1:
        problems.add(f"arch.width = {written_width}: it must be at least 1.")
    if stack is not None and stack.norm.eps <= 0:
        problems.add(f"arch.norm.eps = {stack.norm.eps}: it must be above 0.")
    if stack is not None and stack.logit_softcap is not None and stack.logit_softcap <= 0:
        problems.add(f"arch.logit_softcap = {stack.logit_softcap}: it must be above 0, or null for none.")
    if stack is not None and stack.parallel != Parallel() and not any(len(pattern.branches(one)) > 1 for one in layers):
        problems.add(
            "arch.parallel: the pattern has no parallel branches, so these keys would be ignored.\n"
            "  Leave arch.parallel out, or write branches: '(a|m)'."
        )
    width = written_width if type(written_width) is int and written_width > 0 else None
    tables = arch.get("blocks") or {}
    if not isinstance(tables, Mapping):
        problems.add(f"arch.blocks = {tables!r}: a table of keys for each letter is expected.")
        tables = {}
    specs = _specs(layers, tables, width, problems)
    _check_layers(layers, specs, problems)
    problems.raise_if_any()
    assert stack is not None
    return {
        "pattern": layers,
        "vocab_size": vocab_size if own_vocab is None else own_vocab,
        **table_dict(stack),
        "blocks": {letter: spec.table(stack.width) for letter, spec in specs.items()},
    }


def stack_of(model: Mapping[str, Any]) -> Stack:
    """The keys of a resolved model besides pattern and blocks. Raises ConfigError if they are not legal."""
    rest = {key: value for key, value in model.items() if key not in ("pattern", "vocab_size", "blocks")}
    stack, wrong = options.read(Stack, rest, "model", stored=True)
    if stack is None:
        raise ConfigError(wrong)
    return stack


def specs_of(model: Mapping[str, Any]) -> dict[str, BlockSpec]:
    """The specs of a resolved model's blocks, by letter. Raises ConfigError if the block tables are not legal."""
    problems = Problems()
    specs = _specs(model["pattern"], model["blocks"], model["width"], problems, stored=True)
    problems.raise_if_any()
    return specs


def numerics(model: Mapping[str, Any]) -> dict[str, int]:
    """The numerics numbers of everything that a resolved model computes with, sorted by name."""
    found = dict(MODEL_NUMERICS)
    stack = stack_of(model)
    if stack.norm.kind == "layernorm" or stack.norm.final == "layernorm":
        found |= {"kernel.layer_norm": 1}
    for spec in specs_of(model).values():
        found |= spec.numerics()
    return dict(sorted(found.items()))


def _layers(written: Any, problems: Problems) -> list[str]:
    if written is None:
        problems.add("arch.pattern: this key has no default and is missing. Write for example '4*(a d)'.")
        return []
    try:
        return pattern.expand(written)
    except ConfigError as error:
        problems.extend(error.problems)
        return []


def _specs(
    layers: list[str], tables: Mapping[str, Any], width: int | None, problems: Problems, stored: bool = False
) -> dict[str, BlockSpec]:
    """A spec for every known letter of the layers, completed and checked as far as the width is known."""
    # Of a pattern that could not be read, the tables are checked all the same.
    used = pattern.letters(layers) if layers else [letter for letter in tables if letter in TABLE]
    for letter in used:
        if letter not in TABLE:
            known = ", ".join(f"{name} ({spec_class(name).NAME})" for name in TABLE)
            problems.add(f"arch.pattern: there is no block '{letter}'. The blocks are {known}.")
    for letter in tables:
        if layers and letter not in used:
            problems.add(
                f"arch.blocks.{letter}: the pattern has no layer '{letter}', so this table would be ignored.\n"
                f"  Remove it (on a command line: ~arch.blocks.{letter}) or use '{letter}' in arch.pattern."
            )
    specs: dict[str, BlockSpec] = {}
    for letter in used:
        if letter not in TABLE:
            continue
        where = f"arch.blocks.{letter}"
        table = tables.get(letter)
        needed = _required(spec_class(letter))
        if table is None and needed and not stored:
            sizes = ", ".join(f"{key}: ..." for key in needed)
            problems.add(
                f"{where}: the pattern has a layer '{letter}' ({spec_class(letter).NAME}) and no table says its sizes.\n"
                f"  Under arch.blocks, write at least {letter}: {{{sizes}}}."
            )
            continue
        spec, wrong = options.read(spec_class(letter), {} if table is None else table, where, stored)
        problems.extend(wrong)
        if spec is None or width is None:
            continue
        wrong = spec.problems(width, where)
        problems.extend(wrong)
        if not wrong:
            specs[letter] = spec.completed(width)
    return specs


def _required(cls: type[BlockSpec]) -> list[str]:
    """Keys without a default."""
    return [one.name for one in dataclasses.fields(cls) if one.default is one.default_factory is dataclasses.MISSING]


def _check_layers(layers: list[str], specs: Mapping[str, BlockSpec], problems: Problems) -> None:
    """Feeders stand before a sequence mixer and nowhere else, and every shared copy is called."""
    calls: dict[str, int] = {}
    for layer in layers:
        feeder, branches = pattern.feeder(layer), pattern.branches(layer)
        known = [letter for letter in branches if letter in TABLE]
        for letter in known:
            if spec_class(letter).ROLE == "feeder":
                problems.add(
                    f"arch.pattern: '{layer}' has the shared block '{letter}' where a layer is expected; it feeds the "
                    f"input of a mixer and cannot stand alone.\n  Write it before one, without a blank: '{letter}m'."
                )
        if len(set(branches)) < len(branches):
            problems.add(f"arch.pattern: the branches of '{layer}' repeat a letter. Parallel branches differ.")
        if feeder is None or feeder not in TABLE:
            continue
        calls[feeder] = calls.get(feeder, 0) + 1
        if spec_class(feeder).ROLE != "feeder":
            problems.add(
                f"arch.pattern: '{layer}' writes '{feeder}' before a layer, but it is no shared block and feeds "
                f"nothing.\n  Separate the layers by a blank: '{feeder} {layer[len(feeder) :]}'."
            )
        elif any(spec_class(letter).ROLE == "channel" for letter in known):
            problems.add(
                f"arch.pattern: '{layer}' feeds the shared block '{feeder}' into a channel mixer; a shared block feeds "
                f"a sequence mixer.\n  Write for example '{feeder}m'."
            )
    for letter, spec in specs.items():
        if isinstance(spec, FeederSpec) and spec.copies > calls.get(letter, 0) > 0:
            problems.add(
                f"arch.blocks.{letter}.copies = {spec.copies}: the pattern calls '{letter}' {calls[letter]} times, so "
                f"some copies would never be used.\n  Choose at most {calls[letter]}."
            )
