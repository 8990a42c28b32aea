"""Compare guidance scales of a teacher on validation identities: the scale is chosen here, never on the test split.

python scripts/choose_guidance.py runs/xs/teacher --data ../shared/people --pairs 48 --scales 1 1.25 1.5 2
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace

from rich.console import Console
from rich.table import Table

from distill.guidance import Guidance
from distill.reference import teacher_images
from distill.teacher import NetworkTeacher, load_teacher
from rpfm_edge.core.errors import ConfigError, RpfmError
from rpfm_edge.measure import metrics
from rpfm_edge.people.held_out import draw_pairs
from rpfm_edge.people.splits import open_splits


def measured(spec: str, data: str, count: int, steps: int, scales: Sequence[float]) -> Table:
    """A row for each scale, on the teacher's own schedule."""
    teacher = load_teacher(spec)
    if not isinstance(teacher, NetworkTeacher) or not isinstance(teacher.guidance, Guidance):
        raise ConfigError(f"{spec} has a guidance of its own", expected="a teacher of ours", fix="choose it there")
    pairs = draw_pairs(open_splits(data).validation, count, teacher.size, teacher.latent_shape)
    title = f"{len(pairs.names)} validation pairs, guidance {teacher.guidance.schedule}, mean against the truth"
    table, given, budget = Table("scale", "PSNR dB", "SSIM", "FLIP", title=title), teacher.guidance, (steps, "heun")
    for scale in scales:
        teacher.guidance = replace(given, scale=scale)
        made = teacher_images(teacher, *pairs.inputs, [budget])[budget]
        found = metrics.compare(pairs.truths, made)
        table.add_row(f"{scale:g}", *(f"{found[name]['mean']:.4g}" for name in ("psnr_db", "ssim", "flip")))
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 after an error, which is said in one sentence."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("teacher")
    parser.add_argument("--data", required=True)
    parser.add_argument("--pairs", type=int, default=48)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0, 1.25, 1.5, 2.0])
    options = parser.parse_args(arguments)
    try:
        table = measured(options.teacher, options.data, options.pairs, options.steps, options.scales)
    except RpfmError as error:
        print(f"choose_guidance: {error}", file=sys.stderr)
        return 2
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
