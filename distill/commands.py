"""``train`` and ``distill``: from data to a teacher and from a teacher to a student, each stage with a time budget.

Everything that takes long is kept in a work folder beside the result and continued from there after a kill.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from distill.autoencoder import KLAutoencoder
from distill.batches import encode_split
from distill.decoder_command import load_decoder
from distill.guidance import Guidance
from distill.networks import describe
from distill.qad import QadConfig, train_rounded
from distill.rpfm import RPFMConfig, preset
from distill.small_decoder import WithDecoder
from distill.store import StoreConfig, build_store, load_store, pictures_of
from distill.student import METHODS, DistillConfig, create_student, load_student, save_student, train_student
from distill.teach import DTYPES, check_choice, check_people, stage_of, thin, work_folder
from distill.teacher import Teacher, load_teacher, move
from distill.train import TrainConfig, check_settings, join_processes
from rpfm_edge.core import artifact
from rpfm_edge.core.artifact import Artifact
from rpfm_edge.core.errors import ConfigError
from rpfm_edge.core.flow import check_steps
from rpfm_edge.core.signature import PoseKind
from rpfm_edge.core.stages import identity
from rpfm_edge.core.training import Distillation, QadTable
from rpfm_edge.people.data import Split, as_seen

LEARNING_RATES = {"int8": 1e-5, "int4-weights": 2e-5}


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


def distill(recipe: DistillRecipe, teacher_spec: str, split: Split, out: Path) -> Artifact:
    """Distill a teacher on the identities of ``split`` and write the student to ``out``."""
    config = _distill_config(recipe)
    check_people(split)
    torch.manual_seed(recipe.seed)
    work, processes = work_folder(out), join_processes()
    teacher = load_teacher(teacher_spec)
    split = as_seen(split, getattr(getattr(teacher, "network", None), "fit", None))
    start, origin = load_student(recipe.init) if recipe.init else (None, None)
    student = create_student(teacher, config, _architecture(recipe, teacher), start.network if start else None)
    known_as = getattr(teacher, "digest", "") or identity(teacher_spec)
    if recipe.codec:
        student.autoencoder = with_decoder(teacher, recipe.codec)
    describe(student.network, student.autoencoder)  # what cannot be saved is refused now
    inputs = {"teacher": known_as} | ({"init": origin.digest} if origin else {})
    stored = StoreConfig(recipe.trajectories, targets_per_source=recipe.targets_per_source, seed=recipe.seed + 1)
    config = _with_inputs(config, {**inputs, "store": asdict(stored), "data": split.digest})
    name = f"{recipe.method}-{recipe.steps}" + (f"-{origin.digest[:8]}" if origin else "")
    checkpoint = work / f"{name}.safetensors"
    check_settings(checkpoint, config.train)  # before the store is extended for it
    move(teacher, processes.device)
    with processes.main_process_first():
        cache = Path(recipe.cache) if recipe.cache else work
        data = encode_split(
            split,
            teacher.autoencoder,
            cache,
            teacher.size,
            processes.device,
            needed=pictures_of(stored, split),
            also=work_folder(Path(teacher_spec)),  # what its training encoded
        )
    folder = Path(recipe.store) if recipe.store else work / "store"
    build_store(teacher, known_as, data, folder, stored, recipe.store_seconds, processes)
    processes.wait_for_everyone()
    store = load_store(folder, stored, processes.device)
    student, history = train_student(student, data, store, config, checkpoint)

    trained_on = {"trajectories": len(store.states), "store": asdict(stored), "guidance": _guidance(teacher)}
    lineage = tuple(getattr(teacher, "lineage", ()))
    lineage += tuple(stage for stage in (origin.lineage if origin else ()) if stage not in lineage)
    lineage += (stage_of("distill", config, history, split, inputs, trained_on),)
    if processes.is_main_process:
        facts = {"teacher": str(teacher_spec), "losses": thin(history.losses)}
        save_student(student, out, config, teacher.size, lineage, DTYPES[recipe.weights], **facts)
    processes.wait_for_everyone()
    return artifact.load(out, "student")


def with_decoder(teacher: Teacher, path: str) -> WithDecoder:
    """The teacher's encoder with a small decoder for its latents."""
    decoder, codec = load_decoder(path), teacher.autoencoder
    fits = (decoder.config.latent_channels, decoder.config.factor)
    if fits != (codec.latent_channels, codec.factor):
        raise ConfigError(
            f"{path} decodes {fits[0]} channels of {fits[1]} pixels",
            expected=f"{codec.latent_channels} of {codec.factor}, the teacher's",
            fix="run distill-decoder for this teacher",
        )
    encoder: Any = codec.without_decoder() if isinstance(codec, KLAutoencoder) else codec
    return WithDecoder(encoder, decoder)


def fine_tune(recipe: QadRecipe, student_spec: str, split: Split, out: Path) -> Artifact:
    """Fine-tune a float student on the identities of ``split`` for a precision and write the new student to ``out``."""
    check_choice("weights", recipe.weights, DTYPES)
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
    checkpoint = work_folder(out) / f"qad-{recipe.precision}-{steps}-{origin.digest[:8]}.safetensors"
    split = as_seen(split, origin.config.get("fit"))
    made, history = train_rounded(student.to(processes.device), split, size, config, checkpoint)
    if processes.is_main_process:
        stage = stage_of("qad", config, history, split, {"student": origin.digest})
        facts = {k: origin.config[k] for k in ("teacher",) if k in origin.config} | {"losses": thin(history.losses)}
        kept = DistillConfig(origin.config["method"], steps)
        save_student(made, out, kept, size, (*origin.lineage, stage), DTYPES[recipe.weights], **facts)
    processes.wait_for_everyone()
    return artifact.load(out, "student")


def _distill_config(recipe: DistillRecipe) -> DistillConfig:
    check_choice("weights", recipe.weights, DTYPES)
    check_choice("method", recipe.method, METHODS)
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
    if recipe.lora < 0:
        raise ConfigError(f"lora {recipe.lora}", expected="a rank such as 16, or 0 for none", fix="correct it")
    config = DistillConfig(
        method=recipe.method,
        steps=recipe.steps,
        batch=recipe.batch,
        lora=recipe.lora,
        gradient_checkpointing=recipe.gradient_checkpointing,
        train=train,
    )
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
    brought = getattr(teacher, "network", None)
    pose: PoseKind = "keypoints" if hasattr(brought, "alignment") else "skeleton"  # keypoints need an alignment
    return preset(recipe.preset, pose, latent_channels=channels, latent_size=tuple(latent_size), factor=factor)


def _guidance(teacher: Any) -> Any:
    """As a manifest says it."""
    guidance = getattr(teacher, "guidance", None)
    return asdict(guidance) if isinstance(guidance, Guidance) else str(guidance)
