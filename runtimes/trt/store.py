"""Plans on disk: the two files of an engine, where an engine fits, and the cache of plans that were built before."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rpfm_edge.core import artifact
from rpfm_edge.core.cache import cache_folder
from rpfm_edge.core.errors import ArtifactError, BackendError, ParityError
from rpfm_edge.core.files import json_digest, write_bytes, write_text
from runtimes.trt.api import Library
from runtimes.trt.build import Settings
from runtimes.trt.cuda import Device

PLAN, RECORD = "model.plan", "plan.json"
FIRST_AMPERE = (8, 0)

Record = Mapping[str, Any]


def record(
    library: Library, here: Device | None, settings: Settings, graph: str, options: Mapping[str, Any]
) -> dict[str, Any]:
    """What a plan depends on, all of it: the key of the cache, and what ``require_fit`` judges by.

    Args:
        here: the GPU that it is built on, None if it is built for ``settings.targets`` elsewhere.
        graph: sha256 of the ONNX file and its external data.
        options: those that change the plan.
    """
    return {
        "library": library.name,
        "version": library.version,
        "device": asdict(here) if here else None,
        "targets": list(settings.targets),
        "portable": library.portable,
        "graph": graph,
        "options": dict(options),
        "tools": artifact.tool_versions("onnx", "torch"),  # what rewrites graphs on the way to the plan
    }


def write(engine: Path, plan: bytes, made: Record) -> None:
    """Write a plan and its record into the folder ``engine``."""
    write_bytes(engine / PLAN, plan)
    digest = hashlib.sha256(plan).hexdigest()
    write_text(engine / RECORD, json.dumps({**made, "plan": digest}, indent=1))


def read(engine: Path) -> tuple[bytes, dict[str, Any]]:
    """Plan and record of ``engine``; raises ``ArtifactError`` if they are missing or do not belong together."""
    path = engine / PLAN
    try:
        made = json.loads((engine / RECORD).read_text(encoding="utf-8"))
        plan = path.read_bytes()
        whole = hashlib.sha256(plan).hexdigest() == made["plan"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"{path} or its record is missing or damaged ({error})",
            expected="an engine as it was built",
            fix=f"copy the bundle again or build the engine again: {rebuild(engine)}",
        ) from None
    if not whole:  # TensorRT itself would crash on some of these
        raise ArtifactError(
            f"{path} was cut short or altered",
            expected="the plan that was built",
            fix=f"copy the bundle again or build the engine again: {rebuild(engine)}",
        )
    return plan, made


def require_fit(engine: Path, made: Record, library: Library, here: Device) -> None:
    """Raise ``BackendError`` unless a plan was built for this GPU, driver and library."""
    if not (_fits_library(made, library) and _fits_device(made, here)):
        device = made["device"]
        built = f"{device['name']}, driver {device['driver']}" if device else f"compute capability {made['targets']}"
        raise BackendError(
            f"{engine / PLAN} was built for {built}, {made['library']} {made['version']}",
            expected=f"{here.name} ({here.capability}), driver {here.driver}, {library.name} {library.version}",
            fix=f"build it on this device: {rebuild(engine)}",
        )


def _fits_library(made: Record, library: Library) -> bool:
    ours, theirs = _numbers(library.version), _numbers(made["version"])
    if made["options"].get("version_compatible"):
        return made["library"].partition("_")[2] != "rtx" and ours[0] == theirs[0] and ours >= theirs
    return bool((made["library"], made["version"]) == (library.name, library.version))


def _fits_device(made: Record, here: Device) -> bool:
    if made["device"] is None:
        return here.capability in made["targets"]
    level, there = made["options"].get("hardware_compatible", "no"), made["device"]["capability"]
    if made["portable"] or level == "same_compute_capability":
        return bool(here.capability == there)
    if level == "ampere_plus":
        return min(_numbers(here.capability), _numbers(there)) >= FIRST_AMPERE
    return bool(made["device"] == asdict(here))


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def bundle_of(engine: Path) -> Path | None:
    """The bundle that ``engine``, BUNDLE/engines/TARGET/GRAPH, lies in."""
    bundle = engine.parent.parent.parent
    return bundle if engine.parent.parent.name == "engines" and (bundle / artifact.MANIFEST).is_file() else None


def rebuild(engine: Path) -> str:
    """The command that builds ``engine`` from the graph that its bundle carries."""
    bundle = bundle_of(engine)
    place, name = (bundle, engine.parent.name) if bundle else ("BUNDLE", "tensorrt")
    return f"rpfm-edge build {place} --target {name} --out {place}"


def cached(made: Record) -> bytes | None:
    """The plan that was built before for the same record."""
    path = _cache_file(made)
    if not path or not path.with_suffix(".sha256").is_file() or not path.is_file():
        return None
    plan = path.read_bytes()
    return plan if hashlib.sha256(plan).hexdigest() == path.with_suffix(".sha256").read_text().strip() else None


def make(engine: Path, made: Record, build: Callable[[], bytes], compare: Callable[[], None] | None) -> None:
    """Write the plan of ``made`` into ``engine``: from the cache, or by ``build``; then ``compare`` it.

    A plan of the cache that is found wrong is forgotten and built again, once.

    Raises:
        ParityError: ``compare`` found the engine wrong.
    """
    if plan := cached(made):
        write(engine, plan, made)
        try:
            return compare() if compare else None
        except ParityError:
            forget(made)
    plan = build()
    write(engine, plan, made)
    if compare:
        compare()
    return keep(made, plan)


def forget(made: Record) -> None:
    """Take a plan that turned out to be wrong out of the cache."""
    if path := _cache_file(made):
        path.unlink(missing_ok=True)


def keep(made: Record, plan: bytes) -> None:
    """Put a plan into the cache, after it was found to be right."""
    if path := _cache_file(made):
        write_bytes(path, plan)
        write_text(path.with_suffix(".sha256"), hashlib.sha256(plan).hexdigest())


def timing_file(library: Library, here: Device | None) -> Path | None:
    """The file of the timing cache, one for each GPU and version; None where nothing can be written."""
    folder = cache_folder("tensorrt")
    if not folder or not here:
        return None
    where = json_digest({"device": asdict(here), "version": library.version})[:16]
    return folder / f"{where}.timing"


def _cache_file(made: Record) -> Path | None:
    folder = cache_folder("tensorrt")
    return folder / f"{json_digest(made)}.plan" if folder else None
