"""Quality on held-out identities: a bundle against its teacher at the same noise, and both against the ground truth.

Beside the distances to these: what of the truth's ``detail`` is there, where the joints are (``keypoints``), and how
steady videos are (``flicker``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rpfm_edge import measure, metrics
from rpfm_edge.artifact import Artifact
from rpfm_edge.data import Split
from rpfm_edge.detail import missing_detail, sharpness
from rpfm_edge.errors import ConfigError, InputError
from rpfm_edge.flicker import Clip, ClipConfig, missing_clips, open_clips, steadiness
from rpfm_edge.keypoints import finder_accuracy, missing_pose, pose_accuracy, scored
from rpfm_edge.metrics import Budget, Summary
from rpfm_edge.pipeline import Person, Pipeline
from rpfm_edge.pose import pose_input
from rpfm_edge.progress import progress

CLIPS = ClipConfig()


@dataclass(frozen=True, slots=True)
class Pairs:
    """Held-out pairs with a noise for each: n sources and ground truths (n, H, W, 3) uint8, and the keypoints of both,
    (n, 18, 2) float32 pixels, nan where missing.

    Bundles get the photo alone, as from a user; ``source_poses`` are for the networks in torch.
    """

    names: list[tuple[str, str]]
    sources: np.ndarray
    source_poses: np.ndarray
    poses: np.ndarray
    truths: np.ndarray
    noise: np.ndarray  # (n, C, h, w) float32

    @property
    def inputs(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Sources, their poses, the poses asked for and noise: what ``distill.reference`` makes pictures of."""
        return self.sources, self.source_poses, self.poses, self.noise

    @property
    def digest(self) -> str:
        """sha256 over names, pictures, poses and noise: what is rendered from these pairs depends on nothing else."""
        sha = hashlib.sha256(repr(self.names).encode())
        for array in (self.sources, self.source_poses, self.poses, self.truths, self.noise):
            sha.update(np.ascontiguousarray(array).tobytes())
        return sha.hexdigest()


def draw_pairs(split: Split, count: int, size: tuple[int, int], latent_shape: Iterable[int], seed: int = 0) -> Pairs:
    """``count`` pairs of a split drawn without replacement, and noise from the same seed.

    Pairs without a visible joint in the target are left out.
    """
    if count < 1:
        raise ConfigError(f"{count} pairs", expected="at least 1", fix="ask for more, such as 32")
    rng = np.random.default_rng(seed)
    chosen = shuffled_pairs(split, count, rng)
    return read_pairs(split, chosen, rng.standard_normal((len(chosen), *latent_shape), dtype=np.float32), size)


def shuffled_pairs(split: Split, count: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    """Source and target of ``count`` pairs, drawn without replacement from those with a visible joint in the target."""
    visible = [(int(s), int(t)) for s, t in split.pairs if np.isfinite(split.keypoints[t]).any()]
    if not visible:
        raise InputError(f"{split.root} has no pairs", expected="pairs to validate on", fix="check its pairs file")
    return [visible[i] for i in rng.permutation(len(visible))[:count]]


def read_pairs(split: Split, indices: Sequence[tuple[int, int]], noise: np.ndarray, size: tuple[int, int]) -> Pairs:
    """The pictures of pairs (source, target), with a noise (n, C, h, w) for each."""
    return Pairs(
        names=[(split.names[s], split.names[t]) for s, t in indices],
        sources=np.stack([split.image(s, size) for s, _ in indices]),
        source_poses=np.stack([split.pose(s, size) for s, _ in indices]),
        poses=np.stack([split.pose(t, size) for _, t in indices]),
        truths=np.stack([split.image(t, size) for _, t in indices]),
        noise=noise,
    )


def bundle_images(bundle: str | Path, backend: str, pairs: Pairs) -> np.ndarray:
    """What the bundle makes of the pairs: (n, H, W, 3) uint8."""
    images = []
    with Pipeline.open(bundle, backend) as pipe, progress(backend, total=len(pairs.names)) as advance:
        for index in range(len(pairs.names)):
            person = pipe.prepare(pairs.sources[index])
            images.append(rendered(pipe, person, pairs.poses[index], pairs.noise[index : index + 1]))
            advance(index + 1)
    return np.stack(images)


def found_joints(bundle: str | Path, backend: str, pairs: Pairs) -> dict[str, Summary]:
    """How well ``prepare`` finds the joints of the sources (``keypoints.finder_accuracy``), each source once.

    Empty for a bundle that finds none."""
    places = {name: place for place, (name, _) in enumerate(pairs.names)}
    with Pipeline.open(bundle, backend) as pipe:
        found = [pipe.prepare(pairs.sources[place]).joints for place in places.values()]
    joints = [points for points in found if points is not None]
    if len(joints) < len(found):
        return {}
    return finder_accuracy(np.stack(joints), pairs.source_poses[list(places.values())], pipe.size)


def bundle_videos(bundle: str | Path, backend: str, clips: Sequence[Clip]) -> list[np.ndarray]:
    """What the bundle makes of the clips: (n, H, W, 3) uint8 each, every frame from the clip's one noise."""
    if not clips:
        return []
    videos = []
    with (
        Pipeline.open(bundle, backend) as pipe,
        progress(f"{backend}, clips", total=sum(len(clip.truth) for clip in clips)) as advance,
    ):
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


def limited(stage: Mapping[str, Any]) -> Summary:
    """What a budget limits, of a stage: the distances to the teacher, and what is measured beside distances."""
    return {**stage["against_teacher"], **beside_distances(stage)}


def beside_distances(stage: Mapping[str, Any]) -> Summary:
    """What was measured of a stage beside distances: poses, detail, flicker."""
    return {**stage.get("pose", {}), **stage.get("detail", {}), **stage.get("flicker", {})}


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
        "machine": measure.where(),
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
        images, videos = bundle_images(bundle.path, backend, pairs), bundle_videos(bundle.path, backend, clips)
        stage = measure_stage(images, reference, pairs, videos, clips) | found_joints(bundle.path, backend, pairs)
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


def plural(steps: int) -> str:
    """``1 step``, ``4 steps``."""
    return f"{steps} step{'s' if steps > 1 else ''}"
