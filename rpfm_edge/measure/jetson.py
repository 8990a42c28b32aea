"""What a Jetson says about itself, and what to do about it. It knows nothing of engines.

Read from jetson-stats' service where it runs (``jtop``, optional; it sees the host from inside a container), else from
the files that NVIDIA's Jetson Linux Developer Guide names. Each fact may be missing on some board or release: then it
is None, never a guess.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rpfm_edge.core.precisions import supports

JTOP_SOCKET = "run/jtop.sock"
FAMILIES = {"tegra194": ("Xavier", "7.2"), "tegra234": ("Orin", "8.7"), "tegra264": ("Thor", "11.0")}
JETPACKS = {  # L4T → JetPack, from NVIDIA's JetPack archive
    **{"36.3.0": "6.0", "36.4.0": "6.1", "36.4.3": "6.2", "36.4.4": "6.2.1", "36.4.7": "6.2.1", "36.5.0": "6.2.2"},
    **{"38.2.0": "7.0", "38.2.1": "7.0", "38.2.2": "7.0", "38.4.0": "7.1", "39.2.0": "7.2", "39.2.1": "7.2.1"},
}
SERIES = {35: "5", 36: "6", 38: "7", 39: "7"}  # of releases that JETPACKS does not list
GPU_FILES = {"min": "min_freq", "max": "max_freq", "now": "cur_freq"}
SMALL_MODULE_BYTES = 9 * 2**30  # the 8 GB modules, and smaller ones
BUILD_BYTES = 4 * 2**30


def read(root: Path = Path("/")) -> dict[str, Any] | None:
    """The facts of the Jetson whose files lie under ``root``, JSON-able; None elsewhere.

    Keys, each None where unknown: ``board``, ``module``, ``family``, ``compute_capability``, ``l4t``, ``jetpack``,
    ``tensorrt`` (the Debian package), ``tensorrt_in_python``, ``power_mode``, ``power_modes`` (name → number),
    ``clocks_locked`` (as ``jetson_clocks`` does), ``gpu_hz`` (min, max, now), ``temperatures_c``, ``throttled`` (what
    holds the clocks down now), ``over_current`` (events since boot), ``memory_bytes``, ``memory_free_bytes``,
    ``read_from``.
    """
    facts = _from_files(root)
    if facts is None:
        return None
    for name, value in _from_service(root).items():
        # jtop calls the clocks locked, too, when it found no clock to look at; the files tell the two apart
        if value not in (None, {}) and (name != "clocks_locked" or facts[name] is None):
            facts[name] = value
    return facts


def advice(facts: Mapping[str, Any], precision: str | None = None) -> list[dict[str, str]]:
    """What stands in the way of the best speed, or of a build: ``problem`` and ``fix`` of each.

    Args:
        facts: of ``read``.
        precision: that an engine is to be built in, such as ``"fp8"``.
    """
    checks = (_power, _clocks, _memory, _throttling, _over_current, _bindings)
    found = [(problem, fix) for check in checks for problem, fix in check(facts)]
    found += _precision(facts, precision or "")
    return [{"problem": problem, "fix": fix} for problem, fix in found]


def read_text(path: Path) -> str:
    """The text of a file of ``/proc``, ``/sys`` or ``/etc`` without closing zero bytes; empty if it cannot be read."""
    try:
        # a thermal zone whose sensor sleeps answers EAGAIN, for which Python reads None
        return (path.read_bytes() or b"").decode(errors="replace").strip("\0\n ")
    except OSError:
        return ""


def parse_release(text: str) -> str | None:
    """L4T's version in ``/etc/nv_tegra_release``: ``# R36 (release), REVISION: 4.3, …`` is 36.4.3."""
    found = re.search(r"R(\d+) \(release\), REVISION: ([\d.]+)", text)
    return f"{found.group(1)}.{found.group(2)}" if found else None


def parse_packages(status: str) -> dict[str, str]:
    """Installed package → version, of the text of ``/var/lib/dpkg/status``."""
    stanzas = (dict(re.findall(r"^([\w-]+): (.*)$", stanza, re.MULTILINE)) for stanza in status.split("\n\n"))
    return {s["Package"]: s["Version"] for s in stanzas if s.get("Status") == "install ok installed"}


def parse_power_modes(conf: str) -> dict[str, int]:
    """Name → number, of the lines ``< POWER_MODEL ID=2 NAME=MAXN_SUPER >`` of ``/etc/nvpmodel.conf``."""
    lines = re.findall(r"^< *POWER_MODEL ID=(\d+) NAME=(\S+)", conf, re.MULTILINE)
    return {name: int(number) for number, name in lines}


def parse_power_mode(status: str, modes: Mapping[str, int]) -> str | None:
    """The name of the mode in ``/var/lib/nvpmodel/status``: ``pmode:0002 fmode:quiet``."""
    found = re.search(r"pmode:(\d+)", status)
    return next((name for name, number in modes.items() if found and number == int(found.group(1))), None)


def best_power_mode(modes: Mapping[str, int]) -> str | None:
    """MAXN_SUPER, or MAXN, or the mode of most watts; not by number: 2 is MAXN_SUPER and 3 is 7W on an Orin Nano."""

    def rank(name: str) -> tuple[bool, bool, int]:
        watts = re.search(r"(\d+)W", name)
        return "MAXN" in name, "SUPER" in name, int(watts.group(1)) if watts else 0

    return max(modes, key=rank, default=None)


def parse_memory(meminfo: str) -> tuple[int | None, int | None]:
    """Total and available bytes, of the text of ``/proc/meminfo``."""
    kib = {name: int(value) for name, value in re.findall(r"^(\w+): +(\d+) kB", meminfo, re.MULTILINE)}
    total, available = (kib[name] * 1024 if name in kib else None for name in ("MemTotal", "MemAvailable"))
    return total, available


def temperatures(thermal: Path) -> dict[str, float]:
    """Sensor → °C, of ``/sys/class/thermal``; a sensor that sleeps is left out."""
    found = {}
    for zone in sorted(thermal.glob("thermal_zone*"), key=_number):
        name, value = read_text(zone / "type").removesuffix("-thermal"), _integer(zone / "temp")
        if name and value is not None and value > -100_000:  # -256 °C stands for no sensor
            found[name] = value / 1000
    return found


def throttled(thermal: Path) -> list[str]:
    """Cooling devices of ``/sys/class/thermal`` that hold a clock down now; the fan is none of them."""
    pattern = re.compile(r".*-throttle-alert|(cpufreq|devfreq)-.*")
    devices = sorted(thermal.glob("cooling_device*"), key=_number)
    names = ((read_text(device / "type"), _integer(device / "cur_state")) for device in devices)
    return [name for name, state in names if state and pattern.fullmatch(name)]


def over_current(hwmon: Path) -> dict[str, int]:
    """Events since boot by ``/sys/class/hwmon/*/oc*_event_cnt``: oc1 is under-voltage, oc2 the average current, oc3 the
    instantaneous one (Jetson Orin).
    """
    found = ((path.name.partition("_")[0], _integer(path)) for path in sorted(hwmon.glob("*/oc*_event_cnt")))
    return {name: count for name, count in found if count is not None}


def gpu_hz(devfreq: Path) -> dict[str, int] | None:
    """``min``, ``max`` and ``now`` of the GPU in ``/sys/class/devfreq``: 17000000.gpu (.ga10b until JetPack 5) on Orin,
    gpu-gpc-0 on Thor.
    """
    for gpu in sorted(devfreq.glob("*")):
        if re.fullmatch(r"\w+\.(gpu|ga10b|gv11b)|gpu-gpc-0", gpu.name):
            values = {name: _integer(gpu / file) for name, file in GPU_FILES.items()}
            return {name: value for name, value in values.items() if value is not None} or None
    return None


def clocks_locked(gpu: Mapping[str, int] | None, cpus: Path) -> bool | None:
    """Whether GPU and every online core of ``/sys/devices/system/cpu`` have their least clock at the greatest, as
    ``jetson_clocks`` sets them; None if no clock can be read.
    """
    ranges = [(gpu.get("min"), gpu.get("max"))] if gpu else []
    for cpu in cpus.glob("cpu[0-9]*"):
        if read_text(cpu / "online") != "0":
            folder = cpu / "cpufreq"
            ranges.append((_integer(folder / "scaling_min_freq"), _integer(folder / "scaling_max_freq")))
    known = [(low, high) for low, high in ranges if low is not None and high is not None]
    return all(low == high for low, high in known) if known else None


def from_jtop(board: Any) -> dict[str, Any]:
    """The facts of an open client of jetson-stats; boards and its versions (4 to 7) differ in what they have."""

    def get(fact: Callable[[], Any]) -> Any:
        try:
            return fact()
        except Exception:  # absent on this board, or its name changed: any error means that it is not known
            return None

    hardware = get(lambda: dict(board.board["hardware"])) or {}
    names = {"board": "Model", "module": "Module", "compute_capability": "CUDA Arch BIN", "l4t": "L4T"}
    return {
        **{name: str(hardware.get(key) or "").strip() or None for name, key in names.items()},
        "jetpack": get(lambda: re.match(r"[\d.]+", hardware["Jetpack"]).group()),  # type: ignore[union-attr]
        "power_mode": get(lambda: str(board.nvpmodel.name)),
        "clocks_locked": get(lambda: board.jetson_clocks.status == "running"),
        "temperatures_c": get(
            lambda: {name: float(s["temp"]) for name, s in board.temperature.items() if s.get("online", True)}
        ),
    }


def _from_files(root: Path) -> dict[str, Any] | None:
    etc, proc, sys = root / "etc", root / "proc", root / "sys"
    l4t = parse_release(read_text(etc / "nv_tegra_release"))
    chip = re.search(r"tegra\d+", read_text(proc / "device-tree/compatible"))
    if not l4t and not chip:
        return None
    family, capability = FAMILIES.get(chip.group() if chip else "", (None, None))
    packages = parse_packages(read_text(root / "var/lib/dpkg/status"))
    modes = parse_power_modes(read_text(etc / "nvpmodel.conf"))
    memory, free = parse_memory(read_text(proc / "meminfo"))
    gpu = gpu_hz(sys / "class/devfreq")
    return {
        "board": read_text(proc / "device-tree/model") or None,
        "module": None,
        "family": family,
        "compute_capability": capability,
        "l4t": l4t,
        "jetpack": _jetpack(packages, l4t),
        "tensorrt": next((packages[n] for n in ("libnvinfer10", "libnvinfer8") if n in packages), None),
        "tensorrt_in_python": find_spec("tensorrt") is not None,
        "power_mode": parse_power_mode(read_text(root / "var/lib/nvpmodel/status"), modes) or _query_power_mode(),
        "power_modes": modes or None,
        "clocks_locked": clocks_locked(gpu, sys / "devices/system/cpu"),
        "gpu_hz": gpu,
        "temperatures_c": temperatures(sys / "class/thermal") or None,
        "throttled": throttled(sys / "class/thermal"),
        "over_current": over_current(sys / "class/hwmon") or None,
        "memory_bytes": memory,
        "memory_free_bytes": free,
        "read_from": "files",
    }


def _from_service(root: Path) -> dict[str, Any]:
    """The facts of jetson-stats; none where it is not installed or not running."""
    if not (root / JTOP_SOCKET).exists() or find_spec("jtop") is None:
        return {}
    try:
        with import_module("jtop").jtop() as board:
            return from_jtop(board) | {"read_from": f"jetson-stats {metadata.version('jetson-stats')} and files"}
    except Exception:  # the service is down, hangs, refuses this user or has another version: the files remain
        return {}


def _jetpack(packages: Mapping[str, str], l4t: str | None) -> str | None:
    """By the package nvidia-jetpack (6.2+b77, 7.2.1-b49), which a lean board lacks, or by L4T."""
    if found := re.match(r"[\d.]+", packages.get("nvidia-jetpack", "")):
        return found.group()
    return JETPACKS.get(l4t or "") or SERIES.get(int((l4t or "0").partition(".")[0]))


def _query_power_mode() -> str | None:
    """By ``nvpmodel -q``, where its files say nothing: it has not been set since the board was flashed."""
    if not shutil.which("nvpmodel"):
        return None
    try:
        text = subprocess.run(["nvpmodel", "-q"], capture_output=True, text=True, timeout=5).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r"NV Power Mode: (\S+)", text)
    return found.group(1) if found else None


def _power(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    mode, modes = facts["power_mode"], facts["power_modes"]
    best = best_power_mode(modes or {})
    if mode and best and mode != best:
        yield f"power mode {mode} is below {best}", f"run: sudo nvpmodel -m {modes[best]}"
    elif mode and not best and "MAXN" not in mode:
        fix = "choose MAXN, or the mode of most watts, of those that sudo nvpmodel -p --verbose lists"
        yield f"power mode {mode} is below MAXN", fix


def _clocks(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if facts["clocks_locked"] is False:
        yield "the clocks follow the load (jetson_clocks is off), so times vary", "run: sudo jetson_clocks"


def _memory(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    total, free = facts["memory_bytes"], facts["memory_free_bytes"]
    if total and free is not None and total < SMALL_MODULE_BYTES and free < BUILD_BYTES:
        problem = f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB are free: TensorRT's builder may run out of memory"
        desktop = "stop the desktop (sudo systemctl isolate multi-user.target) and other programs"
        yield problem, f"before building, {desktop}, or give --option tensorrt.workspace_mib=1024"


def _throttling(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if facts["throttled"]:
        hottest = max((facts["temperatures_c"] or {}).values(), default=None)
        heat = f" at {hottest:.0f} °C" if hottest is not None else ""
        fix = "cool the board (sudo jetson_clocks --fan turns the fan up) and measure again"
        yield f"the board throttles{heat}: {', '.join(facts['throttled'])}", fix


def _over_current(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    counts = [f"{name} {count}" for name, count in (facts["over_current"] or {}).items() if count]
    if counts:
        problem = (
            f"over-current events since boot ({', '.join(counts)}), each of which held the clocks down for a moment"
        )
        yield problem, "if they go on, use a supply of more current or a lower power mode"


def _bindings(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if not facts["tensorrt_in_python"]:
        found = facts["tensorrt"]
        problem = f"Python does not see JetPack's TensorRT {found}" if found else "JetPack's TensorRT is not installed"
        yield problem, "run deploy/jetson/install.sh: the bindings are of apt (python3-libnvinfer), not of pip"


def _precision(facts: Mapping[str, Any], precision: str) -> Iterator[tuple[str, str]]:
    if supports(facts, precision) is False:
        gpu = f"{facts['family'] or 'this GPU'} (compute capability {facts['compute_capability']})"
        yield f"{precision.upper()} was asked for, and {gpu} does not compute in it", "use int8 or fp16"


def _integer(path: Path) -> int | None:
    text = read_text(path)
    return int(text) if re.fullmatch(r"-?\d+", text) else None


def _number(path: Path) -> int:
    return int(re.sub(r"\D", "", path.name) or 0)
