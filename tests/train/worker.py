"""A process that trains one segment: python -m tests.train.worker STORE ID REQUEST (JSON). Prints the outcome."""

import json
import sys
from pathlib import Path

from zexp.store.folder import Store
from zexp.train import loop

if __name__ == "__main__":
    store, request = Store(Path(sys.argv[1])), json.loads(sys.argv[3])
    folder = store.folder("trajectory", sys.argv[2])
    attempt = folder.attempt(request)
    assert attempt is not None
    with attempt:
        print("ready", flush=True)
        print(loop.run(store, folder, request, attempt), flush=True)
    assert "wandb" not in sys.modules, "it takes a second to import and was not asked for"
