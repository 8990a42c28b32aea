"""What a user holds: open a bundle, prepare a person once, render a frame per pose. The same for every backend.

Between ``prepare`` and ``frame`` go named tensors; which they are, and which kind of pose a frame takes, say the
signatures.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import ArrayLike

from rpfm_edge.bundle.engines import default_backend, require_engine
from rpfm_edge.core import artifact, shipped
from rpfm_edge.core.artifact import Artifact
from rpfm_edge.core.errors import InputError
from rpfm_edge.core.runtime import Session
from rpfm_edge.core.signature import GIVEN_JOINTS, JOINTS, SCORES, PoseKind
from rpfm_edge.people.formats import NobodyError, read_pose
from rpfm_edge.people.image import Fit, Image, fitted, load_image, save_png
from rpfm_edge.people.pose import check_pose, from_graph, pose_input, pose_kind, prepare_feeds

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
        self._fit: Fit = bundle.config.get("fit") or "pad"
        self._prepare, self._frame, self._resources = prepare, frame, resources

    @classmethod
    def open(cls, bundle: str | Path | Artifact, backend: str | None = None) -> Pipeline:
        """Load a bundle on one of the backends that it was built for (default: the first that is installed here).

        One that is loaded already is not verified again.

        Raises:
            ArtifactError: the bundle is missing, damaged or another kind of artifact.
            BackendError: the bundle has no engine for ``backend``, or its library is not installed.
        """
        loaded = bundle if isinstance(bundle, Artifact) else artifact.load(shipped.resolve(bundle), "bundle")
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
            source: a file, or (H, W, 3) uint8 RGB; padded to the bundle's aspect, or
                stretched, as the teacher's photos were.
            keypoints: (18, 2) of the source, pixels x, y of ``size``, nan where missing, for a bundle that looks at
                them. It finds those itself that are missing or not given.

        Raises:
            NobodyError: no keypoints are given, and the bundle finds nobody.
            InputError: a picture that cannot be read, keypoints that are none, or for a bundle that takes none.
        """
        image, points = fitted(load_image(source), self.size, self._fit), None
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


def render(
    bundle: str | Path,
    source: str | Path,
    pose: str | Path,
    out: str | Path,
    backend: str | None = None,
    source_pose: str | Path | None = None,
) -> Path:
    """Render the person of an image file in the pose of a JSON file, as PNG.

    ``source_pose``: the joints in the image, as JSON; those that it has not are found, as all are without it.
    """
    with Pipeline.open(bundle, backend) as pipe:
        joints = read_pose(source_pose, pipe.size) if source_pose else None
        image = pipe.render(pipe.prepare(source, joints), read_pose(pose, pipe.size))
    save_png(Path(out), image)
    return Path(out)
