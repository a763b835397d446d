"""What the user got wrong, all of it at once."""

from __future__ import annotations

from collections.abc import Iterable


class ConfigError(ValueError):
    """The request was wrong and nothing was started (exit code 2).

    problems: one text each, saying what is wrong, what was found and what to do.
    """

    def __init__(self, problems: str | Iterable[str]):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class Problems:
    """Collects mistakes, so that all of a config's are reported together."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def add(self, text: str) -> None:
        if text not in self.texts:  # a shared group is read once per variant; say it once
            self.texts.append(text)

    def extend(self, texts: Iterable[str]) -> None:
        for text in texts:
            self.add(text)

    def raise_if_any(self) -> None:
        if self.texts:
            raise ConfigError(self.texts)
