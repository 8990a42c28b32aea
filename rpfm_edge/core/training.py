"""The settings of training that recipes and the trainers share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rpfm_edge.core.errors import ConfigError
from rpfm_edge.core.signature import PoseKind

SMALL_MULTIPLE = 16  # pixels per latent of the small autoencoder, 8, times the networks' patch, 2


@dataclass(frozen=True, slots=True)
class TeacherTraining:
    """How a teacher is made from nothing: an autoencoder, with ``pose = "keypoints"`` an alignment, the flow network on
    the latents, and with an alignment a decoder that sees it.

    ``seconds`` are training time of the network. ``compile``: by torch.compile.
    """

    preset: str = "xs"
    pose: PoseKind = "keypoints"
    size: tuple[int, int] = (256, 176)
    autoencoder: str = "small"  # or the folder of a diffusers AutoencoderKL
    autoencoder_seconds: float = 780.0
    autoencoder_batch: int = 8
    alignment_seconds: float = 2400.0
    decoder_seconds: float = 1200.0
    seconds: float = 3300.0
    lr: float = 1e-3
    ema: float = 0.999
    sources: int = 4
    targets_per_source: int = 8
    guidance_scale: float = 1.5
    guidance_schedule: Literal["constant", "power-cosine", "interval"] = "constant"
    compile: bool = False


@dataclass(frozen=True, slots=True)
class Distillation:
    """How a student is made from a teacher. ``init``: a student (path or shipped name) whose weights it starts from.

    ``preset``: the student's architecture, where the teacher is no RPFM network. ``perceptual_weight``: of the decoded
    edges, with ``endpoint`` only.
    """

    method: Literal["reflow", "flowmap", "endpoint"] = "flowmap"
    steps: int = 4
    seconds: float = 600.0
    lr: float = 5e-4
    batch: int = 64
    init: str | None = None
    preset: str | None = None
    perceptual_weight: float | None = None
    compile: bool = False


@dataclass(frozen=True, slots=True)
class QadTable:
    """Fine-tunes a student for the precision that it will be quantized to: its rounded self learns to make the pictures
    of its float self.

    ``steps``: unrolled; those of [student] if left out, or the student's own. ``lr``: 1e-5 for int8 and 2e-5 for
    int4-weights, whose grid is coarser, if left out. ``batch``: poses of one source in a batch.
    """

    precision: Literal["int8", "int4-weights"] = "int8"
    steps: int | None = None
    seconds: float = 400.0
    lr: float | None = None
    batch: int = 4


def check_size(size: tuple[int, int], multiple: int, where: str = "") -> None:
    """Raise ``ConfigError`` for pictures that cannot be cut into latents and these into patches."""
    if any(side < multiple or side % multiple for side in size):
        nearest = [max(1, round(side / multiple)) * multiple for side in size]
        raise ConfigError(
            f"{where}size = {list(size)}",
            expected=f"multiples of {multiple}, pixels per latent times the patch",
            fix=f"take {nearest}",
        )
