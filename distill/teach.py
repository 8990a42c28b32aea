"""From data to a teacher, stage by stage: autoencoder, alignment, flow, decoder; each with a time budget.

Everything that takes long is kept in a work folder beside the result and continued from there after a kill.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import PartialState

from distill import autoencoder as autoencoders
from distill.align_training import AlignmentTraining, train_alignment
from distill.aligned import AlignedRPFM
from distill.alignment import Alignment
from distill.autoencoder import AutoencoderTraining, SmallAutoencoder, SmallAutoencoderConfig, train_autoencoder
from distill.batches import EncodedSplit, encode_split, fingerprint
from distill.decoder_training import DecoderTraining, train_decoder, with_aligned_decoder
from distill.guidance import Guidance
from distill.networks import create_network
from distill.resident import Pictures, open_pictures
from distill.rpfm import RPFMConfig, preset
from distill.teacher import TOOLS, FlowMatchingConfig, NetworkTeacher, save_teacher, train_teacher
from distill.train import History, TrainConfig, join_processes
from distill.weights import load_weights, save_weights, weights_digest
from rpfm_edge.core import artifact
from rpfm_edge.core.artifact import Artifact, Stage, tool_versions
from rpfm_edge.core.errors import ConfigError, InputError
from rpfm_edge.core.files import json_digest
from rpfm_edge.core.training import TeacherTraining, check_size
from rpfm_edge.people.data import Split

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
ALIGNED_MULTIPLE = 16  # of the pictures' sides, for an alignment
CURVE_POINTS = 50  # of the held-out loss, whatever the budget


@dataclass(frozen=True, slots=True)
class TrainRecipe(TeacherTraining):
    """A teacher from nothing. ``cache``: folder of the encoded latents, beside the result if not given."""

    weights: str = "fp16"
    cache: str | None = None
    seed: int = 0


class People(NamedTuple):
    """Whom a teacher learns from, with their pictures, and whom it is watched on."""

    split: Split
    pictures: Pictures
    validation: Split | None
    held_out: Pictures | None


def train(recipe: TrainRecipe, split: Split, out: Path, validation: Split | None = None) -> Artifact:
    """Train a teacher on ``split`` and write it to ``out``; continues from ``out.work`` if it is there.

    With ``validation`` its config holds the curves of the losses on these people: ``[seconds, step, loss]`` each.
    """
    check_choice("weights", recipe.weights, DTYPES)
    check_people(split, validation)
    torch.manual_seed(recipe.seed)
    processes, work = join_processes(), work_folder(out)
    device = processes.device
    held_out = open_pictures(validation, recipe.size, device) if validation else None
    people = People(split, open_pictures(split, recipe.size, device), validation, held_out)
    autoencoder, stages = _autoencoder(recipe, people.pictures, work)
    autoencoder = autoencoder.to(device).eval().requires_grad_(False)
    network = create_network(_architecture(recipe, autoencoder))
    if isinstance(network, AlignedRPFM):
        alignment, stage = _alignment(recipe, people, work)
        network.alignment.load_state_dict(alignment.state_dict())
        if isinstance(autoencoder, SmallAutoencoder):
            network.conditioner.see_as(autoencoder)
        stages += (stage,)
    data, watched = _encoded(recipe, people, autoencoder, work)
    teacher, stage, curves = _flow(recipe, network, autoencoder, data, watched, work)
    stages += (stage,)
    if isinstance(network, AlignedRPFM) and isinstance(autoencoder, SmallAutoencoder):
        stages += (_decoder(recipe, teacher, data, watched, work),)
    if processes.is_main_process:
        save_teacher(teacher, out, stages, DTYPES[recipe.weights], **curves)
    processes.wait_for_everyone()
    return artifact.load(out, "teacher")


def _architecture(recipe: TrainRecipe, autoencoder: Any) -> RPFMConfig:
    factor, (height, width) = autoencoder.factor, recipe.size
    latent_size = (height // factor, width // factor)
    channels = autoencoder.latent_channels
    return preset(recipe.preset, recipe.pose, latent_channels=channels, latent_size=latent_size, factor=factor)


def _encoded(
    recipe: TrainRecipe, people: People, autoencoder: Any, work: Path
) -> tuple[EncodedSplit, EncodedSplit | None]:
    """The data that the autoencoder has encoded: to train on and to watch."""
    processes, cache = PartialState(), Path(recipe.cache) if recipe.cache else work
    to = (autoencoder, cache, recipe.size, processes.device)
    with processes.main_process_first():
        data = encode_split(people.split, *to, people.pictures, recipe.pose)
        if people.validation is None:
            return data, None
        return data, encode_split(people.validation, *to, people.held_out, recipe.pose)


def _flow(
    recipe: TrainRecipe,
    network: Any,
    autoencoder: Any,
    data: EncodedSplit,
    watched: EncodedSplit | None,
    work: Path,
) -> tuple[NetworkTeacher, Stage, dict[str, Any]]:
    """The teacher, with the stage that it was trained in and the curves of that."""
    learnt_from = {
        "autoencoder": fingerprint(autoencoder),
        "data": data.split.digest,
        "size": recipe.size,
        "batch": [recipe.sources, recipe.targets_per_source],
    }
    if isinstance(network, AlignedRPFM):
        learnt_from["alignment"] = weights_digest(network.alignment)
    limits = _limits(TrainConfig(lr=recipe.lr, ema=recipe.ema), recipe, recipe.seconds, learnt_from)
    config = FlowMatchingConfig(limits, recipe.sources, recipe.targets_per_source)
    network, history = train_teacher(network, autoencoder, data, config, work / "teacher.safetensors", watched)
    guidance = Guidance(recipe.guidance_scale, recipe.guidance_schedule)
    teacher = NetworkTeacher(network, autoencoder, guidance, recipe.size)
    curves = {"losses": thin(history.losses), "validation": curve(history)}
    return teacher, stage_of("train", config, history, data.split), curves


def _autoencoder(recipe: TrainRecipe, pictures: Pictures, work: Path) -> tuple[Any, tuple[Stage, ...]]:
    """With its weights as they will be stored, so that the latents are those of the autoencoder that is shipped."""
    dtype, patch = DTYPES[recipe.weights], preset(recipe.preset).patch
    least = ALIGNED_MULTIPLE if recipe.pose == "keypoints" else 1
    if recipe.autoencoder != "small":
        stage = Stage("autoencoder", {"kind": "kl"}, tool_versions("diffusers"))
        loaded = autoencoders.load_kl(recipe.autoencoder)
        check_size(recipe.size, math.lcm(loaded.factor * patch, least))
        return loaded.to(dtype).float(), (stage,)
    check_size(recipe.size, math.lcm(SmallAutoencoder.factor * patch, least))
    channels = preset(recipe.preset, recipe.pose).latent_channels
    autoencoder = SmallAutoencoder(SmallAutoencoderConfig(latent_channels=channels))
    defaults = AutoencoderTraining()
    learnt_from = {"data": json_digest(pictures.split.names), "size": recipe.size, "batch": recipe.autoencoder_batch}
    limits = replace(
        defaults.train,
        seconds=recipe.autoencoder_seconds,
        seed=recipe.seed,
        inputs=learnt_from,
        compile=recipe.compile,
    )
    config = replace(defaults, train=limits, batch=recipe.autoencoder_batch)
    key = json_digest([recipe.autoencoder_seconds, recipe.seed, recipe.weights, channels, learnt_from])
    file = work / f"autoencoder-{key[:8]}.safetensors"
    if not file.exists():
        count, checkpoint = len(pictures.split.names), work / "autoencoder.safetensors"
        autoencoder, _ = train_autoencoder(autoencoder, pictures, count, config, checkpoint)
        if PartialState().is_main_process:
            save_weights(autoencoder, file, dtype)
        PartialState().wait_for_everyone()
    load_weights(autoencoder, file)
    return autoencoder, (Stage("autoencoder", asdict(config), tool_versions(*TOOLS)),)


def _limits(defaults: TrainConfig, recipe: TrainRecipe, seconds: float, learnt_from: dict[str, Any]) -> TrainConfig:
    """``defaults`` within the budget of a stage, watched as often as every stage is."""
    return replace(
        defaults,
        seconds=seconds,
        seed=recipe.seed,
        inputs=learnt_from,
        evaluate_every_s=seconds / CURVE_POINTS,
        compile=recipe.compile,
    )


def _alignment(recipe: TrainRecipe, people: People, work: Path) -> tuple[Alignment, Stage]:
    """With its weights as they will be stored."""
    defaults = AlignmentTraining()
    learnt_from = {"data": people.split.digest, "size": recipe.size, "weights": recipe.weights}
    limits = _limits(defaults.train, recipe, recipe.alignment_seconds, learnt_from)
    config = replace(defaults, train=limits, sources=recipe.sources)
    alignment, checkpoint = Alignment(recipe.size), work / "alignment.safetensors"
    watch = (people.validation, people.held_out) if people.validation and people.held_out else None
    alignment, history = train_alignment(alignment, people.split, people.pictures, config, checkpoint, watch)
    rounded = alignment.to(DTYPES[recipe.weights]).float()
    stage = stage_of("alignment", config, history, people.split, facts={"validation": curve(history)})
    return rounded, stage


def _decoder(
    recipe: TrainRecipe, teacher: NetworkTeacher, data: EncodedSplit, watched: EncodedSplit | None, work: Path
) -> Stage:
    """Give the teacher a decoder that sees the aligned source."""
    assert isinstance(teacher.autoencoder, SmallAutoencoder)
    defaults = DecoderTraining()
    learnt_from = {"teacher": weights_digest(teacher.network), "data": data.split.digest, "size": recipe.size}
    limits = _limits(defaults.train, recipe, recipe.decoder_seconds, learnt_from)
    config = replace(defaults, train=limits)
    decoder = with_aligned_decoder(teacher.autoencoder)
    decoder, history = train_decoder(decoder, teacher, data, config, work / "decoder.safetensors", watched)
    teacher.autoencoder = decoder.eval().requires_grad_(False)
    return stage_of("decoder", config, history, data.split, facts={"validation": curve(history)})


def check_people(split: Split, validation: Split | None = None) -> None:
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


def work_folder(out: Path) -> Path:
    return out.with_name(out.name + ".work")


def stage_of(
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


def curve(history: History) -> list[tuple[float, int, float]]:
    return [(round(seconds, 1), step, loss) for seconds, step, loss in history.validation]


def thin(losses: list[float], points: int = 200) -> list[tuple[int, float]]:
    """(step, mean loss since the last point) at about ``points`` places: a curve that fits in a manifest."""
    edges = np.unique(np.linspace(0, len(losses), points + 1).astype(int))
    return [(int(b), float(np.mean(losses[a:b]))) for a, b in pairwise(edges)]


def check_choice(what: str, value: str, choices: Any) -> None:
    if value not in choices:
        raise ConfigError(f"unknown {what} {value!r}", expected=f"one of {sorted(choices)}", fix="check the spelling")
