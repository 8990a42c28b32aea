"""``distill-decoder``: from a teacher's decoder to a small one, with its own artifact."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distill.autoencoder import AlignedAutoencoder
from distill.batches import EncodedSplit, encode_split
from distill.small_decoder import (
    SmallDecoder,
    SmallDecoderConfig,
    SmallDecoderTraining,
    seconds_of,
    sized,
    train_small_decoder,
)
from distill.student import load_student
from distill.teach import DTYPES, check_people, stage_of, work_folder
from distill.teacher import Teacher, load_teacher, move, pose_kind
from distill.train import TrainConfig, join_processes
from distill.weights import load_weights, save_weights
from rpfm_edge.core import artifact
from rpfm_edge.core.artifact import Artifact
from rpfm_edge.core.errors import ConfigError
from rpfm_edge.core.stages import identity
from rpfm_edge.measure import metrics
from rpfm_edge.people.data import Split
from rpfm_edge.people.image import from_model

HELD_OUT = 16  # pictures that the decoders are compared on


@dataclass(frozen=True, slots=True)
class DecoderRecipe:
    """``pictures``: how many of the data's are encoded, and as many of a student's latents are made."""

    gflop: float = 2.0
    seconds: float = 600.0
    student: str | None = None
    pictures: int = 512
    batch: int = 8
    weights: str = "fp16"
    seed: int = 0


def distill_decoder(
    recipe: DecoderRecipe, teacher_spec: str, split: Split, out: Path, validation: Split | None = None
) -> Artifact:
    """Train a small decoder on pictures of ``split`` and write it to ``out``, with how near it comes on ``validation``
    (on ``split`` without it) and the time of both decoders."""
    check_people(split)
    torch.manual_seed(recipe.seed)
    teacher, device = load_teacher(teacher_spec), join_processes().device
    codec: Any = teacher.autoencoder
    if isinstance(codec, AlignedAutoencoder):
        raise ConfigError(
            "a decoder that looks at the aligned source", expected="one of the latent alone", fix="it is small already"
        )
    config, work = sized(codec, teacher.size, recipe.gflop), work_folder(out)
    move(teacher, device)
    known_as = getattr(teacher, "digest", "") or identity(teacher_spec)
    some = _some(split, recipe.pictures, recipe.seed)
    data = encode_split(split, codec, work, teacher.size, device, pose=pose_kind(teacher), needed=some)
    latents = data.latents[:, torch.from_numpy(some)].flatten(0, 1)
    inputs = {"teacher": known_as, "data": split.digest, "student": recipe.student, "decoder": asdict(config)}
    limits = TrainConfig(
        seconds=recipe.seconds, lr=2e-3, warmup_steps=50, ema=0.995, seed=recipe.seed, precision="no", inputs=inputs
    )
    training = SmallDecoderTraining(limits, recipe.batch)
    others = _of_student(recipe, data, device) if recipe.student else None
    decoder, history = train_small_decoder(
        SmallDecoder(config).to(device), codec, latents, training, work / "decoder.safetensors", others
    )
    facts = compare(decoder.eval(), teacher, validation or split)
    stage = stage_of("decoder", training, history, split, {"teacher": known_as}, facts)
    with artifact.replacing_folder(out, "codec") as folder:
        save_weights(decoder, folder / "decoder.safetensors", DTYPES[recipe.weights])
        artifact.seal(folder, "codec", {"decoder": asdict(config), "size": list(teacher.size), **facts}, {}, (stage,))
    return artifact.load(out, "codec")


def load_decoder(path: str | Path) -> SmallDecoder:
    """The decoder of a codec artifact."""
    loaded = artifact.load(path, "codec")
    decoder = SmallDecoder(SmallDecoderConfig(**loaded.config["decoder"]))
    load_weights(decoder, loaded.file("decoder.safetensors"))
    return decoder.eval().requires_grad_(False)


@torch.no_grad()
def compare(decoder: nn.Module, teacher: Teacher, split: Split) -> dict[str, Any]:
    """PSNR and SSIM of the decoder's pictures to the teacher's, and the time of both, one picture at a time."""
    codec: Any = teacher.autoencoder
    some = _some(split, HELD_OUT, 0)
    pictures = torch.from_numpy(np.stack([split.image(int(index), teacher.size) for index in some]))
    device = next(decoder.parameters()).device
    latents = [codec.encode(one[None].to(device).permute(0, 3, 1, 2).float() / 127.5 - 1) for one in pictures]
    wanted, made = (
        np.concatenate([from_model(decode(latent).cpu().numpy()) for latent in latents])
        for decode in (codec.decode, decoder)
    )
    found = metrics.compare(wanted, made, ("psnr_db", "ssim"))
    return {
        "psnr_db": found["psnr_db"]["mean"],
        "ssim": found["ssim"]["mean"],
        "before_ms": 1e3 * seconds_of(codec.decode, latents[0]),
        "after_ms": 1e3 * seconds_of(decoder, latents[0]),
    }


def _some(split: Split, count: int, seed: int) -> np.ndarray:
    chosen = np.random.default_rng(seed).permutation(len(split.names))[:count]
    return np.sort(chosen)


@torch.no_grad()
def _of_student(recipe: DecoderRecipe, data: EncodedSplit, device: torch.device) -> Tensor:
    """Latents that a student makes, of sources and targets that have been encoded."""
    assert recipe.student is not None
    student, loaded = load_student(recipe.student)
    student.to(device)
    known = set(_some(data.split, recipe.pictures, recipe.seed).tolist())
    pairs = [(int(s), int(t)) for s, t in data.split.pairs if int(s) in known]
    rng, made = np.random.default_rng(recipe.seed), []
    for index in rng.permutation(len(pairs))[: recipe.pictures]:
        source, target = pairs[index]
        batch = data.batch(np.array([source]), np.array([[target]]), np.zeros(1, bool), device)
        noise = torch.from_numpy(rng.standard_normal((1, *student.network.latent_shape), dtype=np.float32)).to(device)
        condition = student.condition(batch.source, batch.pose)
        made.append(student.sample(noise, condition, int(loaded.config["steps"])).half().cpu())
    return torch.cat(made)
