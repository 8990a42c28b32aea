"""The settings of training that recipes and the trainers share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from rpfm_edge.core.errors import ConfigError
from rpfm_edge.core.signature import PoseKind

SMALL_MULTIPLE = 16  # pixels per latent of the small autoencoder, 8, times the networks' patch, 2


@dataclass(frozen=True, slots=True)
class TeacherTraining:
    """How a teacher is made from nothing: an autoencoder, with ``pose = "keypoints"`` an alignment, the flow network on
    the latents, and with an alignment a decoder that sees it. Budgets are seconds of training."""

    preset: Annotated[str, "xs, s, b or l"] = "xs"
    pose: Annotated[PoseKind, "a skeleton is a drawn picture, without alignment"] = "keypoints"
    size: Annotated[tuple[int, int], "height, width: multiples of 16 with the small autoencoder"] = (256, 176)
    autoencoder: Annotated[str, "small, or the folder of a diffusers AutoencoderKL"] = "small"
    autoencoder_seconds: Annotated[float, "training of the small autoencoder"] = 780.0
    autoencoder_batch: Annotated[int, "pictures in a step of that"] = 8
    alignment_seconds: Annotated[float, "training of the alignment, with keypoints"] = 2400.0
    decoder_seconds: Annotated[float, "training of the decoder, with keypoints"] = 1200.0
    seconds: Annotated[float, "training of the flow network"] = 3300.0
    lr: Annotated[float, "learning rate of the flow network"] = 1e-3
    ema: Annotated[float, "share that the averaged weights keep at every step"] = 0.999
    sources: Annotated[int, "people in a batch"] = 4
    targets_per_source: Annotated[int, "poses of each"] = 8
    guidance_scale: Annotated[float, "1: none"] = 1.5
    guidance_schedule: Annotated[Literal["constant", "power-cosine", "interval"], "of the scale over time"] = "constant"
    compile: Annotated[bool, "by torch.compile, which takes a minute at the start"] = False


@dataclass(frozen=True, slots=True)
class Distillation:
    """How a student is made from a teacher."""

    method: Annotated[Literal["reflow", "flowmap", "endpoint"], "of distilling"] = "flowmap"
    steps: Annotated[int, "that the student is meant for"] = 4
    seconds: Annotated[float, "training time"] = 600.0
    lr: Annotated[float, "learning rate"] = 5e-4
    batch: Annotated[int, "paths in a batch"] = 64
    init: Annotated[str | None, "student to start from: a path or a name; default: the teacher"] = None
    preset: Annotated[str | None, "architecture, where the teacher brings no network; default: the teacher's"] = None
    codec: Annotated[str | None, "small decoder in place of the teacher's: what distill-decoder made"] = None
    lora: Annotated[int, "rank of the adapters that are trained in place of all weights; 0: none"] = 0
    gradient_checkpointing: Annotated[bool, "less memory, more time"] = False
    perceptual_weight: Annotated[float | None, "of the decoded edges, endpoint only; default: 0.5"] = None
    compile: Annotated[bool, "by torch.compile"] = False


@dataclass(frozen=True, slots=True)
class QadTable:
    """Fine-tunes a student for the precision that it will be quantized to: its rounded self learns to make the pictures
    of its float self. ``lr`` is higher for int4-weights, whose grid is coarser."""

    precision: Annotated[Literal["int8", "int4-weights"], "that the student will be quantized to"] = "int8"
    steps: Annotated[int | None, "unrolled in training; default: the student's"] = None
    seconds: Annotated[float, "training time"] = 400.0
    lr: Annotated[float | None, "learning rate; default: 1e-5 for int8, 2e-5 for int4-weights"] = None
    batch: Annotated[int, "poses of one source in a batch"] = 4


def check_size(size: tuple[int, int], multiple: int, where: str = "") -> None:
    """Raise ``ConfigError`` for pictures that cannot be cut into latents and these into patches."""
    if any(side < multiple or side % multiple for side in size):
        nearest = [max(1, round(side / multiple)) * multiple for side in size]
        raise ConfigError(
            f"{where}size = {list(size)}",
            expected=f"multiples of {multiple}, pixels per latent times the patch",
            fix=f"take {nearest}",
        )
