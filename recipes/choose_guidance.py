"""Compare guidance scales of a teacher on validation identities: the scale is chosen here, never on the test split.

python recipes/choose_guidance.py runs/xs/teacher --data ../shared/people --pairs 48 --scales 1 1.25 1.5 2
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from distill.teacher import Guidance, RPFMTeacher, load_teacher, sample_teacher
from rpfm_edge import metrics
from rpfm_edge.image import from_model, to_model
from rpfm_edge.splits import open_splits
from rpfm_edge.validate import Pairs, draw_pairs


@torch.no_grad()
def images(teacher: RPFMTeacher, pairs: Pairs, steps: int) -> np.ndarray:
    """The teacher's pictures of all pairs, (n, H, W, 3) uint8, by Heun's method."""
    made = []
    for index in range(len(pairs.names)):
        source, pose = (torch.from_numpy(to_model(a[index : index + 1])) for a in (pairs.sources, pairs.skeletons))
        condition = teacher.condition(teacher.autoencoder.encode(source), pose)
        latent = sample_teacher(teacher, torch.from_numpy(pairs.noise[index : index + 1]), condition, steps, "heun")
        made.append(from_model(teacher.autoencoder.decode(latent).numpy())[0])
    return np.stack(made)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("teacher")
    parser.add_argument("--data", required=True)
    parser.add_argument("--pairs", type=int, default=48)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0, 1.25, 1.5, 2.0])
    options = parser.parse_args()
    teacher = load_teacher(options.teacher)
    assert isinstance(teacher, RPFMTeacher)
    pairs = draw_pairs(open_splits(options.data).validation, options.pairs, teacher.size, teacher.latent_shape)
    table = Table("scale", "PSNR dB", "SSIM", "FLIP", title=f"{options.pairs} validation pairs, mean against the truth")
    for scale in options.scales:
        teacher.guidance = Guidance(scale)
        found = metrics.compare(pairs.truths, images(teacher, pairs, options.steps))
        table.add_row(f"{scale:g}", *(f"{found[name]['mean']:.4g}" for name in ("psnr_db", "ssim", "flip")))
    Console().print(table)


if __name__ == "__main__":
    main()
