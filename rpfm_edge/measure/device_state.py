"""What the device is doing at a moment: clocks, load, temperatures and power, to stand before and after every figure.

Each fact may be missing on some machine: then it is None or left out, never a guess. CPUs are read by psutil where it
is installed, NVIDIA's GPUs by nvidia-ml-py, a Jetson by ``jetson.read``; power by NVML, Intel's RAPL counters
(readable by root on most systems) and a Jetson's INA3221 sensors.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

from rpfm_edge.measure import jetson

HOT = {  # bits of NVML's clocks event reasons that say that a GPU is held down by heat or power
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}
WHOLE_BOARD = ("VDD_IN", "POM_5V_IN")  # rails of a Jetson that carry all the others
NVML_SM, NVML_GPU_SENSOR = 1, 0
JETSON_FACTS = ("power_mode", "clocks_locked", "gpu_hz", "temperatures_c", "throttled", "over_current")
State = dict[str, Any]


def read(root: Path = Path("/")) -> State:
    """The state now, JSON-able.

    Keys: ``time_s`` (since the epoch), ``cpu`` (``load_average`` of a minute, ``frequency_hz``, ``frequency_max_hz``,
    ``temperatures_c``, ``throttle_events`` since boot), ``gpus`` (of each: name, clock, utilisation, temperature,
    throttling), ``jetson`` (None elsewhere), ``power_w`` (source → watts now) and ``energy_j`` (source → a counter in
    joules, of which only differences mean something), both empty where nothing can be read.
    """
    board = jetson.read(root)
    gpus = _gpus() if board is None else []  # NVML on a Jetson knows its GPU's name and little else
    power = {f"GPU {k}": gpu["power_w"] for k, gpu in enumerate(gpus) if gpu["power_w"] is not None}
    energy = {f"GPU {k}": gpu["energy_j"] for k, gpu in enumerate(gpus) if gpu["energy_j"] is not None}
    return {
        "time_s": time.time(),
        "cpu": _cpu() | {"throttle_events": throttle_events(root / "sys/devices/system/cpu")},
        "gpus": gpus,
        "jetson": {name: board[name] for name in JETSON_FACTS} if board else None,
        "power_w": power | board_power_w(rails_w(root / "sys/class/hwmon")),
        "energy_j": energy | rapl_j(root / "sys/class/powercap"),
    }


def throttling(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """What held the clocks down between two states, in words; empty if nothing that can be read did."""
    found = [f"{gpu['name']}: {reason}" for gpu in after["gpus"] for reason in gpu["throttled"]]
    old, new = (state["cpu"]["throttle_events"] for state in (before, after))
    if old is not None and new is not None and new > old:
        found.append(f"CPU: {new - old} throttle events")
    if after["jetson"]:
        found += [f"Jetson: {name}" for name in after["jetson"]["throttled"] or []]
        counts, earlier = (((state["jetson"] or {}).get("over_current") or {}) for state in (after, before))
        found += [f"Jetson: over-current {name}" for name, count in counts.items() if count > earlier.get(name, count)]
    return found


def energy(states: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Source → ``joules`` spent between the first and the last of ``states``, and ``how``; empty if power is unknown.

    A counter counts everything between; where there is none, watts are integrated over the readings by trapezoids,
    which is as good as the readings are many.
    """
    first, last = states[0], states[-1]
    counted = {
        name: {"joules": value - first["energy_j"][name], "how": "counter"}
        for name, value in last["energy_j"].items()
        if value > first["energy_j"].get(name, value)  # a counter that wrapped says nothing
    }
    sources = [name for name in last["power_w"] if name not in counted and all(name in s["power_w"] for s in states)]
    integrated = {
        name: {"joules": _trapezoids(states, name), "how": f"{len(states)} readings of power"} for name in sources
    }
    return counted | (integrated if last["time_s"] > first["time_s"] else {})


def frames_per_joule(frames: int, states: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Source of power → frames per joule of it; empty where power cannot be read."""
    return {name: frames / spent["joules"] for name, spent in energy(states).items() if spent["joules"] > 0}


def around(before: Mapping[str, Any], frames: int | None = None) -> dict[str, Any]:
    """What a result keeps: the states before and after (read now), throttling, and frames per joule where known."""
    after = read()
    kept: dict[str, Any] = {"before": dict(before), "after": after, "throttling": throttling(before, after)}
    if frames and (ratio := frames_per_joule(frames, [before, after])):
        kept["frames_per_joule"] = ratio
    return kept


def rails_w(hwmon: Path) -> dict[str, float]:
    """Rail → watts, of the INA3221 sensors in ``/sys/class/hwmon`` (Jetson Linux Developer Guide, "Software-Based Power
    Consumption Modeling"): millivolts of ``inN_input`` times milliamperes of ``currN_input``."""
    found = {}
    for label in sorted(hwmon.glob("*/in[1-3]_label")):
        if jetson.read_text(label.with_name("name")) != "ina3221":
            continue
        number = label.name[2]
        volts, amperes = (_number(label.with_name(f"{kind}{number}_input")) for kind in ("in", "curr"))
        if volts is not None and amperes is not None:
            found[jetson.read_text(label)] = volts * amperes / 1e6
    return found


def board_power_w(rails: Mapping[str, float]) -> dict[str, float]:
    """The whole board, where one rail carries it, else every rail by itself: what a sum would miss is not known."""
    return next(({name: rails[name]} for name in WHOLE_BOARD if name in rails), dict(rails))


def rapl_j(powercap: Path) -> dict[str, float]:
    """CPU package → joules, of the counters ``intel-rapl:N/energy_uj``; AMD's have the same form."""
    found = {}
    for package in sorted(powercap.glob("intel-rapl:[0-9]*")):
        name, value = jetson.read_text(package / "name"), _number(package / "energy_uj")
        if name.startswith("package") and value is not None:
            found[name.replace("package-", "CPU package ")] = value / 1e6
    return found


def throttle_events(cpus: Path) -> int | None:
    """How often the packages of ``/sys/devices/system/cpu`` were held down by heat since boot; None if not counted."""
    counts = [_number(path) for path in cpus.glob("cpu[0-9]*/thermal_throttle/package_throttle_count")]
    return max((count for count in counts if count is not None), default=None)  # the cores of a package share one


def _cpu() -> dict[str, Any]:
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    facts: dict[str, Any] = {"load_average": load, "frequency_hz": None, "frequency_max_hz": None, "temperatures_c": {}}
    if find_spec("psutil") is None:
        return facts
    psutil = import_module("psutil")
    clock = _known(psutil.cpu_freq)
    if clock and clock.current:
        facts |= {"frequency_hz": 1e6 * clock.current, "frequency_max_hz": 1e6 * clock.max or None}
    sensors = _known(lambda: psutil.sensors_temperatures()) or {}
    facts["temperatures_c"] = {f"{chip} {s.label}".strip(): s.current for chip, many in sensors.items() for s in many}
    return facts


def _gpus() -> list[dict[str, Any]]:
    """NVIDIA's GPUs by NVML; none without nvidia-ml-py or a driver."""
    if find_spec("pynvml") is None:
        return []
    nvml = import_module("pynvml")
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return []
    try:
        return [_gpu(nvml, nvml.nvmlDeviceGetHandleByIndex(k)) for k in range(nvml.nvmlDeviceGetCount())]
    except nvml.NVMLError:
        return []
    finally:
        with suppress(nvml.NVMLError):
            nvml.nvmlShutdown()


def _gpu(nvml: Any, gpu: Any) -> dict[str, Any]:
    def get(ask: Callable[[], Any], scale: float = 1) -> Any:
        try:
            return scale * ask()
        except nvml.NVMLError:  # not supported by this GPU, or hidden in a MIG slice
            return None

    reasons = get(lambda: nvml.nvmlDeviceGetCurrentClocksThrottleReasons(gpu)) or 0
    return {
        "name": nvml.nvmlDeviceGetName(gpu),
        "clock_hz": get(lambda: nvml.nvmlDeviceGetClockInfo(gpu, NVML_SM), 1e6),
        "clock_max_hz": get(lambda: nvml.nvmlDeviceGetMaxClockInfo(gpu, NVML_SM), 1e6),
        "utilisation": get(lambda: nvml.nvmlDeviceGetUtilizationRates(gpu).gpu, 0.01),
        "temperature_c": get(lambda: nvml.nvmlDeviceGetTemperature(gpu, NVML_GPU_SENSOR)),
        "power_w": get(lambda: nvml.nvmlDeviceGetPowerUsage(gpu), 1e-3),
        "power_limit_w": get(lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(gpu), 1e-3),
        "energy_j": get(lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(gpu), 1e-3),
        "throttled": [name for bit, name in HOT.items() if int(reasons) & bit],
    }


def _known(ask: Callable[[], Any]) -> Any:
    try:
        return ask()
    except (AttributeError, OSError, NotImplementedError, RuntimeError):  # not on this system
        return None


def _number(path: Path) -> int | None:
    text = jetson.read_text(path)
    return int(text) if text.removeprefix("-").isdecimal() else None


def _trapezoids(states: Sequence[Mapping[str, Any]], source: str) -> float:
    joules = 0.0
    for a, b in pairwise(states):
        joules += (b["time_s"] - a["time_s"]) * (a["power_w"][source] + b["power_w"][source]) / 2
    return joules
