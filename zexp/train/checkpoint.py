"""States on disk: what a training is at a token count, and how it is written and read.

    states/<tokens>/weights/      safetensors, written and read by torch.distributed.checkpoint
                    optimizer/    the same; absent in a weights-only state (retention dropped it)
                    state.json    everything else (see loop.py)
                    manifest.json sizes and checksums, written by the store when it publishes the folder

Nothing is pickled, every file can be opened by other tools, and dcp can read it into another layout. Saving 1.3 M
parameters with their optimizer takes 0.15 s (15 MB, flushed to disk), loading 0.05 s.
"""

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.logger import _dcp_logger
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from zexp.model.build import LanguageModel, build
from zexp.store.errors import StoreError
from zexp.store.files import MANIFEST, read_json, write_json
from zexp.store.folder import OPTIMIZER, StageFolder, Store
from zexp.train import optimizer as optimizers
from zexp.train.chain import chain

# It tells whatever logging is set up about every tensor, at DEBUG, whatever the level of the root logger.
_dcp_logger.setLevel(logging.WARNING)

WEIGHTS, FACTS = "weights", "state.json"


def write(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, facts: Mapping[str, Any]) -> None:
    """Fill an existing, empty folder with a state. facts: JSON."""
    _save(folder / WEIGHTS, weight_tensors(model))
    _save(folder / OPTIMIZER, optimizers.state_tensors(model, optimizer))
    write_json(folder / FACTS, dict(facts))
    write_json(folder / MANIFEST, {"droppable": [OPTIMIZER]})


def read_facts(state: Path) -> dict[str, Any]:
    """The contents of state.json."""
    facts: dict[str, Any] = read_json(state / FACTS)
    return facts


def same(one: Path, other: Path) -> bool:
    """True if two states have the same facts and weights, bit for bit. (The files' bytes may differ: safetensors writes
    its header in any order.)"""
    if read_facts(one) != read_facts(other):
        return False
    bits = [
        {name: tensor.numpy().tobytes() for file in (state / WEIGHTS).glob("*.safetensors") for name, tensor in load_file(file).items()}
        for state in (one, other)
    ]
    return bits[0] == bits[1]


def verified(folder: StageFolder, tokens: int) -> Path:
    """A published state of another stage, its checksums verified.

    A damaged one is set aside, so that the next plan trains it again. Raises StoreError for it and for a missing one.
    """
    state = folder.required(f"states/{tokens}")
    try:
        folder.verify(state)
    except StoreError as error:
        attempt = folder.attempt({"set_aside": tokens})
        assert attempt is not None, "nobody else can make what is there"
        with attempt:  # who else found it may have set it aside by now, or even have made it again
            if folder.state(tokens) is not None and not _is_whole(folder, state):
                attempt.set_aside(f"states/{tokens}")
        text = f"{error} It is set aside in {folder.path / 'attempts'}; run the same command again, and it is trained again."
        raise StoreError(text) from error
    return state


def _is_whole(folder: StageFolder, state: Path) -> bool:
    try:
        folder.verify(state)
    except StoreError:
        return False
    return True


def load_weights(state: Path, model: nn.Module) -> None:
    """Replace the model's weights, in place. Raises StoreError if the names are not the model's."""
    _load(state / WEIGHTS, weight_tensors(model))


def load_optimizer(state: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Replace the optimizer's state, in place. Raises StoreError for a weights-only state."""
    if not (state / OPTIMIZER).is_dir():
        raise StoreError(
            f"{state} is a weights-only state: it has no optimizer state to carry on. "
            "Run the same command again: its segment is planned and trained again."
        )
    _load(state / OPTIMIZER, optimizers.state_tensors(model, optimizer))


def load_model(
    store: Store, trajectory_id: str, tokens: int, device: str = "cpu", kernels: str = "auto"
) -> tuple[LanguageModel, dict[str, Any], str]:
    """The model of a published state with its checksums verified, in evaluation mode; its semantic block; its tokenizer's
    id.
    """
    state = verified(store.folder("trajectory", trajectory_id), tokens)
    root = chain(store, trajectory_id)[0].semantic
    model = build(root["model"], seed=None, kernels=kernels, device=device)
    load_weights(state, model)
    model.eval()
    return model, root["model"], root["tokenizer"]


def weight_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name; a tensor with two names (tied embeddings) once, by its first."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor.detach()
    return tensors


def _save(folder: Path, tensors: dict[str, Tensor]) -> None:
    with _one_process():
        dcp.save(tensors, storage_writer=HuggingFaceStorageWriter(str(folder)), no_dist=True)


def _load(folder: Path, tensors: dict[str, Tensor]) -> None:
    reader = HuggingFaceStorageReader(str(folder))
    # dcp refuses what is missing in the file, and ignores what the model does not have.
    metadata = reader.read_metadata().state_dict_metadata
    stored = {name: tuple(one.size) for name, one in metadata.items() if isinstance(one, TensorStorageMetadata)}
    wanted = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if odd := sorted(name for name in stored.keys() | wanted.keys() if stored.get(name) != wanted.get(name)):
        raise StoreError(
            f"{folder} does not hold this model: {len(odd)} tensors differ in name or shape. The first is {odd[0]}: "
            f"{stored.get(odd[0])} in the file, {wanted.get(odd[0])} in the model."
        )
    with _one_process():
        dcp.load(tensors, storage_reader=reader, no_dist=True)


@contextmanager
def _one_process() -> Iterator[None]:
    """dcp warns that there is no process group even when told so by no_dist."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield
