"""Files of Jetsons. No board is at hand: they have the form that boards were seen to write.

- ``/etc/nv_tegra_release``, clocks and temperatures of an Orin Nano 8 GB with JetPack 6.2: its values of
  ``jetson_clocks --show`` and ``/sys/class/thermal`` in 25W, published with a preflight report of that board.
- ``/etc/nvpmodel.conf``, ``/var/lib/nvpmodel/status``, ``nvpmodel -q``: as NVIDIA's tool writes them.
- Thor with JetPack 7.0: clocks of ``jetson_clocks --show`` in MAXN, and cooling devices of a board at 109 °C.
- ``/proc/device-tree/compatible``: the bindings of the Linux kernel (arm/tegra.yaml).
- jetson-stats: attributes of ``jtop`` as in the sources of 4.3.2 and 7.2.2.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

RELEASE = "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64, DATE: Wed Jan  8 2025\n"
CONF = """# nvpmodel.conf
< PARAM TYPE=FILE NAME=CPU_ONLINE >
< PM_CONFIG DEFAULT=1 >
< POWER_MODEL ID=0 NAME=15W >
CPU_ONLINE CORE_0 1
< POWER_MODEL ID=1 NAME=25W >
< POWER_MODEL ID=2 NAME=MAXN_SUPER >
< POWER_MODEL ID=3 NAME=7W >
"""
DPKG = """Package: libnvinfer10
Status: install ok installed
Description: TensorRT runtime libraries
 Package: of another line
Version: 10.3.0.30-1+cuda12.5

Package: nvidia-jetpack
Status: install ok installed
Version: 6.2+b77

Package: libnvinfer8
Status: deinstall ok config-files
Version: 8.6.2.3-1+cuda12.2
"""
MEMORY = (
    "MemTotal:        7802596 kB\nMemFree:          403156 kB\nMemAvailable:    3250585 kB\nHugepagesize:    2048 kB\n"
)
ORIN = "nvidia,p3768-0000+p3767-0005\0nvidia,p3767-0005\0nvidia,tegra234\0"
THOR = "nvidia,p4071-0000+p3834-0008\0nvidia,p3834-0008\0nvidia,tegra264\0"


def write(root: Path, files: dict[str, str | int]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(str(content))
    return root


def cores(count: int, low: int, high: int) -> dict[str, str | int]:
    folder = "sys/devices/system/cpu/cpu{}/cpufreq/scaling_{}_freq"
    return {folder.format(i, end): value for i in range(count) for end, value in (("min", low), ("max", high))}


def write_orin(root: Path) -> Path:
    """The files of an Orin Nano 8 GB in 25W, a browser open, no jetson_clocks."""
    zones = {0: ("cpu", 49468), 1: ("gpu", 50125), 5: ("soc0", 50031), 8: ("tj", 50531), 10: ("iwlwifi", -256000)}
    thermal: dict[str, str | int] = {}
    for number, (name, value) in zones.items():
        thermal |= {f"sys/class/thermal/thermal_zone{number}/type": f"{name}-thermal\n"}
        thermal |= {f"sys/class/thermal/thermal_zone{number}/temp": f"{value}\n"}
    files = {
        "etc/nv_tegra_release": RELEASE + "# KERNEL_VARIANT: oot\nTARGET_USERSPACE_LIB_DIR=nvidia\n",
        "etc/nvpmodel.conf": CONF,
        "var/lib/nvpmodel/status": "pmode:0001 fmode:quiet\n",
        "var/lib/dpkg/status": DPKG,
        "proc/device-tree/model": "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super\0",
        "proc/device-tree/compatible": ORIN,
        "proc/meminfo": MEMORY,
        "sys/class/devfreq/15340000.vic/min_freq": 115200000,
        "sys/class/devfreq/17000000.gpu/min_freq": "306000000\n",
        "sys/class/devfreq/17000000.gpu/max_freq": "918000000\n",
        "sys/class/devfreq/17000000.gpu/cur_freq": "306000000\n",
        "sys/class/thermal/cooling_device0/type": "pwm-fan\n",
        "sys/class/thermal/cooling_device0/cur_state": 3,
        "sys/class/thermal/cooling_device1/type": "gpu-throttle-alert\n",
        "sys/class/thermal/cooling_device1/cur_state": 0,
        "sys/class/hwmon/hwmon3/name": "soctherm_oc\n",
        **{f"sys/class/hwmon/hwmon3/oc{i}_event_cnt": 0 for i in (1, 2, 3)},
        **cores(6, 729600, 1344000),
    }
    return write(root, files | thermal)


def write_thor(root: Path) -> Path:
    """The files of an AGX Thor in MAXN with jetson_clocks, too hot."""
    devices = ("cpufreq-cpu0", 0), ("pwm-fan", 4), ("gpu-throttle-alert", 1), ("devfreq-gpu-gpc-0", 18)
    cooling: dict[str, str | int] = {}
    for number, (name, state) in zip((1, 7, 9, 12), devices, strict=True):
        folder = f"sys/class/thermal/cooling_device{number}"
        cooling |= {f"{folder}/type": name, f"{folder}/cur_state": state}
    clocks = {f"sys/class/devfreq/gpu-gpc-0/{end}_freq": 1575000000 for end in ("min", "max", "cur")}
    files = {
        "etc/nv_tegra_release": "# R38 (release), REVISION: 2.2, GCID: 42205042, BOARD: generic, EABI: aarch64\n",
        "etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=MAXN >\n< POWER_MODEL ID=1 NAME=120W >\n",
        "var/lib/nvpmodel/status": "pmode:0000",
        "proc/device-tree/compatible": THOR,
        "proc/meminfo": "MemTotal:       128825804 kB\nMemAvailable:   2000000 kB\n",
        "sys/class/devfreq/gpu-nvd-0/min_freq": 1692000000,
        "sys/class/thermal/thermal_zone0/type": "tj-thermal",
        "sys/class/thermal/thermal_zone0/temp": 109000,
        **clocks,
        **cores(14, 2601000, 2601000),
    }
    return write(root, files | cooling)


class Board:
    """What an open ``jtop`` offers; an attribute that is not given raises, as those of absent hardware do."""

    def __init__(self, **attributes: Any) -> None:
        self.__dict__ |= attributes


FULL = {
    "board": {
        "platform": {},
        "hardware": {
            "Model": "NVIDIA Jetson Orin Nano Developer Kit",
            "Module": "NVIDIA Jetson Orin Nano (8GB ram)",
            "SoC": "tegra234",
            "CUDA Arch BIN": "8.7",
            "Serial Number": "1421234567890",
            "L4T": "36.4.0",
            "Jetpack": "6.1 (rev1)",
        },
    },
    "nvpmodel": SimpleNamespace(name="MAXN_SUPER", id=2),
    "jetson_clocks": SimpleNamespace(status="running"),
    "temperature": {
        "cpu": {"temp": 51.5, "online": True},
        "cv0": {"temp": -256, "online": False},
        "nvme Composite": {"temp": 40.85, "max": 81.8, "crit": 84.8, "online": True},
    },
}
