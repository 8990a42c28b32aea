"""``train`` and ``distill``: from data to a teacher and from a teacher to a student, each stage with a time budget.

Everything that takes long is kept in a work folder beside the result and continued from there after a kill.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import PartialState
from torch import nn

from distill import autoencoder as autoencoders
from distill.autoencoder import AutoencoderTraining, SmallAutoencoder, SmallAutoencoderConfig, train_autoencoder
from distill.batches import EncodedSplit, encode_split, fingerprint
from distill.qad import QadConfig, train_rounded
from distill.resident import Pictures, open_pictures
from distill.rpfm import RPFM, RPFMConfig, preset
from distill.store import StoreConfig, build_store, load_store
from distill.student import (
    METHODS,
    DistillConfig,
    create_student,
    load_student,
    save_student,
    train_student,
)
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
from distill.train import History, TrainConfig, check_settings, join_processes
from distill.weights import load_weights, save_weights
from rpfm_edge import artifact
from rpfm_edge.artifact import Artifact, Stage, json_digest, tool_versions
from rpfm_edge.data import Split
from rpfm_edge.errors import ConfigError, InputError
from rpfm_edge.flow import check_steps
from rpfm_edge.recipe import Distillation, QadTable, TeacherTraining, check_size
from rpfm_edge.stages import identity

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
LEARNING_RATES = {"int8": 1e-5, "int4-weights": 2e-5}
CURVE_POINTS = 50  # of the held-out loss, whatever the budget


@dataclass(frozen=True, slots=True)
class TrainRecipe(TeacherTraining):
    """A teacher from nothing. ``cache``: folder of the encoded latents, beside the result if not given."""

    weights: str = "fp16"
    cache: str | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True)
class DistillRecipe(Distillation):
    """A student from a teacher. ``trajectories`` and ``store_seconds`` bound the store, ``seconds`` the training.

    ``store`` and ``cache``: folders of the teacher's paths and of the encoded latents, which the students of one
    teacher may share; beside the result if not given.
    """

    store: str | None = None
    cache: str | None = None
    trajectories: int = 2048
    store_seconds: float | None = None
    ema: float = 0.995
    targets_per_source: int = 8
    weights: str = "fp16"
    seed: int = 0


@dataclass(frozen=True, slots=True)
class QadRecipe(QadTable):
    """A student fine-tuned for a precision."""

    ema: float = 0.98
    weights: str = "fp16"
    seed: int = 0


def train(recipe: TrainRecipe, split: Split, out: Path, validation: Split | None = None) -> Artifact:
    """Train a teacher on ``split`` and write it to ``out``; continues from ``out.work`` if it is there.

    With ``validation`` its config holds the curve of the loss on these people: ``[seconds, step, loss]`` each.
    """
    _check_choice("weights", recipe.weights, DTYPES)
    _check_people(split, validation)
    torch.manual_seed(recipe.seed)
    processes = join_processes()
    autoencoder, stages, data, held_out = _encoded(recipe, split, validation, _work(out))
    factor, (height, width) = autoencoder.factor, recipe.size
    latent_size = (height // factor, width // factor)
    network = RPFM(
        preset(recipe.preset, latent_channels=autoencoder.latent_channels, latent_size=latent_size, factor=factor)
    )
    learnt_from = {
        "autoencoder": fingerprint(autoencoder),
        "data": split.digest,
        "size": recipe.size,
        "batch": [recipe.sources, recipe.targets_per_source],
    }
    config = FlowMatchingConfig(
        train=TrainConfig(
            seconds=recipe.seconds,
            lr=recipe.lr,
            ema=recipe.ema,
            seed=recipe.seed,
            inputs=learnt_from,
            evaluate_every_s=recipe.seconds / CURVE_POINTS,
            compile=recipe.compile,
        ),
        sources=recipe.sources,
        targets_per_source=recipe.targets_per_source,
    )
    network, history = train_teacher(network, autoencoder, data, config, _work(out) / "teacher.safetensors", held_out)
    teacher = RPFMTeacher(network, autoencoder, Guidance(recipe.guidance_scale, recipe.guidance_schedule), recipe.size)
    lineage = (*stages, _stage("train", config, history, split))
    if processes.is_main_process:
        curves = {"losses": thin(history.losses), "validation": _curve(history)}
        save_teacher(teacher, out, lineage, DTYPES[recipe.weights], **curves)
    processes.wait_for_everyone()
    return artifact.load(out, "teacher")


def _check_people(split: Split, validation: Split | None = None) -> None:
    """Refuse now what would end the run after the first training: nobody with a pair, no picture to validate on."""
    for kind, people in (("training", split), ("validation", validation)):
        if people is not None and not len(people.pairs):
            raise InputError(
                f"the {kind} people of {people.root} have no pairs",
                expected="two pictures of some person, as a pair",
                fix="add pairs to its list",
            )
    if validation is not None:
        for name in validation.names:
            validation.read(name)


def _work(out: Path) -> Path:
    return out.with_name(out.name + ".work")


def _encoded(
    recipe: TrainRecipe, split: Split, validation: Split | None, work: Path
) -> tuple[Any, tuple[Stage, ...], EncodedSplit, EncodedSplit | None]:
    """The autoencoder with its stages, and the data that it encoded."""
    processes, cache = PartialState(), Path(recipe.cache) if recipe.cache else work
    device = processes.device
    pictures = open_pictures(split, recipe.size, device)
    autoencoder, stages = _autoencoder(recipe, pictures, work)
    autoencoder = autoencoder.to(device).eval().requires_grad_(False)
    with processes.main_process_first():
        data = encode_split(split, autoencoder, cache, recipe.size, device, pictures)
        held_out = encode_split(validation, autoencoder, cache, recipe.size, device) if validation else None
    return autoencoder, stages, data, held_out


def _autoencoder(recipe: TrainRecipe, pictures: Pictures, work: Path) -> tuple[Any, tuple[Stage, ...]]:
    """With its weights as they will be stored, so that the latents are those of the autoencoder that is shipped."""
    dtype, patch = DTYPES[recipe.weights], preset(recipe.preset).patch
    if recipe.autoencoder != "small":
        stage = Stage("autoencoder", {"kind": "kl"}, tool_versions("diffusers"))
        loaded = autoencoders.load_kl(recipe.autoencoder)
        check_size(recipe.size, loaded.factor * patch)
        return loaded.to(dtype).float(), (stage,)
    check_size(recipe.size, SmallAutoencoder.factor * patch)
    autoencoder, defaults = SmallAutoencoder(SmallAutoencoderConfig()), AutoencoderTraining()
    learnt_from = {"data": json_digest(pictures.split.names), "size": recipe.size, "batch": recipe.autoencoder_batch}
    limits = replace(
        defaults.train,
        seconds=recipe.autoencoder_seconds,
        seed=recipe.seed,
        inputs=learnt_from,
        compile=recipe.compile,
    )
    config = replace(defaults, train=limits, batch=recipe.autoencoder_batch)
    key = json_digest([recipe.autoencoder_seconds, recipe.seed, recipe.weights, learnt_from])
    file = work / f"autoencoder-{key[:8]}.safetensors"
    if not file.exists():
        count, checkpoint = len(pictures.split.names), work / "autoencoder.safetensors"
        autoencoder, _ = train_autoencoder(autoencoder, pictures, count, config, checkpoint)
        if PartialState().is_main_process:
            save_weights(autoencoder, file, dtype)
        PartialState().wait_for_everyone()
    load_weights(autoencoder, file)
    return autoencoder, (Stage("autoencoder", asdict(config), tool_versions(*TOOLS)),)


def distill(recipe: DistillRecipe, teacher_spec: str, split: Split, out: Path) -> Artifact:
    """Distill a teacher on the identities of ``split`` and write the student to ``out``."""
    config = _distill_config(recipe)
    _check_people(split)
    torch.manual_seed(recipe.seed)
    work, processes = _work(out), join_processes()
    teacher = load_teacher(teacher_spec)
    autoencoders.describe(cast(nn.Module, teacher.autoencoder))  # one that cannot be saved is refused now
    start, origin = load_student(recipe.init) if recipe.init else (None, None)
    student = create_student(teacher, config, _architecture(recipe, teacher), start.network if start else None)
    known_as = getattr(teacher, "digest", "") or identity(teacher_spec)
    inputs = {"teacher": known_as} | ({"init": origin.digest} if origin else {})
    stored = StoreConfig(recipe.trajectories, targets_per_source=recipe.targets_per_source, seed=recipe.seed + 1)
    config = _with_inputs(config, {**inputs, "store": asdict(stored), "data": split.digest})
    name = f"{recipe.method}-{recipe.steps}" + (f"-{origin.digest[:8]}" if origin else "")
    checkpoint = work / f"{name}.safetensors"
    check_settings(checkpoint, config.train)  # before the store is extended for it
    move(teacher, processes.device)
    with processes.main_process_first():
        cache = Path(recipe.cache) if recipe.cache else work
        data = encode_split(split, teacher.autoencoder, cache, teacher.size, processes.device)
    folder = Path(recipe.store) if recipe.store else work / "store"
    build_store(teacher, known_as, data, folder, stored, recipe.store_seconds, processes)
    processes.wait_for_everyone()
    store = load_store(folder, stored, processes.device)
    student, history = train_student(student, data, store, config, checkpoint)

    trained_on = {"trajectories": len(store.states), "store": asdict(stored), "guidance": _guidance(teacher)}
    lineage = tuple(getattr(teacher, "lineage", ()))
    lineage += tuple(stage for stage in (origin.lineage if origin else ()) if stage not in lineage)
    lineage += (_stage("distill", config, history, split, inputs, trained_on),)
    if processes.is_main_process:
        facts = {"teacher": str(teacher_spec), "losses": thin(history.losses)}
        save_student(student, out, config, teacher.size, lineage, DTYPES[recipe.weights], **facts)
    processes.wait_for_everyone()
    return artifact.load(out, "student")


def fine_tune(recipe: QadRecipe, student_spec: str, split: Split, out: Path) -> Artifact:
    """Fine-tune a float student on the identities of ``split`` for a precision and write the new student to ``out``."""
    _check_choice("weights", recipe.weights, DTYPES)
    torch.manual_seed(recipe.seed)
    processes = join_processes()
    student, origin = load_student(student_spec)
    size, steps = tuple(origin.config["size"]), recipe.steps or int(origin.config["steps"])
    check_steps(origin.config, steps)
    learnt_from = {"student": origin.digest, "data": split.digest, "batch": recipe.batch}
    learnt_from |= {"precision": recipe.precision, "steps": steps}
    limits = TrainConfig(
        seconds=recipe.seconds,
        lr=recipe.lr or LEARNING_RATES[recipe.precision],
        ema=recipe.ema,
        warmup_steps=10,
        precision="no",
        seed=recipe.seed,
        inputs=learnt_from,
    )
    config = QadConfig(steps, recipe.precision, limits, targets=recipe.batch)
    checkpoint = _work(out) / f"qad-{recipe.precision}-{steps}-{origin.digest[:8]}.safetensors"
    made, history = train_rounded(student.to(processes.device), split, size, config, checkpoint)
    if processes.is_main_process:
        stage = _stage("qad", config, history, split, {"student": origin.digest})
        facts = {k: origin.config[k] for k in ("teacher",) if k in origin.config} | {"losses": thin(history.losses)}
        kept = DistillConfig(origin.config["method"], steps)
        save_student(made, out, kept, size, (*origin.lineage, stage), DTYPES[recipe.weights], **facts)
    processes.wait_for_everyone()
    return artifact.load(out, "student")


def _distill_config(recipe: DistillRecipe) -> DistillConfig:
    _check_choice("weights", recipe.weights, DTYPES)
    _check_choice("method", recipe.method, METHODS)
    weight = recipe.perceptual_weight
    if weight is not None and (weight < 0 or recipe.method != "endpoint"):
        raise ConfigError(
            f"perceptual_weight {weight:g} with method {recipe.method}",
            expected="0 or more, with endpoint",
            fix="leave it out, or distill by endpoint",
        )
    train = TrainConfig(
        seconds=recipe.seconds, lr=recipe.lr, ema=recipe.ema, warmup_steps=20, seed=recipe.seed, compile=recipe.compile
    )
    config = DistillConfig(method=recipe.method, steps=recipe.steps, batch=recipe.batch, train=train)
    return config if weight is None else replace(config, perceptual_weight=weight)


def _with_inputs(config: DistillConfig, inputs: dict[str, Any]) -> DistillConfig:
    """Its training knows what it learns from, and by which batches and weights."""
    learnt_from = {**inputs, "batch": config.batch, "perceptual_weight": config.perceptual_weight}
    return replace(config, train=replace(config.train, inputs=learnt_from))


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


def _curve(history: History) -> list[tuple[float, int, float]]:
    return [(round(seconds, 1), step, loss) for seconds, step, loss in history.validation]


def thin(losses: list[float], points: int = 200) -> list[tuple[int, float]]:
    """(step, mean loss since the last point) at about ``points`` places: a curve that fits in a manifest."""
    edges = np.unique(np.linspace(0, len(losses), points + 1).astype(int))
    return [(int(b), float(np.mean(losses[a:b]))) for a, b in pairwise(edges)]


def _check_choice(what: str, value: str, choices: Any) -> None:
    if value not in choices:
        raise ConfigError(f"unknown {what} {value!r}", expected=f"one of {sorted(choices)}", fix="check the spelling")
