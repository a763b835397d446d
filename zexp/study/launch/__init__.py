"""Launchers: they take stages that are missing in the store to where they can run, in the order of their parents."""

from zexp.study.launch.base import Event, LauncherOptions, Outcome, Stage, launch
from zexp.study.launch.study import options_of, run_stages

__all__ = ["Event", "LauncherOptions", "Outcome", "Stage", "launch", "options_of", "run_stages"]
