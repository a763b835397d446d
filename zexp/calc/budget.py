"""What a number of accelerators can train in a number of days."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING

from zexp.calc.devices import DEVICES

SECONDS_PER_DAY = 86_400
TOKENS_PER_PARAMETER = 20  # compute-optimal for dense transformers: Hoffmann et al. 2022 (arXiv:2203.15556), table 3


@dataclass(kw_only=True)
class Budget:
    """The keys of `zexp calc budget`, beside those of a run."""

    gpus: int = MISSING  # accelerators
    days: float = MISSING
    device: str = MISSING  # a name of zexp/calc/devices.py
    mfu: float = 0.4  # model FLOP/s as a share of the peak, 0 … 1; recomputed FLOPs do not count as the model's
    peak: str = "bf16"  # which of the device's peaks the share is of

    def problems(self) -> list[str]:
        """What is illegal, one text each."""
        found = []
        if self.gpus < 1:
            found.append(f"gpus = {self.gpus}: it must be at least 1.")
        if not 0 < self.days < float("inf"):
            found.append(f"days = {self.days}: it must be above 0.")
        if not 0 < self.mfu <= 1:
            found.append(f"mfu = {self.mfu}: the share of the peak that training reaches is above 0 and at most 1; 0.4 is good.")
        if self.device not in DEVICES:
            near = difflib.get_close_matches(self.device, DEVICES, n=1)
            hint = f"Did you mean {near[0]}? " if near else ""
            found.append(f"device = {self.device!r}: no such device. {hint}There are: {', '.join(DEVICES)}.")
        elif self.peak not in (peaks := DEVICES[self.device].flops):
            found.append(f"peak = {self.peak!r}: the peaks known of {self.device} are those of {', '.join(peaks)}.")
        return found

    def answer(self, parameters: Mapping[str, int], train_flops_per_token: float, training_bytes: int) -> dict[str, Any]:
        """FLOPs, tokens, tokens per parameter, and whether a device holds the training.

        training_bytes: on each device, as zexp.calc.memory counts them.
        """
        device = DEVICES[self.device]
        per_day = self.gpus * SECONDS_PER_DAY * device.flops[self.peak] * self.mfu
        tokens = self.days * per_day / train_flops_per_token
        optimal = TOKENS_PER_PARAMETER * parameters["total"]
        return {
            "gpus": self.gpus,
            "days": self.days,
            "device": self.device,
            "mfu": self.mfu,
            "peak": self.peak,
            "peak_flops_per_second": device.flops[self.peak],
            "source": device.source,
            "flops": self.days * per_day,
            "tokens": tokens,
            "tokens_per_second": tokens / (self.days * SECONDS_PER_DAY),
            "tokens_per_parameter": tokens / parameters["total"],
            "tokens_per_active_parameter": tokens / parameters["active"],
            "days_for_20_tokens_per_parameter": optimal * train_flops_per_token / per_day,
            "device_memory": int(device.memory),
            "training_memory": training_bytes,
            "fits": training_bytes <= device.memory,
        }
