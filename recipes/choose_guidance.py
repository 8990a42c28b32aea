"""Compare guidance scales of a teacher on validation identities: the scale is chosen here, never on the test split.

python recipes/choose_guidance.py runs/xs/teacher --data ../shared/people --pairs 48 --scales 1 1.25 1.5 2
"""

from __future__ import annotations

import argparse

from rich.console import Console
from rich.table import Table

from distill.reference import teacher_images
from distill.teacher import Guidance, RPFMTeacher, load_teacher
from rpfm_edge import metrics
from rpfm_edge.splits import open_splits
from rpfm_edge.validate import draw_pairs


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
        budget = (options.steps, "heun")
        made = teacher_images(teacher, pairs.sources, pairs.skeletons, pairs.noise, [budget])[budget]
        found = metrics.compare(pairs.truths, made)
        table.add_row(f"{scale:g}", *(f"{found[name]['mean']:.4g}" for name in ("psnr_db", "ssim", "flip")))
    Console().print(table)


if __name__ == "__main__":
    main()
