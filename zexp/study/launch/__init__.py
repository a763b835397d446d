"""Launchers: they take stages that are missing in the store to where they can run, in the order of their parents."""

from zexp.study.launch.base import Event, LauncherOptions, Outcome, Stage, launch

__all__ = ["Event", "LauncherOptions", "Outcome", "Stage", "launch"]
