"""Baselines: what a bundle's frame took on a device, with a copy of the bundle, to hold later ones against.

A folder holds one JSON file for each name, backend and device, and below ``bundles/`` the bundles themselves.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from rpfm_edge.bundle.engines import engine_versions
from rpfm_edge.core import artifact
from rpfm_edge.core.artifact import Artifact, tool_versions
from rpfm_edge.core.errors import ArtifactError, ConfigError
from rpfm_edge.core.files import json_digest, write_text
from rpfm_edge.measure import device_state, machine
from rpfm_edge.measure.jetson import read_text

FOLDER = Path(".rpfm-edge") / "baselines"
BUNDLES = "bundles"
FORMAT = 2


@dataclass(frozen=True, slots=True)
class Baseline:
    """Times of a frame in seconds, in the order in which they were measured, and whose they are.

    ``config``: ``size``, ``steps`` and ``precision`` of the bundle; ``digest``: the bundle's; ``unsettled``: why the
    times are not to be compared with those of another day (empty where they are).
    """

    name: str
    backend: str
    device: Mapping[str, Any]
    config: Mapping[str, Any]
    digest: str
    times_s: tuple[float, ...]
    unsettled: tuple[str, ...]


def fingerprint(bundle: Artifact, backend: str, root: Path = Path("/")) -> dict[str, Any]:
    """What has to be the same for two times to be comparable: the device, how it is set, and the libraries.

    The version of rpfm-edge is no part of it: that is among what a gate judges.
    """
    where, options = machine.where(), dict(bundle.config["backends"][backend])
    board = where.get("jetson") or {}
    libraries = {**engine_versions(bundle, backend), **tool_versions("numpy", "opencv-python-headless")}
    return {
        **{name: where.get(name) for name in ("cpu", "board", "usable_cores", "python")},
        "gpus": _gpus(root),
        "driver": _driver(root),
        "governor": read_text(root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor") or None,
        **{name: board.get(name) for name in ("power_mode", "clocks_locked", "l4t")},
        "chosen": _chosen(backend, options),
        "libraries": {name: version for name, version in libraries.items() if name != "rpfm-edge"},
    }


def save(folder: Path, baseline: Baseline, bundle: Artifact) -> Path:
    """Keep a baseline and a copy of its bundle; one of the same name, backend and device is replaced."""
    check_name(baseline.name)
    copy = _copy(folder, baseline.digest)
    content = {"format": FORMAT, **asdict(baseline)}
    path = _file(folder, baseline.name, baseline.backend, baseline.device)
    with ExitStack() as stack:
        if _verified(copy, baseline.digest) is None:
            scratch = stack.enter_context(artifact.replacing_folder(copy, "bundle"))
            shutil.copytree(bundle.path, scratch, dirs_exist_ok=True)
        # before the copy has its name: another process removes copies that no baseline names
        write_text(path, json.dumps({**content, "sha256": json_digest(content)}, indent=1))
    _prune(folder)
    return path


def find(folder: Path, name: str, backend: str, device: Mapping[str, Any]) -> Baseline | str:
    """The baseline of a name for a backend on a device, or in words why there is none.

    Raises:
        ArtifactError: it is there, but damaged.
    """
    check_name(name)
    path = _file(folder, name, backend, device)
    if path.is_file():
        return _read(path)
    others = [record for record in _records(folder) if (record.get("name"), record.get("backend")) == (name, backend)]
    if not others:
        return f"{folder} has no baseline {name} for {backend}"
    changes = min((_changes(record["device"], device) for record in others), key=len)
    return f"baseline {name} is of another device: {'; '.join(changes)}"


def kept_bundle(folder: Path, baseline: Baseline) -> Artifact | None:
    """The bundle that the baseline was measured on; None if its copy is gone or altered."""
    return _verified(_copy(folder, baseline.digest), baseline.digest)


def _file(folder: Path, name: str, backend: str, device: Mapping[str, Any]) -> Path:
    return folder / f"{name}-{backend}-{json_digest(device)[:12]}.json"


def _copy(folder: Path, digest: str) -> Path:
    return folder / BUNDLES / digest[:16]


def check_name(name: str) -> None:
    """Refuse a name that cannot be part of a file's name."""
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise ConfigError(f"baseline name {name!r}", expected="letters, digits, '.', '_', '-'", fix="choose another")


def _verified(path: Path, digest: str) -> Artifact | None:
    try:
        found = artifact.load(path, "bundle")
    except ArtifactError:
        return None
    return found if found.digest == digest else None


def _read(path: Path) -> Baseline:
    """A baseline whose digest is right and whose times are times."""
    try:
        record = dict(json.loads(path.read_text(encoding="utf-8")))
        sha256 = record.pop("sha256")
        if sha256 != json_digest(record):
            raise ValueError("its sha256 is another")
        if record.pop("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        times = np.asarray(record.pop("times_s"), np.float64)
        if times.ndim != 1 or not times.size or not (np.isfinite(times) & (times > 0)).all():
            raise ValueError("its times are no times")
        unsettled = tuple(record.pop("unsettled"))
        return Baseline(**record, times_s=tuple(times.tolist()), unsettled=unsettled)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(
            f"{path} was altered or cut short ({error})", expected="a baseline", fix="save the baseline again"
        ) from None


def _records(folder: Path) -> Iterator[dict[str, Any]]:
    """Whatever can be read, unverified: to say what there is, and which copies are in use."""
    for path in sorted(folder.glob("*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(record, dict) and isinstance(record.get("device"), dict):
            yield record


def _changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two devices, in words."""
    found = []
    for key in sorted({*then, *now}):
        old, new = then.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += _changes(old, new)
        elif old != new:
            found.append(f"{key} was {old} and is {new}")
    return found


def _prune(folder: Path) -> None:
    """Remove the copies that no baseline names."""
    copies = list((folder / BUNDLES).iterdir())  # first: a copy that comes later has its record by then
    used = {_copy(folder, str(record.get("digest"))).name for record in _records(folder)}
    for copy in copies:
        if copy.name not in used and not copy.name.startswith("."):  # another process is writing those
            shutil.rmtree(copy, ignore_errors=True)


def _gpus(root: Path) -> list[str]:
    """NVIDIA's GPUs by the driver's files, with the limit of their power where NVML tells it."""
    files = sorted((root / "proc/driver/nvidia/gpus").glob("*/information"))
    found = [re.search(r"^Model:\s*(.+)$", read_text(file), re.MULTILINE) for file in files]
    limits = [gpu["power_limit_w"] for gpu in device_state.read()["gpus"]] if files else []
    return [model.group(1) for model in found if model] + [f"{limit:.0f} W" for limit in limits if limit]


def _driver(root: Path) -> str | None:
    version = re.search(r"Module\b.*?\s(\d+\.[\d.]+)", read_text(root / "proc/driver/nvidia/version"))
    return version.group(1) if version else None


def _chosen(backend: str, options: Mapping[str, Any]) -> str | None:
    """The device that a bundle names, by its full name where OpenVINO knows it."""
    device = options.get("device", options.get("provider"))
    if backend == "openvino" and device not in (None, "CPU"):
        return str(import_module("runtimes.ov").devices().get(device, device))
    return None if device == "CPU" else device
