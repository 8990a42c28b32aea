"""What a user holds: open a bundle, prepare a person once, render a frame per pose. The same for every backend."""

from __future__ import annotations

import shlex
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
from rpfm_edge.pose import check_pose, draw_skeleton
from rpfm_edge.precisions import STUDENT_ONLY
from rpfm_edge.runtime import Runtime, Session

Image = np.ndarray  # (H, W, 3) uint8 RGB


@dataclass(frozen=True, slots=True)
class Person:
    """A source image, prepared: the keys and values that every frame attends to. Valid for the bundle that made it."""

    source_kv: np.ndarray
    bundle_digest: str


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
        noise: the bundle's noise, (1, C, h, w) float32; the same noise for every frame keeps a video steady. It is in
            the form that the engine takes fastest, perhaps frozen: assign another array, do not change this one.
    """

    def __init__(self, bundle: Artifact, backend: str, prepare: Session, frame: Session, resources: ExitStack) -> None:
        self.bundle, self.backend = bundle, backend
        self.size: tuple[int, int] = tuple(bundle.config["size"])
        self.noise: np.ndarray = frame.keep(np.load(bundle.file("noise.npy"), allow_pickle=False))
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

    def prepare(self, source: str | Path | Image) -> Person:
        """Encode a person, once per identity.

        Args:
            source: a file, or (H, W, 3) uint8 RGB; padded to the bundle's aspect.
        """
        image = load_image(source, self.size)
        source_kv = self._prepare.run({"source": image[None]})["source_kv"]
        return Person(self._frame.keep(source_kv), self._digest)

    def render(self, person: Person, pose: ArrayLike, noise: np.ndarray | None = None) -> Image:
        """One frame: the person in a pose.

        Args:
            person: from ``prepare`` of this bundle.
            pose: (18, 2) OpenPose keypoints, pixels x, y of ``size``; nan where missing.
            noise: (1, C, h, w) float32; default ``self.noise``.

        Returns:
            (H, W, 3) uint8 RGB.
        """
        return self.render_skeleton(person, draw_skeleton(check_pose(pose, self.size), self.size), noise)

    def render_skeleton(self, person: Person, skeleton: Image, noise: np.ndarray | None = None) -> Image:
        """As ``render``, from a drawn skeleton (H, W, 3) uint8 RGB."""
        if not isinstance(person, Person) or person.bundle_digest != self._digest:
            given = "was prepared by another bundle" if isinstance(person, Person) else f"is a {type(person).__name__}"
            raise InputError(
                f"the person {given}", expected="a person of this bundle's prepare", fix="prepare the source again"
            )
        feeds = {"pose": skeleton[None], "noise": self.noise if noise is None else noise, "source_kv": person.source_kv}
        image: Image = self._frame.run(feeds)["image"][0]
        return image

    def close(self) -> None:
        """Free the engines; later calls raise ``BackendError``."""
        self._resources.close()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
