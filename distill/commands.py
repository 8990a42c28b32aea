"""``train`` and ``distill``: from data to a teacher and from a teacher to a student, each stage with a time budget.

Everything that takes long is kept in a work folder beside the result and continued from there after a kill.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState

from distill import autoencoder as autoencoders
from distill.autoencoder import AutoencoderTraining, SmallAutoencoder, SmallAutoencoderConfig, train_autoencoder
from distill.batches import encode_split
from distill.rpfm import RPFM, RPFMConfig, preset
from distill.store import StoreConfig, build_store, load_store
from distill.student import METHODS, DistillConfig, Method, create_student, save_student, train_student
from distill.teacher import (
    TOOLS,
    FlowMatchingConfig,
    Guidance,
    RPFMTeacher,
    Teacher,
    load_teacher,
    move,
    save_teacher,
    train_teacher,
)
from distill.train import History, TrainConfig
from distill.weights import load_weights, save_weights
from rpfm_edge import artifact
from rpfm_edge.artifact import Artifact, Stage, tool_versions
from rpfm_edge.data import Split
from rpfm_edge.errors import ConfigError

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


@dataclass(frozen=True, slots=True)
class TrainRecipe:
    """A teacher from nothing: an autoencoder, then the flow network on its latents. ``seconds`` are training time."""

    preset: str = "xs"
    autoencoder: str = "small"  # or the folder of a diffusers AutoencoderKL
    autoencoder_seconds: float = 780.0
    seconds: float = 3300.0
    lr: float = 1e-3
    ema: float = 0.999
    sources: int = 4
    targets_per_source: int = 8
    guidance_scale: float = 1.5
    guidance_schedule: str = "constant"
    weights: str = "fp16"
    size: tuple[int, int] = (256, 176)
    seed: int = 0


@dataclass(frozen=True, slots=True)
class DistillRecipe:
    """A student from a teacher. ``trajectories`` and ``store_seconds`` bound the store, ``seconds`` the training."""

    method: Method = "flowmap"
    steps: int = 4
    trajectories: int = 2048
    store_seconds: float | None = None
    seconds: float = 600.0
    lr: float = 5e-4
    ema: float = 0.995
    batch: int = 64
    targets_per_source: int = 8
    preset: str | None = None  # the student's architecture, where the teacher is no RPFM network
    weights: str = "fp16"
    seed: int = 0


def train(recipe: TrainRecipe, split: Split, out: Path) -> Artifact:
    """Train a teacher on ``split`` and write it to ``out``; continues from ``out.work`` if it is there."""
    _check_choice("weights", recipe.weights, DTYPES)
    torch.manual_seed(recipe.seed)
    work = out.with_name(out.name + ".work")
    processes = PartialState()  # one, or those of torchrun, each with a device of its own
    autoencoder, stages = _autoencoder(recipe, split, work)
    autoencoder = autoencoder.to(processes.device).eval().requires_grad_(False)
    with processes.main_process_first():
        data = encode_split(split, autoencoder, work, recipe.size, processes.device)

    factor, (height, width) = autoencoder.factor, recipe.size
    latent_size = (height // factor, width // factor)
    network = RPFM(
        preset(recipe.preset, latent_channels=autoencoder.latent_channels, latent_size=latent_size, factor=factor)
    )
    config = FlowMatchingConfig(
        train=TrainConfig(seconds=recipe.seconds, lr=recipe.lr, ema=recipe.ema, seed=recipe.seed),
        sources=recipe.sources,
        targets_per_source=recipe.targets_per_source,
    )
    network, history = train_teacher(network, autoencoder, data, config, work / "teacher.safetensors")
    guidance = Guidance(recipe.guidance_scale, recipe.guidance_schedule)
    teacher = RPFMTeacher(network, autoencoder, guidance, recipe.size)
    stage = _stage("train", config, history, split)
    if processes.is_main_process:
        save_teacher(teacher, out, (*stages, stage), DTYPES[recipe.weights], losses=thin(history.losses))
    processes.wait_for_everyone()
    return artifact.load(out, "teacher")


def _autoencoder(recipe: TrainRecipe, split: Split, work: Path) -> tuple[Any, tuple[Stage, ...]]:
    if recipe.autoencoder != "small":
        return autoencoders.load_kl(recipe.autoencoder), (
            Stage("autoencoder", {"kind": "kl"}, tool_versions("diffusers")),
        )
    autoencoder, file = SmallAutoencoder(SmallAutoencoderConfig()), work / "autoencoder.final.safetensors"
    defaults = AutoencoderTraining()
    config = replace(defaults, train=replace(defaults.train, seconds=recipe.autoencoder_seconds, seed=recipe.seed))
    if not file.exists():
        read = reader(split, recipe.size)
        checkpoint = work / "autoencoder.safetensors"
        autoencoder, _ = train_autoencoder(autoencoder, read, len(split.names), config, checkpoint)
        if PartialState().is_main_process:
            save_weights(autoencoder, file)
        PartialState().wait_for_everyone()
    load_weights(autoencoder, file)
    return autoencoder, (Stage("autoencoder", asdict(config), tool_versions(*TOOLS)),)


def reader(split: Split, size: tuple[int, int]) -> Callable[[int], np.ndarray]:
    """``split.image`` at ``size``."""
    return lambda index: split.image(index, size)


def distill(recipe: DistillRecipe, teacher_spec: str, split: Split, out: Path) -> Artifact:
    """Distill a teacher on the identities of ``split`` and write the student to ``out``."""
    _check_choice("weights", recipe.weights, DTYPES)
    _check_choice("method", recipe.method, METHODS)
    torch.manual_seed(recipe.seed)
    work = out.with_name(out.name + ".work")
    teacher = load_teacher(teacher_spec)
    processes = PartialState()  # one, or those of torchrun, each with a device of its own
    move(teacher, processes.device)
    with processes.main_process_first():
        data = encode_split(split, teacher.autoencoder, work, teacher.size, processes.device)
    config = DistillConfig(
        method=recipe.method,
        steps=recipe.steps,
        batch=recipe.batch,
        train=TrainConfig(seconds=recipe.seconds, lr=recipe.lr, ema=recipe.ema, warmup_steps=20, seed=recipe.seed),
    )
    student = create_student(teacher, config, _architecture(recipe, teacher))

    store_config = StoreConfig(recipe.trajectories, targets_per_source=recipe.targets_per_source, seed=recipe.seed + 1)
    identity = getattr(teacher, "digest", "") or teacher_spec
    build_store(teacher, identity, data, work / "store", store_config, recipe.store_seconds, processes)
    processes.wait_for_everyone()
    store = load_store(work / "store")
    checkpoint = work / f"{recipe.method}-{recipe.steps}.safetensors"
    student, history = train_student(student, data, store, config, checkpoint)

    trained_on = {"trajectories": len(store.states), "store": asdict(store_config), "guidance": _guidance(teacher)}
    stage = _stage("distill", config, history, split, {"teacher": identity}, trained_on)
    lineage = (*getattr(teacher, "lineage", ()), stage)
    if processes.is_main_process:
        facts = {"teacher": str(teacher_spec), "losses": thin(history.losses)}
        save_student(student, out, config, teacher.size, lineage, DTYPES[recipe.weights], **facts)
    processes.wait_for_everyone()
    return artifact.load(out, "student")


def _architecture(recipe: DistillRecipe, teacher: Teacher) -> RPFMConfig | None:
    """The student of a teacher that is no RPFM network: a preset, fitted to the teacher's latents."""
    if recipe.preset is None:
        return None
    channels, *latent_size = teacher.latent_shape
    factor = teacher.autoencoder.factor
    return preset(recipe.preset, latent_channels=channels, latent_size=tuple(latent_size), factor=factor)


def _guidance(teacher: Any) -> dict[str, Any] | None:
    return asdict(teacher.guidance) if isinstance(teacher, RPFMTeacher) else None


def _stage(
    name: str,
    config: Any,
    history: History,
    data: Split,
    inputs: dict[str, str] | None = None,
    facts: dict[str, Any] | None = None,
) -> Stage:
    record = asdict(config) | {
        "steps_done": history.step,
        "trained_s": round(history.elapsed_s, 1),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "data": data.root.name,
        "images": len(data.names),
        "identities": len(set(data.identities.tolist())),
    }
    return Stage(name, record | (facts or {}), tool_versions(*TOOLS), inputs or {})


def thin(losses: list[float], points: int = 200) -> list[tuple[int, float]]:
    """(step, mean loss since the last point) at about ``points`` places: a curve that fits in a manifest."""
    edges = np.unique(np.linspace(0, len(losses), points + 1).astype(int))
    return [(int(b), float(np.mean(losses[a:b]))) for a, b in pairwise(edges)]


def _check_choice(what: str, value: str, choices: Any) -> None:
    if value not in choices:
        raise ConfigError(f"unknown {what} {value!r}", expected=f"one of {sorted(choices)}", fix="check the spelling")
