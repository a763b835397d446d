"""The families, in the order in which a model is offered to them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zexp.config.errors import ConfigError
from zexp.model.hf import (
    bamba,
    gpt_neox,
    jamba,
    lfm2,
    llama,
    mamba,
    mamba2,
    mistral,
    mixtral,
    nemotron_h,
    zamba,
    zamba2,
)
from zexp.model.hf.entries import Unreadable
from zexp.model.hf.family import Family, Parts

FAMILIES: tuple[Family, ...] = (
    llama.FAMILY,
    mistral.FAMILY,
    *gpt_neox.FAMILIES,
    mixtral.FAMILY,
    mamba.FAMILY,
    mamba2.FAMILY,
    zamba.FAMILY,
    zamba2.FAMILY,
    jamba.FAMILY,
    bamba.FAMILY,
    lfm2.FAMILY,
    nemotron_h.FAMILY,
)


def family_of(model: Mapping[str, Any]) -> Family:
    """The first family that can hold the model. Raises ConfigError with what does not fit into the nearest one."""
    parts = Parts(model)
    refused: list[tuple[int, int, Family, list[str]]] = []
    for number, family in enumerate(FAMILIES):
        reasons = family.reasons(model)
        if not reasons:
            return family
        refused.append((1000 * len(family.misplaced(parts)) + len(reasons), number, family, reasons))
    _, _, family, reasons = min(refused, key=lambda one: one[:2])
    raise ConfigError(
        "\n  ".join(
            [
                "no class of `transformers` can hold this model. "
                f"What does not fit into the nearest, {family.class_name}:",
                *reasons,
                "zexp export RUN --safetensors DIR writes the weights under zexp's own names.",
            ]
        )
    )


def family_for(config: Mapping[str, Any], where: str) -> Family:
    """The family of a config.json. Raises ConfigError naming those that there are. where: what to call the file."""
    kind = config.get("model_type")
    candidates = [family for family in FAMILIES if family.model_type == kind]
    if not candidates:
        known = ", ".join(dict.fromkeys(family.model_type for family in FAMILIES))
        raise ConfigError(f"{where}: model_type = {kind!r} is none of those that zexp reads: {known}.")
    for family in candidates[:-1]:
        try:
            family.unlayers(config)
        except Unreadable:
            continue
        return family
    return candidates[-1]
