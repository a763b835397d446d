"""`hydra/sweeper=halving`: a study's points, all for a short time, the better ones further."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from hydra.core.utils import JobStatus

from hydra_plugins.zexp.sweeper import ZexpSweeper

if TYPE_CHECKING:
    from hydra_plugins.zexp.launcher import ZexpLauncher

Point = tuple[dict[str, Any], list[str]]


class HalvingSweeper(ZexpSweeper):
    """Launches the study's points rung by rung; conf/hydra/sweeper/halving.yaml documents the options."""

    def __init__(self, axis: str, first: Any, factor: int, direction: str | None) -> None:
        super().__init__()
        self.axis, self.first, self.factor, self.direction = axis, first, factor, direction

    def sweep(self, arguments: list[str]) -> Any:
        """One batch a rung, as Hydra's sweepers return them."""
        from zexp.config.tokens import say_tokens
        from zexp.study import halving
        from zexp.study.variants import last_of_each_key, name_of

        points = self.points(arguments)
        launcher = self._launcher()
        lengths = halving.rungs(self.first, self.factor, self._full_length(launcher, points), len(points), self.axis)
        batches: list[Any] = []
        begun = 0
        for number, tokens in enumerate(lengths, start=1):
            rung = [
                ({**axes, self.axis: tokens}, last_of_each_key([*overrides, f"{self.axis}={tokens}"]))
                for axes, overrides in points
            ]
            returns = launcher.launch_rung(rung, begun)
            batches.append(returns)
            begun += len(rung)
            scores = [job.return_value if job.status == JobStatus.COMPLETED else None for job in returns]
            kept = halving.survivors(scores, self.factor, str(self.direction))
            if number == len(lengths) or not kept:
                break
            points = [points[place] for place in kept]
            names = ", ".join(name_of(axes, "", None) for axes, _ in points)
            print(f"Rung {number} of {len(lengths)}: {len(rung)} variants to {say_tokens(tokens)} tokens. {len(kept)} go on: {names}.")
        return batches

    def _launcher(self) -> ZexpLauncher:
        from zexp.config.errors import ConfigError

        # Not isinstance: Hydra loads its plugins' modules a second time.
        if not hasattr(self.launcher, "launch_rung"):
            raise ConfigError("hydra/sweeper=halving goes with zexp's launchers, hydra/launcher=local and slurm.")
        return cast("ZexpLauncher", self.launcher)

    def _full_length(self, launcher: ZexpLauncher, points: list[Point]) -> Any:
        """What all points say of the axis. Raises ConfigError with everything that stands in the way of halving."""
        from zexp.config.errors import Problems
        from zexp.study import halving

        assert self.config is not None
        problems = Problems()
        phase = halving.phase_of(self.axis)
        if self.direction not in halving.DIRECTIONS:
            problems.add(
                f"hydra.sweeper.direction = {self.direction!r}: say which scores of study.metric are the better ones, "
                "hydra.sweeper.direction=minimize (bits per byte) or maximize (accuracies)."
            )
        if self.config.study.metric is None:
            problems.add("study.metric is not set: hydra/sweeper=halving chooses by it, e.g. study.metric=bpb_base/bits_per_byte")
        lengths: dict[str, Any] = {}
        for axes, overrides in points:
            config = launcher.composer.compose(axes, overrides, 0).composed.config
            if phase not in config.phases:
                problems.add(f"hydra.sweeper.axis = {self.axis!r}: there is no phase {phase!r}, but {', '.join(config.phases)}.")
                continue
            lengths[str(config.phases[phase].tokens)] = config.phases[phase].tokens
            kind = (config.phases[phase].schedule or config.schedule).kind
            if kind in halving.HORIZON:
                problems.add(
                    f"schedule.kind = {kind!r}: each of its steps depends on the length, so a longer training begins anew and "
                    "halving saves nothing. Take schedule=wsd or schedule=constant."
                )
        if len(lengths) > 1:
            problems.add(f"hydra.sweeper.axis = {self.axis!r}: the variants differ in it ({', '.join(lengths)}). Halving decides it.")
        problems.raise_if_any()
        return next(iter(lengths.values()))
