"""Where a training's curves go besides attempts/<n>/metrics.jsonl, which is always written; and its log.

`logger=wandb` sends them to Weights & Biases: the run's id is the trajectory's (its first 16 digits), so that every
attempt, and the scores later, belong to one run. Without a key the run is written offline and can be sent later.
"""

import logging
import netrc
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, cast
from urllib.parse import urlparse

log = logging.getLogger(__name__)


class NotSent(RuntimeError):
    """wandb could not take what it was given; the text says why."""


class Curves(Protocol):
    """Receives what metrics.jsonl receives."""

    def write(self, figures: Mapping[str, Any]) -> None:
        """figures: step, tokens, loss, …"""

    def close(self) -> None:
        """Flush; nothing is written afterwards."""


class NoCurves:
    """`logger=jsonl`."""

    def write(self, figures: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


class WandbCurves:
    """`logger=wandb`."""

    def __init__(self, options: Mapping[str, Any], run_id: str, config: Mapping[str, Any], directory: Path) -> None:
        import wandb  # 1 s to import, so only when asked for

        self._wandb = wandb
        self._mode = mode()
        self._run = wandb.init(
            project=options.get("project"),
            entity=options.get("entity"),
            id=run_id,
            name=options.get("name") or run_id,
            # Offline runs cannot look a run up; `wandb sync` joins those of one id.
            resume="allow" if self._mode == "online" else None,
            config=dict(config),
            dir=str(directory),
            mode=cast(Any, self._mode),  # wandb checks it
            settings=wandb.Settings(silent=True, console="off"),
        )
        self._run.define_metric("*", step_metric="tokens")
        if self._mode == "offline":
            written = Path(self._run.dir).parent
            log.info(
                "wandb: no API key, so the run is written offline, to %s. To send it: wandb sync %s", written, written
            )

    def write(self, figures: Mapping[str, Any]) -> None:
        self._run.log(dict(figures))

    def close(self) -> None:
        self._run.finish()
        # finish returns while wandb's own process may still write; this waits for it, which an os._exit would not.
        self._wandb.teardown()


def open_curves(options: Mapping[str, Any] | None, run_id: str, config: Mapping[str, Any], directory: Path) -> Curves:
    """options: the request's `logger` block {kind: jsonl | wandb, project, entity, name}; null = jsonl.
    directory: an existing folder of this attempt, for what the logger leaves on disk."""
    kind = (options or {}).get("kind", "jsonl")
    if kind == "jsonl":
        return NoCurves()
    if kind == "wandb":
        return WandbCurves(options or {}, run_id, config, directory)
    raise ValueError(f"logger.kind = {kind!r}; one of: jsonl, wandb")


def send_scores(
    options: Mapping[str, Any], run_id: str, tokens: int, scores: Mapping[str, float], directory: Path
) -> None:
    """Add the scores {task/metric: value} of a trajectory's state at `tokens` to its wandb run. Raises NotSent."""
    import wandb

    try:
        curves = WandbCurves(options, run_id, {}, directory)
        curves.write({"tokens": tokens, **scores})
        curves.close()
    except wandb.Error as error:
        raise NotSent(f"{type(error).__name__}: {error}") from error


def offline_runs(attempts: Path) -> list[Path]:
    """The runs below a trajectory's attempts/ (any folder of folders) that were written offline and not sent yet: arguments of `wandb sync`."""
    found = sorted(attempts.glob("*/wandb/offline-run-*"))
    return [run for run in found if not list(run.glob("*.wandb.synced"))]  # the mark that `wandb sync` leaves


def why_offline() -> str:
    """What makes runs be written offline now, in words."""
    mode = os.environ.get("WANDB_MODE")
    return f"WANDB_MODE is {mode}" if mode else "there is no API key (wandb login)"


def mode() -> str:
    """WANDB_MODE if set; else online with an API key (environment or netrc), offline without."""
    if mode := os.environ.get("WANDB_MODE"):
        return mode
    return "online" if os.environ.get("WANDB_API_KEY") or _netrc_has_key() else "offline"


def _netrc_has_key() -> bool:
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return netrc.netrc(path).authenticators(host) is not None
    except FileNotFoundError:
        return False


@contextmanager
def logging_to(path: Path) -> Iterator[None]:
    """What zexp's loggers say from INFO on goes to the end of a file."""
    package = logging.getLogger("zexp")
    level_before = package.level
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    package.addHandler(handler)
    package.setLevel(logging.INFO)
    try:
        yield
    finally:
        package.setLevel(level_before)
        package.removeHandler(handler)
        handler.close()
