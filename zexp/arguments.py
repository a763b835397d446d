"""What the verbs that compose nothing have in common on the command line."""

from __future__ import annotations

import argparse

from zexp.store.folder import named_store


def add_store(parser: argparse.ArgumentParser) -> None:
    """--store."""
    parser.add_argument("--store", default=named_store(), help="folder of the results (default: store)")


def verb_parser(verb: str, description: str) -> argparse.ArgumentParser:
    """The parser of `zexp VERB`, with --store."""
    parser = argparse.ArgumentParser(prog=f"zexp {verb}", description=description)
    add_store(parser)
    return parser
