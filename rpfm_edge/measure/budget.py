"""Limits on what was measured."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from rpfm_edge.core.errors import ConfigError
from rpfm_edge.measure.metrics import Summary, missing_metrics

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True, slots=True)
class Budget:
    """How much drift is accepted: limits on the median over the images. None leaves a metric free.

    ``pck`` and ``flicker`` are limited in their mean: most pictures have all joints right, so a median is soon 1.
    """

    psnr_db_min: float | None = None
    ssim_min: float | None = None
    flip_max: float | None = None
    lpips_max: float | None = None
    detail_min: float | None = None
    pck_min: float | None = None
    flicker_max: float | None = None

    @classmethod
    def load(cls, path: Path) -> Budget:
        """Read the table ``[drift]`` of a TOML file (other tables are not looked at).

        Raises:
            ConfigError: no such file, no TOML, no such table, an unknown key, or a limit that is no number.
        """
        try:
            table = tomllib.loads(path.read_text(encoding="utf-8")).get("drift")
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} cannot be read ({error})", expected="a TOML file", fix="correct it") from None
        if not isinstance(table, dict):
            raise ConfigError(f"{path} has no table [drift]", expected="one, with limits", fix="add it")
        return cls.from_dict(table, f"{path} [drift]")

    @classmethod
    def from_dict(cls, table: Mapping[str, Any], origin: str = "the budget") -> Budget:
        """The limits as a mapping; ``origin`` is named in errors, which are those of ``load``."""
        known = [field.name for field in fields(cls)]
        for key, value in table.items():
            if key not in known:
                raise ConfigError(f"{origin} has {key!r}", expected=f"one of {known}", fix="check the spelling")
            if isinstance(value, bool) or not isinstance(value, int | float) or not np.isfinite(value):
                raise ConfigError(f"{origin} sets {key} = {value!r}", expected="a finite number", fix="correct it")
        return cls(**table)

    def check(self, summary: Mapping[str, Mapping[str, Any]]) -> list[str]:
        """The violations, each naming metric, measured value and limit; empty when all limits are met.

        A limit on a metric that was not measured, or that came out as nan, is a violation.
        """
        violations = []
        for field in fields(self):
            limit, (name, _, side) = getattr(self, field.name), field.name.rpartition("_")
            if limit is None:
                continue
            if name not in summary:
                violations.append(f"{name} was not measured, the limit is {limit:g} ({field.name})")
                continue
            average = "mean" if name in ("pck", "flicker") else "median"
            value = summary[name][average]
            if not (value >= limit if side == "min" else value <= limit):
                words = "below" if side == "min" else "above"
                violations.append(f"{name} {average} {value:.4g} is {words} the limit {limit:g} ({field.name})")
        return violations


def require_distances(budget: Budget, origin: str = "a budget") -> None:
    """Raise ``ConfigError`` for a limit on something else than the distance of two pictures, as it can be measured
    here."""
    limits, missing = {key: value for key, value in asdict(budget).items() if value is not None}, missing_metrics()
    for limit in limits:
        metric = limit.rpartition("_")[0]
        if metric in ("detail", "flicker", "pck"):
            raise ConfigError(
                f"{origin} with {limit}",
                expected="limits on the distance to the float graph",
                fix="validate the bundle",
            )
        if metric in missing:
            raise ConfigError(
                f"{origin} with {limit}, which cannot be measured here", expected="other limits", fix=missing[metric]
            )


def limited(stage: Mapping[str, Any]) -> Summary:
    """What a budget limits, of a stage: the distances to the teacher, and what is measured beside distances."""
    return {**stage["against_teacher"], **beside_distances(stage)}


def beside_distances(stage: Mapping[str, Any]) -> Summary:
    """What was measured of a stage beside distances: poses, detail, flicker."""
    return {**stage.get("pose", {}), **stage.get("detail", {}), **stage.get("flicker", {})}
