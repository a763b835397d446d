"""The verbs that compose nothing. None imports torch but export and sample, and these after the request was checked."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from zexp.arguments import verb_parser
from zexp.config.errors import ConfigError
from zexp.store.folder import Store, named_store
from zexp.study import names

RUN = "a variant's name, STUDY/VARIANT, the beginning of a stage's id (perhaps with @tokens), or a folder of the store"


def studies() -> list[str]:
    """The studies of the store that the environment or the working directory names."""
    return names.studies(Store(Path(named_store())))


def runs(begun: str) -> list[str]:
    """What a RUN that is being typed may become: variants, or those of a study once its slash is there."""
    store = Store(Path(named_store()))
    rows = [(study, row["name"]) for study in names.studies(store) for row in names.rows(store, study)]
    offered = [f"{study}/{name}" for study, name in rows] if "/" in begun else [name for _, name in rows]
    return sorted({one for one in offered if one.startswith(begun)})


def report(arguments: list[str]) -> int:
    """Tables and the leaderboard of a study, also of half a one."""
    parser = verb_parser("report", "Tables and one HTML leaderboard, also of half a study.")
    parser.add_argument("study")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    options = parser.parse_args(arguments)
    from rich.console import Console

    from zexp import report as reports

    store = Store(Path(options.store))
    made = reports.build(store.root, names.study(store, options.study))
    paths = reports.write(made)
    if options.json:
        print(json.dumps(made.to_json()))
        return 0
    console = Console(highlight=False)
    reports.print_tables(made, console)
    console.print(f"Leaderboard: {paths['html']}", soft_wrap=True)
    return 0


def export(arguments: list[str]) -> int:
    """A model as a folder that other tools load."""
    parser = verb_parser("export", "A trained model as a folder of files that other tools load. Nothing is overwritten.")
    parser.add_argument("run", help=RUN)
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--hf", metavar="DIR", help="for transformers: AutoModelForCausalLM and AutoTokenizer load it")
    kind.add_argument("--safetensors", metavar="DIR", help="under zexp's own names, with the model's description as JSON")
    options = parser.parse_args(arguments)
    from zexp.model.hf.folder import check_target
    from zexp.model.hf.table import family_of
    from zexp.train.chain import chain

    store = Store(Path(options.store), patience=0.0)
    state = names.state(store, options.run)
    target = Path(options.hf or options.safetensors).expanduser()
    check_target(target)
    segments = chain(store, state.folder.id)
    root, last = segments[0].semantic, segments[-1].semantic
    family = family_of(root["model"]) if options.hf else None

    from zexp.data import tokenizer
    from zexp.model.hf.export import write_hf, write_safetensors
    from zexp.train.checkpoint import load_model, weight_tensors

    model, semantic, tokenizer_id = load_model(store, state.folder.id, state.tokens)
    ours = weight_tensors(model)
    texts = tokenizer.exported(store, tokenizer_id, last["seq_len"])
    if family is not None:
        eod_id = tokenizer.eod_id(store, tokenizer_id)
        write_hf(target, family, semantic, ours, positions=last["seq_len"], eod_id=eod_id, tokenizer=texts)
    else:
        facts = {"model": semantic, "trajectory": state.folder.id, "tokens": state.tokens, "seq_len": last["seq_len"]}
        write_safetensors(target, facts, ours, tokenizer=texts)
    count = sum(parameter.numel() for parameter in model.parameters())
    what = f"a {family.class_name}" if family is not None else "safetensors under zexp's names"
    print(f"{target}: {what}, {count:,} parameters after {state.tokens:,} tokens, from {state}.")
    if family is not None:
        print(f"To load it: transformers.AutoModelForCausalLM.from_pretrained({str(target)!r}), AutoTokenizer alike.")
    return 0


def sample(arguments: list[str]) -> int:
    """Text that a model writes."""
    parser = verb_parser("sample", "The text with which a trained model goes on after a prompt, as it is made.")
    parser.add_argument("run", help=RUN)
    parser.add_argument("prompt", nargs="?", default="", help="what the document begins with (default: nothing)")
    parser.add_argument("--tokens", type=int, default=256, help="at most so many new tokens (default: 256)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the most probable token (default: 0.8)")
    parser.add_argument("--top-p", type=float, default=0.95, help="only the most probable ones, up to this share (default: 0.95)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default: 0)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="default: a GPU if there is one")
    options = parser.parse_args(arguments)
    checks = (
        (options.tokens >= 1, f"--tokens {options.tokens}: at least 1."),
        (0 <= options.temperature < float("inf"), f"--temperature {options.temperature}: 0 or a finite number above."),
        (0 < options.top_p <= 1, f"--top-p {options.top_p}: a share above 0, at most 1."),
        (0 <= options.seed < 2**63, f"--seed {options.seed}: a whole number from 0 to below 2^63."),
    )
    if problems := [text for fine, text in checks if not fine]:
        raise ConfigError(problems)
    store = Store(Path(options.store), patience=0.0)
    state = names.state(store, options.run)

    import torch

    from zexp.data import tokenizer as tokenizers
    from zexp.model.sample import generate, text_of
    from zexp.train.checkpoint import load_model

    if options.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no GPU here. Use cpu or auto.")
    device = options.device if options.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    model, _, tokenizer_id = load_model(store, state.folder.id, state.tokens, device)
    tokenizer, eod_id = tokenizers.load(store, tokenizer_id), tokenizers.eod_id(store, tokenizer_id)
    ids = generate(
        model,
        [eod_id, *tokenizers.encode(tokenizer, [options.prompt])[0]],
        tokens=options.tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
        eod_id=eod_id,
        vocab_size=tokenizers.vocab_size(tokenizer),
    )
    try:
        for text in text_of(tokenizer, ids):
            print(text, end="", flush=True)
    finally:  # after Ctrl-C, too
        print()
    return 0


def init(arguments: list[str]) -> int:
    """A small folder of one's own."""
    parser = argparse.ArgumentParser(
        prog="zexp init",
        description="A small folder of your own: texts, an architecture, a mix over the texts, a study. It runs as it is.",
    )
    parser.add_argument("folder", help="made if it is not there; nothing in it is overwritten")
    parser.add_argument(
        "--from-hf", metavar="DIR", help="a model of transformers: its architecture, tokenizer and weights to go on from"
    )
    options = parser.parse_args(arguments)
    from zexp.starter import write

    folder = Path(options.folder)
    for path in write(folder, None if options.from_hf is None else Path(options.from_hf).expanduser()):
        print(path)
    print(f"\nTo train it: cd {folder} && zexp run +sweeps=mine")
    return 0
