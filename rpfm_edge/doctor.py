"""What this machine and this installation can run, and what to do about the rest."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rpfm_edge.core.backends import BACKENDS
from rpfm_edge.core.errors import BackendError, ConfigError
from rpfm_edge.core.precisions import Precision, supports
from rpfm_edge.measure import jetson
from rpfm_edge.measure.machine import where

DISTRIBUTION = "rpfm-edge"
SIBLINGS = ("distill", "quantize", "runtimes")  # generic names, which another distribution may have too
CPU_FLAGS = (  # instructions that decide the speed of INT8, BF16 and FP16
    *("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_int8", "amx_bf16"),
    *("asimddp", "asimdhp", "i8mm", "bf16", "sve"),
)
LIBRARIES = (
    *("numpy", "opencv-python-headless", "rich", "safetensors", "typer"),
    *(distribution for row in BACKENDS.values() for distribution in row.distributions),
    *("onnx", "onnxscript", "onnxsim", "nncf", "diffusers", "accelerate"),
    *("scikit-image", "matplotlib", "jinja2", "psutil", "lmdb", "jetson-stats"),
)


def doctor(precision: str | None = None) -> dict[str, Any]:
    """A JSON-able description of the machine and the installation.

    ``precision`` is the one that an engine is to be built in, such as ``"fp8"``: on a Jetson, ``advice`` says if its
    GPU has none. ``ConfigError`` for one that is unknown.

    Keys: ``rpfm_edge``, ``python``, ``platform``, ``cpu`` (model, cores, cores_usable, flags), ``memory_bytes``,
    ``backends`` (name → null if usable, or why not and the fix), ``no_gpu`` (why TensorRT can run nothing here, and the
    fix; null if it can, or is not usable), ``openvino_devices``, ``versions``, ``intruders`` (sibling package → where
    it was found instead, by whom), ``extras`` (extra → what is missing and the fix), ``jetson`` (the facts of
    ``jetson.read``, null elsewhere), ``advice`` (``problem`` and ``fix``, of a Jetson).
    """
    if precision is not None and precision not in get_args(Precision):
        fix = "check the spelling"
        raise ConfigError(f"unknown precision {precision!r}", expected=f"one of {get_args(Precision)}", fix=fix)
    backends, here = _backends(), where()
    board, cpu_info = here.get("jetson"), jetson.read_text(Path("/proc/cpuinfo"))
    return {
        "rpfm_edge": _version(DISTRIBUTION),
        "python": f"{here['python']} ({sys.executable})",
        "platform": here["platform"],
        "cpu": {
            "model": here.get("board", here["cpu"]),  # ARM boards name themselves elsewhere
            "cores": here["cores"],
            "cores_usable": here["usable_cores"],
            "flags": cpu_flags(cpu_info),
        },
        "memory_bytes": here.get("memory_bytes"),
        "backends": backends,
        "no_gpu": _no_gpu() if backends.get("tensorrt", "") is None else None,
        "openvino_devices": import_module("runtimes.ov").devices() if backends.get("openvino", "") is None else {},
        "versions": {name: found for name in LIBRARIES if (found := _version(name))},
        "intruders": dict(intruders(Path(__file__).parent.parent)),
        "extras": missing_extras(),
        "jetson": board,
        "advice": jetson.advice(board, precision) if board else [],
    }


def render(diagnosis: dict[str, Any]) -> None:
    """Print what ``doctor`` returned as a table."""
    table = Table("what", "found", title="rpfm-edge doctor", title_justify="left")
    for what, found, good in _rows(diagnosis):
        table.add_row(Text(what), Text(found, style="" if good is None else "green" if good else "red"))
    Console().print(table)


def cpu_flags(cpuinfo: str) -> list[str]:
    """Those of ``CPU_FLAGS`` that the text of ``/proc/cpuinfo`` lists (x86: ``flags``, ARM: ``Features``)."""
    lines = re.findall(r"^(?:flags|Features)\s*:(.*)$", cpuinfo, re.MULTILINE)
    found = {flag for line in lines for flag in line.split()}
    return [flag for flag in CPU_FLAGS if flag in found]


def intruders(root: Path) -> Iterator[tuple[str, str]]:
    """Every sibling package that Python does not import from ``root``, and what stands in its place."""
    for name in SIBLINGS:
        spec = find_spec(name)
        found = [Path(folder).resolve() for folder in (spec.submodule_search_locations or [])] if spec else []
        if root.resolve() / name in found:
            continue
        if not spec:
            yield name, "not found: install rpfm-edge again"
            continue
        owners = [owner for owner in metadata.packages_distributions().get(name, []) if owner != DISTRIBUTION]
        place = found[0] if found else spec.origin
        yield (
            name,
            f"{place} ({', '.join(owners) or 'no distribution'}): uninstall or move it, or use an environment apart",
        )


def missing_extras() -> dict[str, dict[str, Any]]:
    """Extra → ``missing`` (distributions) and ``fix``, of the incomplete ones; {} where rpfm-edge is not installed."""
    try:
        requirements = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return {}
    missing: dict[str, list[str]] = {}
    for requirement in requirements:
        extra = re.search(r"extra\s*==\s*['\"]([^'\"]+)['\"]", requirement)
        wanted = re.match(r"[\w.-]+", requirement)
        if extra and wanted and not _installed(wanted.group()):
            missing.setdefault(extra.group(1), []).append(wanted.group())
    return {extra: {"missing": [*dict.fromkeys(names)], "fix": _install(extra)} for extra, names in missing.items()}


def _rows(diagnosis: dict[str, Any]) -> Iterator[tuple[str, str, bool | None]]:
    """What, found, and whether that is good (None: neither)."""
    cpu, memory = diagnosis["cpu"], diagnosis["memory_bytes"]
    yield "rpfm-edge", diagnosis["rpfm_edge"] or "not installed as a distribution", None
    yield "Python", diagnosis["python"], None
    yield "platform", diagnosis["platform"], None
    yield "CPU", f"{cpu['model'] or 'unknown'}, {cpu['cores_usable']} of {cpu['cores']} cores usable", None
    yield "CPU instructions", " ".join(cpu["flags"]) or "unknown", None
    yield "memory", f"{memory / 2**30:.1f} GiB" if memory else "unknown", None
    yield from _board_rows(diagnosis["jetson"] or {})
    for hint in diagnosis["advice"]:
        yield "advice", f"{hint['problem']}: {hint['fix']}", False
    for name, reason in diagnosis["backends"].items():
        if name == "tensorrt" and diagnosis["no_gpu"]:  # TensorRT for RTX builds for GPUs that are not here
            able = "not usable" if "tensorrt" in diagnosis["versions"] else "builds only"
            yield f"backend {name}", f"{able}: {diagnosis['no_gpu']}", None
        else:
            yield f"backend {name}", reason or "usable", reason is None
    for device, name in diagnosis["openvino_devices"].items():
        yield f"OpenVINO device {device}", name, None
    for name, place in diagnosis["intruders"].items():
        yield f"package {name}", place, False
    for extra, found in diagnosis["extras"].items():
        yield f"extra {extra}", f"without {', '.join(found['missing'])}; {found['fix']}", None
    yield "libraries", ", ".join(f"{name} {version}" for name, version in diagnosis["versions"].items()), None


def _board_rows(board: Mapping[str, Any]) -> Iterator[tuple[str, str, bool | None]]:
    """The facts of ``jetson.read`` in words; none elsewhere."""
    if not board:
        return
    names = {"JetPack": "jetpack", "L4T": "l4t", "TensorRT": "tensorrt", "compute capability": "compute_capability"}
    versions = [f"{word} {board[name]}" for word, name in names.items() if board[name]]
    no_fp8 = ["no FP8"] if supports(board, "fp8") is False else []
    yield "Jetson", ", ".join([board["module"] or board["board"] or "unknown module", *versions, *no_fp8]), None
    clocks = {True: "locked", False: "following the load", None: "unknown"}[board["clocks_locked"]]
    megahertz = [f"GPU {name} {value / 1e6:.0f} MHz" for name, value in (board["gpu_hz"] or {}).items()]
    yield "Jetson power", ", ".join([f"mode {board['power_mode'] or 'unknown'}, clocks {clocks}", *megahertz]), None
    degrees = [f"{name} {value:.1f}" for name, value in (board["temperatures_c"] or {}).items()]
    yield "Jetson temperatures (°C)", ", ".join(degrees) or "unknown", None
    free = board["memory_free_bytes"]
    yield "Jetson memory free", f"{free / 2**30:.1f} GiB" if free is not None else "unknown", None
    yield "Jetson read from", board["read_from"], None


def _backends() -> dict[str, str | None]:
    """Backend → None or why it is not usable; empty if another distribution stands in place of our ``runtimes``."""
    try:
        available = import_module("runtimes").available
    except (ImportError, AttributeError):
        return {}
    found: dict[str, str | None] = available()
    return found


def _no_gpu() -> str | None:
    try:
        import_module("runtimes.trt.cuda").device()
    except (BackendError, RuntimeError) as error:  # cuda-bindings may fail in its own words where there is no driver
        return str(error)
    return None


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _installed(distribution: str) -> bool:
    """By its name, or by that of its package (onnxruntime-gpu gives onnxruntime too), or by one that does as well."""
    module = re.sub(r"[-.]", "_", distribution)
    same = next((row.libraries for row in BACKENDS.values() if module in row.libraries), (module,))
    return bool(_version(distribution)) or any(map(find_spec, same))


def _install(extra: str) -> str:
    return f"pip install '{DISTRIBUTION}[{extra}]'"
