"""Data → teacher → student."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any

from rpfm_edge.core import artifact
from rpfm_edge.core.artifact import Artifact
from rpfm_edge.core.config import parse, read_toml, without_none
from rpfm_edge.core.errors import ConfigError
from rpfm_edge.core.extras import require_module
from rpfm_edge.core.flow import guidance_scale
from rpfm_edge.people.splits import open_splits


def train(config: str | Path, data: str | Path, out: str | Path, **changes: Any) -> Artifact:
    """Train an RPFM teacher.

    Args:
        config: a preset (xs, s, b, l), or a TOML file with the fields of ``distill.commands.TrainRecipe``.
        data: the root of a data set in one of DeepFashion's layouts, or ``sample``.
        changes: fields that override the config's; None is no change.
    """
    teach = _distill_module("teach")
    text = str(config)
    table = read_toml(Path(config)) if text.endswith(".toml") else {"preset": text}
    recipe = parse(teach.TrainRecipe, {**table, **without_none(changes)}, text)
    teach.preset(recipe.preset)  # what is wrong is said now, not after the autoencoder's training
    guidance_scale(0.0, recipe.guidance_scale, recipe.guidance_schedule)
    artifact.require_free(out, "teacher")
    splits = open_splits(data)
    made: Artifact = teach.train(recipe, splits.training, Path(out), splits.validation)
    return made


def distill(teacher: str | Path, data: str | Path, out: str | Path, **changes: Any) -> Artifact:
    """Distill a teacher to few steps; or, with the method "qad", fine-tune a student for INT8 or INT4 weights.

    Args:
        teacher: a path, a shipped name (``teacher:xs``) or ``package.module:factory``; with "qad" a student.
        changes: fields of ``distill.commands.DistillRecipe`` (method, steps, seconds, …), with "qad" of ``QadRecipe``
            (precision, steps, seconds, …); None is no change.
    """
    artifact.require_free(out, "student")
    commands, given = _distill_module("commands"), without_none(changes)
    made: Artifact
    _check_idle(commands, given)
    if given.get("method") == "qad":
        del given["method"]
        qad = parse(commands.QadRecipe, given, "distill by qad")
        made = commands.fine_tune(qad, str(teacher), open_splits(data).training, Path(out))
    else:
        recipe = parse(commands.DistillRecipe, given, "distill")
        made = commands.distill(recipe, str(teacher), open_splits(data).training, Path(out))
    return made


def _check_idle(commands: Any, given: Mapping[str, Any]) -> None:
    """Refuse what only the other way to distill knows."""
    by_qad = given.get("method") == "qad"
    qad, others = ({field.name for field in fields(one)} for one in (commands.QadRecipe, commands.DistillRecipe))
    idle = [name for name in given if name != "method" and name in (others - qad if by_qad else qad - others)]
    if idle:
        raise ConfigError(
            f"{idle[0]} is {'no option' if by_qad else 'an option'} of the method qad",
            expected="another method" if by_qad else "that method",
            fix=f"leave {idle[0]} out, or change the method",
        )


def _distill_module(name: str) -> Any:
    require_module("torch", "distill")
    require_module("accelerate", "distill")
    return import_module(f"distill.{name}")
