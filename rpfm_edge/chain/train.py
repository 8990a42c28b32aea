"""Data → teacher → student."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
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
    """Distill a teacher to few steps.

    Args:
        teacher: a path, a shipped name (``teacher:xs``) or ``package.module:factory``.
        changes: fields of ``distill.commands.DistillRecipe`` (method, steps, seconds, …); None is no change.
    """
    artifact.require_free(out, "student")
    commands = _distill_module("commands")
    recipe = parse(commands.DistillRecipe, without_none(changes), "distill")
    made: Artifact = commands.distill(recipe, str(teacher), open_splits(data).training, Path(out))
    return made


def distill_decoder(teacher: str | Path, data: str | Path, out: str | Path, **changes: Any) -> Artifact:
    """Train a small decoder for a teacher's latents.

    ``changes``: fields of ``distill.decoder_command.DecoderRecipe`` (gflop, seconds, student, …); None is no change.
    """
    artifact.require_free(out, "codec")
    command = _distill_module("decoder_command")
    require_module("skimage", "validate")
    recipe, splits = parse(command.DecoderRecipe, without_none(changes), "distill-decoder"), open_splits(data)
    made: Artifact = command.distill_decoder(recipe, str(teacher), splits.training, Path(out), splits.validation)
    return made


def fine_tune(student: str | Path, data: str | Path, out: str | Path, **changes: Any) -> Artifact:
    """Fine-tune a student for INT8 or INT4 weights: quantization-aware distillation.

    ``changes``: fields of ``distill.commands.QadRecipe`` (precision, steps, seconds, …); None is no change.
    """
    artifact.require_free(out, "student")
    commands = _distill_module("commands")
    recipe = parse(commands.QadRecipe, without_none(changes), "fine-tune")
    made: Artifact = commands.fine_tune(recipe, str(student), open_splits(data).training, Path(out))
    return made


def _distill_module(name: str) -> Any:
    require_module("torch", "distill")
    require_module("accelerate", "distill")
    spec, ours = find_spec("distill"), Path(__file__).parent.parent.parent / "distill"
    if spec is None or Path(spec.origin or "").parent != ours:
        raise ConfigError(
            f"{spec.origin if spec else 'nothing'} is imported as distill, in place of the kit's own",
            expected=str(ours),
            fix="rename your file, or take its folder out of PYTHONPATH",
        )
    return import_module(f"distill.{name}")
