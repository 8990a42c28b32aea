"""Calibration samples: real sources, poses and noise, drawn by a seed and kept in one file with their digest.

The frame graph contains its steps, so on these inputs it is seen at the student's own times and in its own states.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from quantize.execute import Graph
from rpfm_edge.core.artifact import Artifact
from rpfm_edge.core.errors import ArtifactError, ConfigError, InputError
from rpfm_edge.core.files import file_digest, write_bytes
from rpfm_edge.core.precisions import LEAST_SAMPLES
from rpfm_edge.core.progress import progress
from rpfm_edge.core.signature import GIVEN_JOINTS, Feeds
from rpfm_edge.people.data import Split
from rpfm_edge.people.pose import passed, pose_input, pose_kind, prepare_feeds

TENSORS = ("source", "index", "pose", "noise")  # and by their own names those that prepare makes


@dataclass(frozen=True, eq=False, slots=True)
class Samples:
    """N samples of S sources.

    Attributes:
        source: (S, H, W, 3) uint8.
        tensors: those of the float prepare graph that the frame takes, float32, by name: S of each.
        index: (N,) int64, the source of each sample.
        pose: in the frame's own kind, (N, H, W, 3) uint8 skeletons or (N, 18, 2) float32 keypoints.
        noise: (N, C, h, w) float32.
        keypoints: (S, 18, 2) float32 where the prepare graph takes any; all missing, since a user gives a photo alone.
        facts: seed, count, digest of the graph, names of the pictures of sources and poses.
        sha256: of the file.
    """

    source: np.ndarray
    tensors: dict[str, np.ndarray]
    index: np.ndarray
    pose: np.ndarray
    noise: np.ndarray
    facts: dict[str, Any]
    sha256: str
    keypoints: np.ndarray | None = None

    def feeds(self, graph: str) -> Iterator[Feeds]:
        """The inputs of graph "prepare" (one per source) or "frame" (one per sample)."""
        if graph == "prepare":
            for place, source in enumerate(self.source):
                feeds = {"source": source[None]}
                yield feeds if self.keypoints is None else {**feeds, GIVEN_JOINTS: self.keypoints[place][None]}
        else:
            for pose, noise, source in zip(self.pose, self.noise, self.index, strict=True):
                prepared = {name: tensor[source] for name, tensor in self.tensors.items()}
                yield {"pose": pose[None], "noise": noise[None], **prepared}

    def check(self, graph: Artifact) -> None:
        """Raise ``ArtifactError`` unless they were recorded with ``graph``, ``SignatureError`` unless they fit it."""
        if self.facts["graph"] != graph.digest:
            raise ArtifactError(
                f"the calibration samples were recorded with graph {self.facts['graph'][:12]}",
                expected=f"samples of {graph.path} ({graph.digest[:12]})",
                fix="record them again with this graph",
            )
        for name in ("prepare", "frame"):
            graph.signatures[name].check(next(iter(self.feeds(name))))


def record(graph: Artifact, split: Split, out: Path, count: int = 64, seed: int = 0) -> Path:
    """Draw calibration samples and write them to ``out`` (safetensors). The same seed gives the same bytes.

    Args:
        graph: a float graph artifact; its ``prepare`` is run once per source.
        split: pictures, poses and pairs; training data, because what calibrates must not judge. Pairs whose target
            has no joint are left out.
        count: samples, of as many different identities and sources as there are; all pairs if there are fewer.

    Raises:
        ConfigError: ``count`` below 8.
        InputError: fewer than 8 pairs, or a blank picture or pose.
        ArtifactError: the prepare graph gives values that are not finite.
    """
    if count < LEAST_SAMPLES:
        raise ConfigError(
            f"{count} calibration samples", expected=f"at least {LEAST_SAMPLES}", fix="ask for more, such as 64"
        )
    rng = np.random.default_rng(seed)
    pairs = spread_pairs(split, rng)[:count]
    if len(pairs) < LEAST_SAMPLES:
        raise InputError(
            f"{split.root} has only {len(pairs)} pairs to calibrate with",
            expected=f"at least {LEAST_SAMPLES} with joints in the target",
            fix="use a larger data set",
        )
    boundary = graph.signatures["frame"]
    height, width = graph.signatures["prepare"].input("source").shape[1:3]
    size, kind = (height, width), pose_kind(boundary.input("pose"))
    chosen, index = np.unique(pairs[:, 0], return_inverse=True)
    source = split.images(chosen, size)
    pose = np.concatenate([pose_input(split.pose(i, size), kind, size) for i in pairs[:, 1]])
    source_names, pose_names = ([split.names[i] for i in indices] for indices in (chosen, pairs[:, 1]))
    _require_contents("picture", source, source_names)
    _require_contents("pose", pose, pose_names)
    noise = rng.standard_normal((len(pairs), *boundary.input("noise").shape[1:]), dtype=np.float32)
    facts = {"seed": seed, "count": len(pairs), "graph": graph.digest, "sources": source_names, "poses": pose_names}
    arrays: dict[str, np.ndarray] = dict(zip(TENSORS, (source, index.astype(np.int64), pose, noise), strict=True))
    _write(out, arrays | _prepared(graph, source), facts)
    return out


def load(path: Path) -> Samples:
    """Read what ``record`` wrote; ``ArtifactError`` if the file is missing, damaged or something else."""
    try:
        with safe_open(path, framework="numpy") as file:
            facts = json.loads(file.metadata()["facts"])
            arrays = {name: file.get_tensor(name) for name in (*TENSORS, *file.keys())}
    except (OSError, SafetensorError, TypeError, KeyError, ValueError) as error:
        raise ArtifactError(
            f"{path} cannot be read ({str(error) or type(error).__name__})",
            expected="calibration samples",
            fix="record them again",
        ) from None
    given = {name: arrays.pop(name) for name in TENSORS}
    keypoints = arrays.pop(GIVEN_JOINTS, None)
    return Samples(**given, tensors=arrays, facts=facts, sha256=file_digest(path), keypoints=keypoints)


def spread_pairs(split: Split, rng: np.random.Generator) -> np.ndarray:
    """All pairs (P, 2) whose target has a joint, in random order, but round after round over the identities, and over
    each one's sources."""
    visible = np.isfinite(split.keypoints).any(axis=(1, 2))
    pairs = rng.permutation(split.pairs[visible[split.pairs[:, 1]]])
    pairs = pairs[np.argsort(_occurrence(pairs[:, 0]), kind="stable")]
    return pairs[np.argsort(_occurrence(split.identities[pairs[:, 0]]), kind="stable")]


def _occurrence(values: np.ndarray) -> np.ndarray:
    """How many equal values stand before each one."""
    order = np.argsort(values, kind="stable")
    ordered, place = values[order], np.arange(len(values))
    begins = np.r_[True, ordered[1:] != ordered[:-1]][: len(values)]
    counts = np.empty_like(place)
    counts[order] = place - np.maximum.accumulate(np.where(begins, place, 0))
    return counts


def _require_contents(what: str, images: np.ndarray, names: Sequence[str]) -> None:
    """Raise ``InputError`` for an image of one colour (or a pose of one point), or if several are all the same: that
    calibrates nothing."""
    for image, name in zip(images, names, strict=True):
        if (image == image[(0,) * (image.ndim - 1)]).all():
            raise InputError(f"{what} {name} is blank", expected="a person", fix="remove it from the data set")
    if len(images) > 1 and (images == images[0]).all():
        raise InputError(
            f"every {what}, {names[0]} first, is the same", expected="different ones", fix="use other data"
        )


def _prepared(graph: Artifact, sources: np.ndarray) -> dict[str, np.ndarray]:
    """S of each tensor that a frame takes, float32, and of the keypoints where prepare takes them; one thread, so that
    the sums do not depend on the machine's load."""
    prepare, boundary = Graph(graph.file("prepare.onnx"), threads=1), graph.signatures["prepare"]
    found: dict[str, list[np.ndarray]] = {}
    with progress("preparing sources", len(sources)) as advance:
        for done, source in enumerate(sources):
            feeds = prepare_feeds(boundary, source)
            boundary.check(feeds)
            given = {name: array[0] for name, array in feeds.items() if name == GIVEN_JOINTS}
            for name, array in (passed(graph.signatures["frame"], prepare.named(feeds)) | given).items():
                found.setdefault(name, []).append(array)
            advance(done + 1, "")
    result = {name: np.stack(arrays) for name, arrays in found.items()}
    if not all(np.isfinite(array).all() for array in result.values()):
        raise ArtifactError(
            f"{graph.path} turns sources into values that are not finite",
            expected="a sound student",
            fix="distill again",
        )
    return result


def _write(out: Path, arrays: dict[str, np.ndarray], facts: dict[str, Any]) -> None:
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    write_bytes(out, save(contiguous, {"facts": json.dumps(facts, sort_keys=True)}))
