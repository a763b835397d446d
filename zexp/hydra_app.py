"""The Hydra app behind `run`, `plan`, `calc` and parts of `bench`: composes configs and hands them to zexp.study.

Hydra composes; zexp decides what to do with the result. Without -m Hydra calls the task function and never a
launcher, with -m it calls our launcher (hydra_plugins/zexp): both end in `act`.
"""

from __future__ import annotations

import dataclasses
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from zexp.calc.budget import Budget
from zexp.config.errors import ConfigError
from zexp.config.places import conf_dir, user_conf_dir
from zexp.config.schema import Run
from zexp.study import execute, show, show_calc, why
from zexp.study.launch import driver, options_of
from zexp.study.outlook import outlook
from zexp.study.resolve import Composed
from zexp.study.trials import Trials
from zexp.study.variants import GROUPS

Act = Callable[[list[Composed], execute.Request], int]  # what a verb does with the composed configs; the exit code


class _Verb:
    """What the composed configs are for; set once a process, read by task function and launcher."""

    name = "run"
    json = False
    why: why.Asked | None = None
    budget: Budget | None = None
    exit_code = 0
    started = 0.0
    refused: ConfigError | None = None
    acted: list[execute.Acted] = []
    act: Act | None = None


class _Enough(Exception):
    """A sweeper would ask for more points, but the verb is done."""


def hydra_verb(verb: str, arguments: list[str], act: Act | None = None) -> int:
    """Compose and act. `--json` stands before the first override. Raises ConfigError for every wrong request.

    act: of a verb that this module does not know; its arguments but the overrides are taken off already.
    """
    _Verb.name, _Verb.json, _Verb.exit_code, _Verb.started = verb, False, 0, time.monotonic()
    _Verb.refused, _Verb.budget, _Verb.why, _Verb.acted, _Verb.act = None, None, None, [], act
    words = list(arguments)
    if "--json" in words:
        words.remove("--json")
        if verb == "run":
            raise ConfigError("--json is for plan, calc, status and report. `zexp run` prints its progress.")
        _Verb.json = True
    question, words = why.asked(words)
    if question is not None and verb != "plan":
        raise ConfigError(f"--why is for plan: zexp plan --why {question.a}")
    _Verb.why = question
    if verb == "calc" and words[:1] == ["budget"]:
        _Verb.budget, words = _budget(words[1:])
    mine = user_conf_dir(Path.cwd())
    if mine is not None and not any(w in ("--config-dir", "-cd") or w.startswith("--config-dir=") for w in words):
        words = ["--config-dir", str(mine), *words]
    _refuse_choices_in_both(words)
    for word in words:
        group, _, choice = word.partition("=")
        if group in GROUPS and choice == "null":
            none = f" {group}=none leaves it out." if (conf_dir() / group / "none.yaml").exists() else ""
            raise ConfigError(f"{word}: a group takes one of its choices, and null is none of them.{none}")
    ConfigStore.instance().store(name="schema", node=Run)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors arrive here, not as Hydra's own printing
    argv, sys.argv = sys.argv, [f"zexp {verb}", *words]
    try:
        app(_task)
    except _Enough:
        pass
    except execute.StageFailed as error:  # which a sweeper found in what its jobs returned
        print(f"hydra/sweeper: {error}", file=sys.stderr)
        _Verb.exit_code = 1
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise ConfigError(_cause(error)) from error
    except ValueError as error:
        if not _Verb.acted or "No trials are completed" not in str(error):  # Optuna's, at its end
            raise
        print("hydra/sweeper=optuna: every trial failed, so there is no best one.", file=sys.stderr)
        _Verb.exit_code = 1
    finally:
        sys.argv = argv
        if _Verb.acted:
            from zexp.finish import finish

            code = finish(_Verb.acted, seconds=time.monotonic() - _Verb.started)
            _Verb.exit_code = max(_Verb.exit_code, code)
            for store, study in {(acted.store, acted.study["name"]) for acted in _Verb.acted}:
                driver.ended(store, study, exit_code=code)
    if _Verb.refused is not None:
        raise _Verb.refused
    return _Verb.exit_code


def _budget(words: list[str]) -> tuple[Budget, list[str]]:
    """The budget that `zexp calc budget` is asked for, and the overrides of the config. Raises ConfigError."""
    known = {field.name for field in dataclasses.fields(Budget)}
    own = [word for word in words if word.partition("=")[0] in known]
    problems: list[str] = []
    table = OmegaConf.structured(Budget)
    for word in own:
        try:
            table = OmegaConf.merge(table, OmegaConf.from_dotlist([word]))
        except OmegaConfBaseException as error:
            problems.append(f"{word}: {str(error).splitlines()[0]}.")
    said = {problem.partition("=")[0] for problem in problems}
    problems += [
        f"{key}: a budget needs it. Write for example: zexp calc budget gpus=64 days=14 device=h100 arch=zamba2_1p2b"
        for key in known
        if OmegaConf.is_missing(table, key) and key not in said
    ]
    if problems:
        raise ConfigError(sorted(problems))
    budget = OmegaConf.to_object(table)
    assert isinstance(budget, Budget)
    return budget, [word for word in words if word not in own]


def app(task: Any) -> None:
    """The task function as a Hydra app over zexp's conf."""
    hydra.main(config_path=str(conf_dir()), config_name="config", version_base="1.3")(task)()


def _task(config: DictConfig) -> float | None:
    """One composed config, without -m."""
    node = HydraConfig.get()
    said = [key for key in ("grid", "zip", "arms", "seeds") if config.study[key]]
    said += [f"scales.{config.scale}"] if config.study.scales.get(config.scale) else []
    if said:
        _Verb.refused = ConfigError(
            f"{', '.join('study.' + key for key in said)} {'is' if len(said) == 1 else 'are'} for a study's variants, but this is a "
            f"single run, which would leave {'it' if len(said) == 1 else 'them'} out. Add -m, or `hydra: {{mode: MULTIRUN}}` to the study's file."
        )
        return None
    composed = Composed(config, dict(node.runtime.choices), {}, list(node.overrides.task))
    try:
        job = act_on([composed], node.launcher)[0]
    except ConfigError as error:  # Hydra would print a line of its own before it passes it on
        _Verb.refused = error
        return None
    return job.return_value if job.status == JobStatus.COMPLETED else None


_task.__qualname__ = "zexp"


def act_on(
    composed: Sequence[Composed],
    launcher: Any,
    on_start: Callable[[], None] | None = None,
    trials: Trials | None = None,
) -> list[JobReturn]:
    """What the verb does with the variants; one JobReturn for each, in order.

    on_start: called before anything runs; trials: the sweep whose batch this is, if its sweeper is not zexp's.
    """
    variants = list(composed) if trials is None else trials.add(composed)
    options = OmegaConf.to_container(launcher, resolve=True)
    assert isinstance(options, dict)
    request = execute.Request({str(key): value for key, value in options.items()}, Path.cwd(), tuple(sys.argv[1:]), on_start, trials)
    if _Verb.name != "run":
        _show(variants, request)
        if trials is not None and trials.in_batches:
            print(f"This is the first batch that hydra/sweeper={trials.sweeper} asks for.", file=sys.stderr)
            raise _Enough
        return execute.completed(list(composed))
    acted = execute.act(variants, request)
    _Verb.acted.append(acted)
    if trials is None:
        return acted.job_returns
    statuses = {outcome.status for outcome in acted.outcomes.values()}
    if statuses & {"interrupted", "submitted"}:  # nobody knows the scores that the next batch depends on
        raise _Enough
    return [acted.job_returns[place] for place in trials.places(composed)]


def _show(variants: list[Composed], request: execute.Request) -> None:
    if _Verb.act is not None:
        _Verb.exit_code = _Verb.act(variants, request)
        return
    if _Verb.name == "calc":
        _Verb.exit_code = show_calc.calc(variants, _Verb.budget, as_json=_Verb.json)
        return
    plan, study, store, _ = execute.planned(variants, request)
    if _Verb.why is not None:
        why.show(why.why(_Verb.why, plan, store), as_json=_Verb.json)
        return
    ahead = outlook(plan, store, options_of(request.launcher), study["name"])
    show.plan(plan, study, store, ahead, as_json=_Verb.json)


def is_own_task(task: Any) -> bool:
    """True for zexp's task function: a foreign one would not be run by what the launcher submits."""
    return task is _task


def _refuse_choices_in_both(words: list[str]) -> None:
    """A choice that the user's folder and zexp both define is ambiguous: Hydra would take one silently."""
    for i, word in enumerate(words):
        folder = words[i + 1] if word in ("--config-dir", "-cd") and i + 1 < len(words) else None
        folder = word.split("=", 1)[1] if word.startswith("--config-dir=") else folder
        if folder is None:
            continue
        mine = Path(folder)
        if not mine.is_dir():
            raise ConfigError(f"--config-dir {folder}: no such folder.")
        twice = [path for path in sorted(mine.rglob("*.yaml")) if (conf_dir() / path.relative_to(mine)).exists()]
        if twice:
            raise ConfigError(
                [
                    f"{path} and {conf_dir() / path.relative_to(mine)} define the same choice. Rename yours."
                    for path in twice
                ]
            )


def _cause(error: BaseException) -> str:
    """Hydra's text with what caused it, without the chain of wrappers."""
    texts: list[str] = []
    current: BaseException | None = error
    while current is not None:
        if isinstance(current, ConfigError):
            return str(current)
        text = str(current).strip()
        if text and text not in texts and not any(text in known for known in texts):
            texts.append(text)
        current = current.__cause__
    if any(re.search(r"dict is not a subclass of \w+", text) for text in texts):
        texts.append("A new entry is added whole: +phases={cool:{tokens:10K}}, +mix.sources={mine:{weight:1}}.")
    if any("hydra/sweeper/optuna" in text for text in texts):
        texts.append("Optuna's sweeper is an extra of zexp: pip install 'zexp[optuna]'")
    return "\n".join(texts)
