"""What a user holds: open a bundle, prepare a person once, render a frame per pose. The same for every backend.

Between ``prepare`` and ``frame`` go named tensors; which they are, and which kind of pose a frame takes, say the
signatures.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import ArrayLike

from rpfm_edge import artifact, assets
from rpfm_edge.artifact import Artifact
from rpfm_edge.errors import BackendError, InputError
from rpfm_edge.image import load_image
from rpfm_edge.pose import MISSING, NobodyError, PoseKind, check_pose, from_graph, pose_input, pose_kind, to_graph
from rpfm_edge.precisions import STUDENT_ONLY
from rpfm_edge.runtime import Runtime, Session
from rpfm_edge.signature import Signature

Image = np.ndarray  # (H, W, 3) uint8 RGB
GIVEN_JOINTS = "keypoints"  # the second input of a ``prepare`` that looks at the source's joints, (1, 18, 2) float32
JOINTS, SCORES = "joints", "joint_scores"  # its outputs that tell where they are (1, 18, 2), and how surely (1, 18)
FOUND_SCORE, LEAST_JOINTS = 0.3, 4  # a joint with such a score is found; a person has so many of them


@dataclass(frozen=True, slots=True)
class Person:
    """A source image, prepared: all tensors that ``prepare`` made of it, by name. Valid for the bundle that made it."""

    tensors: dict[str, np.ndarray]
    bundle_digest: str

    @property
    def joints(self) -> np.ndarray | None:
        """(18, 2) pixels x, y of the source's joints, nan where missing; None if the bundle does not look at them."""
        return from_graph(self.tensors[JOINTS][0]) if JOINTS in self.tensors else None


def prepare_feeds(boundary: Signature, source: Image, keypoints: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """The inputs of ``prepare``: a picture of its size, and (18, 2) keypoints, nan where missing, if it takes any."""
    feeds = {"source": source[None]}
    if any(spec.name == GIVEN_JOINTS for spec in boundary.inputs):
        given = np.full((18, 2), MISSING, np.float32) if keypoints is None else to_graph(keypoints)
        feeds[GIVEN_JOINTS] = given[None]
    return feeds


def passed(boundary: Signature, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Those of the tensors of ``prepare`` that ``frame`` takes."""
    return {name: tensors[name] for spec in boundary.inputs if (name := spec.name) in tensors}


def require_engine(bundle: Artifact, backend: str) -> Runtime:
    """The backend, installed and with an engine in ``bundle``; raises ``BackendError`` otherwise."""
    import runtimes

    runtime, backends = runtimes.load(backend), bundle.config["backends"]
    if backend not in backends:
        raise BackendError(
            f"{bundle.path} has no engine for {backend}",
            expected=f"one of {sorted(backends)}",
            fix=_how_to_add(bundle.path, backend),
        )
    return runtime


def _how_to_add(bundle: Path, backend: str) -> str:
    if backend in STUDENT_ONLY:  # whose student a bundle does not carry
        return f"build it from the graph, which has the student: rpfm-edge build GRAPH --target {backend} --out BUNDLE"
    path = shlex.quote(str(bundle))
    return f"run: rpfm-edge build {path} --target {backend} --out {path}"


def default_backend(bundle: Artifact) -> str:
    """The first backend of ``bundle`` that is installed here; its very first one if none is, which is then refused."""
    import runtimes

    names: list[str] = list(bundle.config["backends"])
    return next((name for name in names if runtimes.why_not(name) is None), names[0])


def engine_versions(bundle: Artifact, backend: str) -> dict[str, str]:
    """The versions of the libraries that run the engine of ``backend`` with the options of ``bundle``."""
    return require_engine(bundle, backend).versions(bundle.config["backends"][backend])


class Pipeline:
    """An opened bundle. Use it as a context manager, or ``close`` it.

    Attributes:
        size: (height, width) of source, pose and output in pixels.
        backend: the name of the backend that runs.
        pose_kind: what the frame graph takes, a drawn "skeleton" or "keypoints"; ``render`` makes it of keypoints.
        noise: the bundle's noise, (1, C, h, w) float32; the same noise for every frame keeps a video steady. It is in
            the form that the engine takes fastest, perhaps frozen: assign another array, do not change this one.
    """

    def __init__(self, bundle: Artifact, backend: str, prepare: Session, frame: Session, resources: ExitStack) -> None:
        self.bundle, self.backend = bundle, backend
        self.size: tuple[int, int] = tuple(bundle.config["size"])
        self.noise: np.ndarray = frame.keep(np.load(bundle.file("noise.npy"), allow_pickle=False))
        self._boundary, taken = bundle.signatures["prepare"], bundle.signatures["frame"].inputs
        self.pose_kind: PoseKind = pose_kind(bundle.signatures["frame"].input("pose"))
        self._taken = tuple(spec.name for spec in taken if spec.name not in ("pose", "noise"))
        self._digest = bundle.digest
        self._prepare, self._frame, self._resources = prepare, frame, resources

    @classmethod
    def open(cls, bundle: str | Path, backend: str | None = None) -> Pipeline:
        """Load a bundle on one of the backends that it was built for (default: the first that is installed here).

        Raises:
            ArtifactError: the bundle is missing, damaged or another kind of artifact.
            BackendError: the bundle has no engine for ``backend``, or its library is not installed.
        """
        loaded = artifact.load(assets.resolve(bundle), "bundle")
        name = backend or default_backend(loaded)
        runtime, options = require_engine(loaded, name), loaded.config["backends"][name]
        with ExitStack() as stack:
            prepare, frame = (
                stack.enter_context(
                    runtime.open(loaded.path / "engines" / name / graph, loaded.signatures[graph], options)
                )
                for graph in ("prepare", "frame")
            )
            return cls(loaded, name, prepare, frame, stack.pop_all())

    def prepare(self, source: str | Path | Image, keypoints: ArrayLike | None = None) -> Person:
        """Encode a person, once per identity.

        Args:
            source: a file, or (H, W, 3) uint8 RGB; padded to the bundle's aspect.
            keypoints: (18, 2) of the source, pixels x, y of ``size``, nan where missing, for a bundle that looks at
                them. It finds those itself that are missing or not given.

        Raises:
            NobodyError: no keypoints are given, and the bundle finds nobody.
            InputError: a picture that cannot be read, keypoints that are none, or for a bundle that takes none.
        """
        image, points = load_image(source, self.size), None
        if keypoints is not None:
            self._require_keypoints()
            points = check_pose(keypoints, self.size, "keypoints")
        outputs = self._prepare.run(prepare_feeds(self._boundary, image, points))
        if points is None and SCORES in outputs and (outputs[SCORES] >= FOUND_SCORE).sum() < LEAST_JOINTS:
            raise NobodyError(
                "nobody was found in the source", expected="a person", fix="give another photo, or keypoints=…"
            )
        kept = {name: self._frame.keep(outputs[name]) for name in self._taken}
        return Person(outputs | kept, self._digest)

    def _require_keypoints(self) -> None:
        if all(spec.name != GIVEN_JOINTS for spec in self._boundary.inputs):
            raise InputError(
                "keypoints were given, but this bundle's prepare takes a photo alone",
                expected="no keypoints",
                fix="leave them out",
            )

    def render(self, person: Person, pose: ArrayLike, noise: np.ndarray | None = None) -> Image:
        """One frame: the person in a pose.

        Args:
            person: from ``prepare`` of this bundle.
            pose: (18, 2) OpenPose keypoints, pixels x, y of ``size``; nan where missing.
            noise: (1, C, h, w) float32; default ``self.noise``.

        Returns:
            (H, W, 3) uint8 RGB.
        """
        return self.render_input(person, self.pose_input(pose), noise)

    def pose_input(self, pose: ArrayLike) -> np.ndarray:
        """The pose, checked, as the frame graph takes it by ``pose_kind``: (1, H, W, 3) uint8 or (1, 18, 2) float32."""
        return pose_input(check_pose(pose, self.size), self.pose_kind, self.size)

    def render_input(self, person: Person, pose: np.ndarray, noise: np.ndarray | None = None) -> Image:
        """As ``render``, from what ``pose_input`` made."""
        image: Image = self._frame.run(self.feeds(person, pose, noise))["image"][0]
        return image

    def feeds(self, person: Person, pose: np.ndarray, noise: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """The inputs of the frame graph for ``render_input``."""
        if not isinstance(person, Person) or person.bundle_digest != self._digest:
            given = "was prepared by another bundle" if isinstance(person, Person) else f"is a {type(person).__name__}"
            raise InputError(
                f"the person {given}", expected="a person of this bundle's prepare", fix="prepare the source again"
            )
        feeds = {name: person.tensors[name] for name in self._taken}
        feeds["pose"], feeds["noise"] = pose, self.noise if noise is None else noise
        return feeds

    def close(self) -> None:
        """Free the engines; later calls raise ``BackendError``."""
        self._resources.close()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
