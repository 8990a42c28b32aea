"""Quality on held-out identities: a bundle against its teacher at the same noise, and both against the ground truth.

Beside the distances to these: what of the truth's ``detail`` is there, where the joints are (``keypoints``), and how
steady videos are (``flicker``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from rpfm_edge.bundle.engines import checked_backends
from rpfm_edge.bundle.evidence import add_evidence
from rpfm_edge.bundle.pipeline import Person, Pipeline
from rpfm_edge.core import artifact, shipped
from rpfm_edge.core.artifact import Artifact
from rpfm_edge.core.extras import require_module
from rpfm_edge.core.flow import plural
from rpfm_edge.core.progress import progress
from rpfm_edge.measure import metrics
from rpfm_edge.measure.budget import Budget, limited
from rpfm_edge.measure.detail import missing_detail, sharpness
from rpfm_edge.measure.flicker import steadiness
from rpfm_edge.measure.joints import finder_accuracy, missing_pose, pose_accuracy, scored
from rpfm_edge.measure.machine import where
from rpfm_edge.measure.metrics import Summary
from rpfm_edge.people.data import Split, as_seen
from rpfm_edge.people.held_out import CLIPS, Clip, ClipConfig, Pairs, draw_pairs, missing_clips, open_clips
from rpfm_edge.people.pose import pose_input
from rpfm_edge.people.splits import open_splits


def bundle_images(pipe: Pipeline, pairs: Pairs) -> np.ndarray:
    """What a bundle makes of the pairs: (n, H, W, 3) uint8."""
    images = []
    with progress(pipe.backend, total=len(pairs.names)) as advance:
        for index in range(len(pairs.names)):
            person = pipe.prepare(pairs.sources[index])
            images.append(rendered(pipe, person, pairs.poses[index], pairs.noise[index : index + 1]))
            advance(index + 1)
    return np.stack(images)


def images_of(bundle: str | Path | Artifact, backend: str, pairs: Pairs) -> np.ndarray:
    """``bundle_images`` of a bundle that is opened for them alone."""
    with Pipeline.open(bundle, backend) as pipe:
        return bundle_images(pipe, pairs)


def found_joints(pipe: Pipeline, pairs: Pairs) -> dict[str, Summary]:
    """How well ``prepare`` finds the joints of the sources (``keypoints.finder_accuracy``), each source once.

    Empty for a bundle that finds none."""
    places = {name: place for place, (name, _) in enumerate(pairs.names)}
    found = [pipe.prepare(pairs.sources[place]).joints for place in places.values()]
    joints = [points for points in found if points is not None]
    if len(joints) < len(found):
        return {}
    return finder_accuracy(np.stack(joints), pairs.source_poses[list(places.values())], pipe.size)


def bundle_videos(pipe: Pipeline, clips: Sequence[Clip]) -> list[np.ndarray]:
    """What a bundle makes of the clips: (n, H, W, 3) uint8 each, every frame from the clip's one noise."""
    if not clips:
        return []
    videos = []
    with progress(f"{pipe.backend}, clips", total=sum(len(clip.truth) for clip in clips)) as advance:
        for clip in clips:
            person = pipe.prepare(clip.source)
            videos.append(np.stack([rendered(pipe, person, pose, clip.noise) for pose in clip.poses]))
            advance(sum(len(video) for video in videos))
    return videos


def rendered(pipe: Pipeline, person: Person, pose: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """A frame of an annotated pose, which may reach out of the picture, or show nobody in a clip."""
    return pipe.render_input(person, pose_input(pose, pipe.pose_kind, pipe.size), noise)


def teacher_videos(teacher: str | Path, clips: Sequence[Clip]) -> list[np.ndarray]:
    """As ``bundle_videos``, from the teacher's reference solution."""
    from distill.reference import REFERENCE_SOLVER, REFERENCE_STEPS, teacher_images

    reference, videos = (REFERENCE_STEPS, REFERENCE_SOLVER), []
    for clip in clips:
        given = (clip.source[None], clip.source_pose[None], clip.noise)
        source, source_pose, noise = (np.repeat(array, len(clip.truth), axis=0) for array in given)
        videos.append(teacher_images(teacher, source, source_pose, clip.poses, noise, [reference])[reference])
    return videos


def drift(images: np.ndarray, teacher: np.ndarray, truths: np.ndarray) -> dict[str, Any]:
    """A stage's distances to the teacher's images and to the ground truth, and the truth's detail in it."""
    distances = {"against_teacher": metrics.compare(teacher, images), "against_truth": metrics.compare(truths, images)}
    return distances | sharpness(images, truths)


def measure_stage(
    images: np.ndarray, teacher: np.ndarray, pairs: Pairs, videos: Sequence[np.ndarray], clips: Sequence[Clip]
) -> dict[str, Any]:
    """A stage's drift with detail, accuracy of poses (if it can be told) and flicker (if there are videos)."""
    return drift(images, teacher, pairs.truths) | pose_accuracy(images, pairs.poses) | steadiness(videos, clips)


def teacher_stages(
    teacher: str | Path, pairs: Pairs, steps: int, clips: Sequence[Clip] = ()
) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """The teacher's reference images, and the first stages of every drift table.

    These are the reference against the truth, and the teacher with ``steps`` Euler steps: what one gets without
    distilling. ``clips`` are rendered by the reference, which takes long.
    """
    from distill.reference import REFERENCE_SOLVER, REFERENCE_STEPS, teacher_images

    reference, few = (REFERENCE_STEPS, REFERENCE_SOLVER), (steps, "euler")
    made = teacher_images(teacher, *pairs.inputs, {reference, few})
    whole = {"against_truth": metrics.compare(pairs.truths, made[reference])}
    whole |= sharpness(made[reference], pairs.truths) | pose_accuracy(made[reference], pairs.poses)
    whole |= steadiness(teacher_videos(teacher, clips), clips)
    return made[reference], [
        {"stage": "teacher, reference", **whole},
        {"stage": f"teacher, {plural(steps)}", **measure_stage(made[few], made[reference], pairs, (), ())},
    ]


def truth_stages(pairs: Pairs, clips: Sequence[Clip]) -> list[dict[str, Any]]:
    """The ground truth as the last stage: what the measures beside distances find on it. None without these."""
    found: dict[str, Any] = sharpness(pairs.truths, pairs.truths) | pose_accuracy(pairs.truths, pairs.poses)
    found |= steadiness([clip.truth for clip in clips], clips)
    return [{"stage": "ground truth", **found}] if found else []


def circumstances(pairs: Pairs, clips: Sequence[Clip] = (), missing: Mapping[str, str] | None = None) -> dict[str, Any]:
    """What stands beside every drift figure: pairs, clips, reference solution, what was not measured, the machine.

    ``missing`` adds to the metrics that are.
    """
    from distill.reference import REFERENCE_SOLVER, REFERENCE_STEPS

    return {
        "pairs": pairs.names,
        "clips": [{"name": clip.name, "frames": len(clip.truth)} for clip in clips],
        "reference": {"steps": REFERENCE_STEPS, "solver": REFERENCE_SOLVER},
        "missing": {**metrics.missing_metrics(), **(missing or {})},
        "machine": where(),
    }


def missing_measures(pairs: Pairs, split: Split, filmed: ClipConfig) -> dict[str, str]:
    """Which of ``pck``, ``detail`` and ``flicker`` cannot be measured here, and why."""
    reasons = {"pck": missing_pose(), "detail": missing_detail(pairs.truths), "flicker": missing_clips(split, filmed)}
    if not scored(pairs.poses, (pairs.truths.shape[1], pairs.truths.shape[2])).any():
        reasons["pck"] = "no pose has neck and hip"
    return {name: reason for name, reason in reasons.items() if reason}


def judge_bundle(
    bundle: Artifact,
    teacher: str | Path,
    split: Split,
    backends: Iterable[str],
    count: int,
    budget: Budget,
    seed: int = 0,
    filmed: ClipConfig = CLIPS,
) -> dict[str, Any]:
    """Measure drift on ``count`` pairs (fewer if ``split`` has no more) for each backend, and judge it by ``budget``.

    Stages: those of the teacher (``teacher_stages``), then the bundle on each backend; all against the teacher's
    reference solution. The ground truth is the last (``truth_stages``). The violations of the budget are those of the
    bundle. ``filmed`` says which clips flicker is measured on.
    """
    steps, size, shape = int(bundle.config["steps"]), tuple(bundle.config["size"]), bundle.config["latent_shape"]
    pairs, clips = draw_pairs(split, count, size, shape, seed), open_clips(split, filmed, size, shape, seed)
    reference, stages = teacher_stages(teacher, pairs, steps, clips if filmed.teacher else ())
    violations = []
    for backend in backends:
        with Pipeline.open(bundle, backend) as pipe:
            images, videos, joints = bundle_images(pipe, pairs), bundle_videos(pipe, clips), found_joints(pipe, pairs)
        stage = measure_stage(images, reference, pairs, videos, clips) | joints
        stages.append({"stage": f"bundle, {plural(steps)}, {bundle.config['precision']}, {backend}", **stage})
        violations += [f"{backend}: {text}" for text in budget.check(limited(stage))]
    return {
        **circumstances(pairs, clips, missing_measures(pairs, split, filmed)),
        "stages": stages + truth_stages(pairs, clips),
        "teacher": str(teacher),
        "seed": seed,
        "budget": {k: v for k, v in asdict(budget).items() if v is not None},
        "violations": violations,
    }


def validate(
    bundle: str | Path,
    against: str | Path,
    data: str | Path,
    budget: str | Path | None = None,
    backend: str | None = None,
    pairs: int = 32,
    seed: int = 0,
) -> dict[str, Any]:
    """Drift of a bundle against its teacher and the ground truth on held-out pairs.

    ``violations`` of the result lists what is over the budget. The drift of all backends is kept in the bundle as
    evidence ``drift``; that of one ``backend`` is not, so that it does not replace what is known of the others.
    """
    require_module("torch", "distill")
    require_module("skimage", "validate")
    loaded = artifact.load(shipped.resolve(bundle), "bundle")
    backends = checked_backends(loaded, backend)
    limits = Budget.load(Path(budget)) if budget else Budget()
    people = as_seen(open_splits(data).test, loaded.config.get("fit"))
    evidence = judge_bundle(loaded, against, people, backends, pairs, limits, seed)
    if backend is None:
        add_evidence(loaded, "drift", evidence)
    return evidence
