"""What is wrong with a run's phases whatever came before them: keys, ranges, mixes, schedules.

What depends on a phase's place in the chain (its length in tokens, whether a warm-up fits) is checked where the chain is
compiled, and only if nothing is wrong here.
"""

from __future__ import annotations

from collections.abc import Callable

from zexp.config.errors import ConfigError, Problems
from zexp.config.schema import Anneal, Mix, Phase, Run, Schedule
from zexp.config.tokens import parse_length, parse_tokens
from zexp.train import schedule as lr_schedule

PRECISIONS = ("fp32", "bf16")
OPTIMIZER_STATES = ("carry", "reset")
REPLAY_STARTS = ("continue", "beginning")

# Keys of a schedule beyond kind and peak_lr: which kind reads which.
SCHEDULE_KEYS = {
    "constant": {"warmup_tokens"},
    "linear": {"warmup_tokens", "floor_fraction"},
    "cosine": {"warmup_tokens", "floor_fraction"},
    "wsd": {"warmup_tokens", "decay", "decay_shape", "floor_fraction"},
}


def check_run(run: Run, optimizers: tuple[str, ...], problems: Problems) -> None:
    """What holds for every phase."""
    if run.optim.kind not in optimizers:
        problems.add(f"optim.kind = {run.optim.kind!r}; it is one of {', '.join(optimizers)}.")
    if len(run.optim.betas) != 2 or not all(0.0 <= beta < 1.0 for beta in run.optim.betas):
        problems.add(f"optim.betas = {list(run.optim.betas)}: two numbers from 0 to below 1, e.g. [0.9, 0.95].")
    if not 0.0 < run.optim.eps < float("inf"):
        problems.add(f"optim.eps = {run.optim.eps} is not above 0.")
    for name in ("weight_decay", "clip"):
        if not 0.0 <= getattr(run.optim, name) < float("inf"):
            problems.add(f"optim.{name} = {getattr(run.optim, name)} must be a finite number, 0 or above.")
    _check_seed(run.seed, "seed", problems)
    _check_seed(run.seeds.init, "seeds.init", problems)
    _check_seed(run.corpus.seed, "corpus.seed", problems)
    if run.precision not in PRECISIONS:
        problems.add(f"precision = {run.precision!r}; it is {' or '.join(PRECISIONS)}.")


def check_phase(config: Phase | Anneal, key: str, run: Run, problems: Problems) -> None:
    """One phase by itself. key: what messages call it."""
    share_of = 10**12 if config.parent is not None else None  # any parent: what is looked for is what it cannot cure
    tokens = _parsed(lambda: parse_length(config.tokens, share_of, f"{key}.tokens"), problems)
    if tokens is not None and tokens <= 0:
        problems.add(f"{key}.tokens = {config.tokens!r} trains nothing. Give a positive length.")
    if config.batch_tokens is not None:
        batch = _parsed(lambda: parse_tokens(config.batch_tokens, f"{key}.batch_tokens"), problems)
        if batch is not None and run.seq_len > 0 and (batch <= 0 or batch % run.seq_len):
            below = max(run.seq_len, batch // run.seq_len * run.seq_len)
            problems.add(
                f"{key}.batch_tokens = {batch} is not a multiple of seq_len = {run.seq_len}: a batch is whole sequences. "
                f"Take {below} or {below + run.seq_len}."
            )
    elif config.parent is None:
        problems.add(f"{key}.batch_tokens is not set and there is no parent to take it from. Set it, e.g. 4096.")
    _check_seed(config.seed, f"{key}.seed", problems)
    if config.optimizer_state not in OPTIMIZER_STATES:
        problems.add(f"{key}.optimizer_state = {config.optimizer_state!r}; it is {' or '.join(OPTIMIZER_STATES)}.")
    if isinstance(config, Anneal):
        _check_anneal(config, problems)
    elif config.schedule is not None:
        _check_schedule(config.schedule, f"{key}.schedule", problems)
    else:
        _check_schedule(run.schedule, "schedule", problems)
    if not isinstance(config, Anneal) or config.replay.fraction < 1.0:
        if config.mix is not None:
            _check_mix(config.mix, f"{key}.mix", problems)
        else:
            _check_mix(run.mix, "mix", problems)


def _check_anneal(anneal: Anneal, problems: Problems) -> None:
    if anneal.shape not in lr_schedule.SHAPES:
        problems.add(f"anneal.shape = {anneal.shape!r}; it is one of {', '.join(lr_schedule.SHAPES)}.")
    if not 0.0 <= anneal.peak_fraction < float("inf"):
        problems.add(f"anneal.peak_fraction = {anneal.peak_fraction} must be a finite number, 0 or above.")
    _check_fraction(anneal.floor_fraction, "anneal.floor_fraction", problems)
    _check_fraction(anneal.replay.fraction, "anneal.replay.fraction", problems)
    if anneal.replay.start not in REPLAY_STARTS:
        problems.add(f"anneal.replay.start = {anneal.replay.start!r}; it is {' or '.join(REPLAY_STARTS)}.")
    if anneal.shape == "constant" and anneal.floor_fraction not in (0.0, anneal.peak_fraction):
        problems.add("anneal.floor_fraction is not read by shape: constant. Leave it at 0.0 or choose another shape.")
    _parsed(lambda: parse_tokens(anneal.warmup_tokens, "anneal.warmup_tokens"), problems)


def _check_schedule(schedule: Schedule, key: str, problems: Problems) -> None:
    if schedule.kind not in SCHEDULE_KEYS:
        problems.add(f"{key}.kind = {schedule.kind!r}; it is one of {', '.join(SCHEDULE_KEYS)}.")
        return
    reads = SCHEDULE_KEYS[schedule.kind]
    for name in ("decay", "decay_shape", "floor_fraction"):
        value = getattr(schedule, name)
        if name in reads and value is None:
            problems.add(f"{key}.{name} is not set, and {schedule.kind} needs it.")
        if name not in reads and value is not None:
            problems.add(f"{key}.{name} = {value!r} is not read by kind: {schedule.kind}. Set it to null.")
    if not 0.0 < schedule.peak_lr < float("inf"):
        problems.add(f"{key}.peak_lr = {schedule.peak_lr} is not a finite number above 0.")
    if schedule.floor_fraction is not None:
        _check_fraction(schedule.floor_fraction, f"{key}.floor_fraction", problems)
    if schedule.decay_shape is not None and schedule.decay_shape not in lr_schedule.SHAPES:
        problems.add(f"{key}.decay_shape = {schedule.decay_shape!r}; it is one of {', '.join(lr_schedule.SHAPES)}.")
    _parsed(lambda: parse_tokens(schedule.warmup_tokens, f"{key}.warmup_tokens"), problems)
    if schedule.decay is not None:
        _parsed(lambda: parse_length(schedule.decay, 10**12, f"{key}.decay"), problems)


def _check_mix(mix: Mix, key: str, problems: Problems) -> None:
    if not mix.sources:
        problems.add(f"{key}.sources is empty. Name at least one source, e.g. sources: {{base: {{weight: 1}}}}.")
    wrong = {name: s.weight for name, s in mix.sources.items() if not 0.0 <= s.weight < float("inf")}
    for name, weight in wrong.items():
        problems.add(f"{key}.sources.{name}.weight = {weight} must be a finite number, 0 or above.")
    if mix.sources and not wrong and not any(source.weight for source in mix.sources.values()):
        problems.add(f"{key}.sources: every weight is 0. Give at least one source a weight.")


def _check_seed(value: int | None, key: str, problems: Problems) -> None:
    if value is not None and not 0 <= value < 2**63:
        problems.add(f"{key} = {value}: a seed is a whole number from 0 to below 2^63.")


def _check_fraction(value: float, key: str, problems: Problems) -> None:
    if not 0.0 <= value <= 1.0:
        problems.add(f"{key} = {value} is not between 0 and 1.")


def _parsed(parse: Callable[[], int], problems: Problems) -> int | None:
    try:
        return parse()
    except ConfigError as error:
        problems.extend(error.problems)
        return None
