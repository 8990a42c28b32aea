"""The machine that something was measured on."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from rpfm_edge.core.errors import BackendError
from rpfm_edge.measure import jetson


def peak_memory_bytes() -> int:
    """The high-water mark of this process's resident memory since it started: it never falls, so measure one thing per
    process. POSIX only (``getrusage``, which counts KiB on Linux and bytes on macOS).
    """
    try:
        import resource
    except ImportError:
        raise BackendError("peak memory is not known here", expected="Linux or macOS", fix="leave it out") from None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def where(versions: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The machine that measured, to stand beside every figure.

    Args:
        versions: library → version, such as ``Runtime.versions()`` gives; kept under ``"versions"``.

    Returns:
        cpu (model name), board (from the device tree; absent without one), cores (logical), usable_cores (that this
        process may run on), memory_bytes (absent if unknown), jetson (power mode, clocks, temperatures and more, of
        ``jetson.read``; absent elsewhere), python, platform, versions.
    """
    cores = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    facts: dict[str, Any] = {"cpu": _cpu_model(), "cores": cores, "usable_cores": usable}
    if board := _read("/proc/device-tree/model").strip("\0\n "):
        facts["board"] = board
    with suppress(AttributeError, ValueError, OSError):
        facts["memory_bytes"] = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if found := jetson.read():
        facts["jetson"] = found
    facts |= {"python": platform.python_version(), "platform": platform.platform(), "versions": dict(versions or {})}
    return facts


def _cpu_model() -> str:
    for line in _read("/proc/cpuinfo").splitlines():
        if line.partition(":")[0].strip() == "model name":
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
