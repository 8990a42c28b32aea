"""What a recipe measures, and the page that shows it: drift per stage, speed per backend, pictures, losses, lineage."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rpfm_edge.bundle.evidence import add_evidence
from rpfm_edge.bundle.pipeline import Pipeline, render
from rpfm_edge.core import artifact
from rpfm_edge.core.artifact import EVIDENCE, Artifact
from rpfm_edge.core.files import write_text
from rpfm_edge.core.flow import plural
from rpfm_edge.judge.quality import (
    bundle_images,
    bundle_videos,
    circumstances,
    measure_stage,
    missing_measures,
    teacher_stages,
    truth_stages,
)
from rpfm_edge.judge.speed import bench_backend
from rpfm_edge.measure.budget import Budget, limited
from rpfm_edge.people.held_out import CLIPS, Pairs, draw_pairs, open_clips
from rpfm_edge.people.image import save_png
from rpfm_edge.people.pose import draw_skeleton
from rpfm_edge.people.splits import open_splits
from rpfm_edge.recipe.schema import Recipe


def held_out_pairs(recipe: Recipe, config: Mapping[str, Any]) -> Pairs:
    """The pairs that every figure of a recipe is measured on."""
    test = open_splits(recipe.data).test
    return draw_pairs(test, recipe.validate.pairs, tuple(config["size"]), config["latent_shape"], recipe.seed)


def judge(recipe: Recipe, teacher: str | Path, student: str, bundles: Mapping[str, Path], out: Path) -> None:
    """Drift and speed of every bundle, the pictures of the first pairs, and the verdict on the recipe's own bundle."""
    from distill.reference import student_images

    opened = {precision: artifact.load(path, "bundle") for precision, path in bundles.items()}
    own, targets = opened[recipe.quantize.precision], recipe.build.targets
    steps, judged = int(own.config["steps"]), f"{recipe.quantize.precision}, {targets[0]}"
    in_torch = f"student, {plural(steps)}"
    pairs, test = held_out_pairs(recipe, own.config), open_splits(recipe.data).test
    clips = open_clips(test, CLIPS, tuple(own.config["size"]), own.config["latent_shape"], recipe.seed)
    videos: dict[str, list[np.ndarray]] = {}
    made = {in_torch: student_images(student, *pairs.inputs, [steps])[steps]}
    for precision, bundle in opened.items():
        for backend in targets:
            with Pipeline.open(bundle, backend) as pipe:
                made[f"{precision}, {backend}"] = bundle_images(pipe, pairs)
                videos[f"{precision}, {backend}"] = bundle_videos(pipe, clips)

    reference, stages = teacher_stages(teacher, pairs, steps)
    measured = {n: measure_stage(images, reference, pairs, videos.get(n, ()), clips) for n, images in made.items()}
    stages += [{"stage": name, **measures} for name, measures in measured.items()] + truth_stages(pairs, clips)
    violations = Budget.from_dict(recipe.validate.budget).check(limited(measured[judged]))
    speed = measure_speed(recipe, opened, pairs.sources[0])
    skeletons = np.stack([draw_skeleton(pose, (pairs.truths.shape[1], pairs.truths.shape[2])) for pose in pairs.poses])
    columns = {"source": pairs.sources, "pose": skeletons, "ground truth": pairs.truths, "teacher": reference}
    columns |= {name: made[name] for name in (in_torch, judged)}
    found = circumstances(pairs, clips, missing_measures(pairs, test, CLIPS))
    found |= {"stages": stages, "violations": violations, "speed": speed, "judged": judged}
    found["pictures"] = save_pictures(out.parent / "pictures", columns, recipe.validate.pictures)
    write_text(out, json.dumps(found, indent=1))
    keep_evidence(own, found, recipe.quantize.precision)


def keep_evidence(own: Artifact, found: Mapping[str, Any], precision: str, missing_only: bool = False) -> None:
    """Store in the recipe's own bundle what ``judge`` ``found`` on it; ``missing_only``: not what it has already."""
    drift = {key: value for key, value in found.items() if key not in ("speed", "judged", "pictures")}
    speed = {"backends": [one for one in found["speed"] if one["precision"] == precision]}
    for name, evidence in (("drift", drift), ("speed", speed)):
        if not (missing_only and (own.path / EVIDENCE / f"{name}.json").is_file()):
            add_evidence(own, name, evidence)


def measure_speed(recipe: Recipe, bundles: Mapping[str, Artifact], source: np.ndarray) -> list[dict[str, Any]]:
    """Every bundle, by the precision asked for, on every target, with ``source`` in the pose of the first held-out
    target."""
    test = open_splits(recipe.data).test
    pose = test.pose(int(test.pairs[0][1]), tuple(next(iter(bundles.values())).config["size"]))
    runs, seconds = recipe.bench.runs, recipe.bench.seconds
    return [
        {**bench_backend(bundle, backend, source, pose, runs, seconds), "precision": precision}
        for precision, bundle in bundles.items()
        for backend in recipe.build.targets
    ]


def save_pictures(folder: Path, columns: Mapping[str, np.ndarray], count: int) -> list[dict[str, str]]:
    """Save the first ``count`` images of each column; returns rows of title → file, relative to ``folder``'s parent."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(min(count, len(next(iter(columns.values()))))):
        row = {}
        for number, (title, images) in enumerate(columns.items()):
            file = folder / f"{index:02d}-{number}.png"
            save_png(file, images[index])
            row[title] = f"{folder.name}/{file.name}"
        rows.append(row)
    return rows


def render_picture(recipe: Recipe, bundle: Path, out: Path) -> None:
    """Render the recipe's source and pose, or a held-out pair of its data."""
    if recipe.render.source and recipe.render.pose:
        render(bundle, recipe.render.source, recipe.render.pose, out)
        return
    test = open_splits(recipe.data).test
    source, target = (int(i) for i in test.pairs[0])
    with Pipeline.open(bundle) as pipe:
        person = pipe.prepare(test.image(source, pipe.size))
        save_png(out, pipe.render(person, test.pose(target, pipe.size)))
