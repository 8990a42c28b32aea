"""Files and a driver library as devices have them; the machine against what the system says by other means."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rpfm_edge.measure import device_state
from rpfm_edge.measure.device_state import around, energy, frames_per_joule, read, throttling
from tests.jetson_samples import write, write_orin


class NVMLError(Exception):
    pass


class Nvml(SimpleNamespace):
    """The calls of nvidia-ml-py that are used, for one GPU; what is not given raises, as on a GPU that lacks it."""

    def __init__(self, **answers: Any) -> None:
        super().__init__(NVMLError=NVMLError, answers=answers, open=0)

    def nvmlInit(self) -> None:
        if not self.answers:
            raise NVMLError("NVML Shared Library Not Found")
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def __getattr__(self, name: str) -> Any:
        def ask(*_: Any) -> Any:
            if name not in self.answers:
                raise NVMLError("Not Supported")
            return self.answers[name]

        return ask


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Any:
    def install(**answers: Any) -> Nvml:
        library = Nvml(**answers)
        library.__spec__ = SimpleNamespace(name="pynvml")  # what find_spec looks at
        monkeypatch.setitem(sys.modules, "pynvml", library)  # type: ignore[arg-type]
        return library

    return install


H100 = {
    "nvmlDeviceGetCount": 1,
    "nvmlDeviceGetHandleByIndex": object(),
    "nvmlDeviceGetName": "NVIDIA H100",
    "nvmlDeviceGetClockInfo": 1410,
    "nvmlDeviceGetPowerUsage": 402_500,
    "nvmlDeviceGetTotalEnergyConsumption": 9_000,
    "nvmlDeviceGetTemperature": 71,
    "nvmlDeviceGetCurrentClocksThrottleReasons": 0x20 | 0x04 | 0x01,
}


def state(time_s: float = 0, **facts: Any) -> dict[str, Any]:
    cpu = {"throttle_events": facts.pop("events", None)}
    return {"time_s": time_s, "cpu": cpu, "gpus": [], "jetson": None, "power_w": {}, "energy_j": {}} | facts


def test_this_machine() -> None:
    found = read()
    assert found["cpu"]["load_average"] == pytest.approx(os.getloadavg()[0], abs=1)
    mhz = [float(x.split(":")[1]) for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("cpu MHz")]
    if mhz:
        assert 0.2e6 * max(mhz) < found["cpu"]["frequency_hz"] < 5e6 * max(mhz)
    assert json.loads(json.dumps(found)) == found


def test_without_psutil_the_load_remains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_state, "find_spec", lambda name: None)
    found = read()["cpu"]
    assert found["load_average"] is not None
    assert found["frequency_hz"] is None


def test_a_gpu(nvml: Any) -> None:
    library = nvml(**H100)
    found = read()
    (gpu,) = found["gpus"]
    assert gpu["clock_hz"] == 1_410e6
    assert (gpu["temperature_c"], gpu["power_limit_w"], gpu["utilisation"]) == (71, None, None)
    assert gpu["throttled"] == ["power cap", "software thermal slowdown"]  # idle is no throttling
    assert found["power_w"] == {"GPU 0": 402.5}
    assert found["energy_j"] == {"GPU 0": 9.0}
    assert throttling(found, found) == ["NVIDIA H100: power cap", "NVIDIA H100: software thermal slowdown"]
    assert library.open == 0


def test_no_driver_is_no_gpu(nvml: Any) -> None:
    nvml()
    assert read()["gpus"] == []


def test_a_jetson_has_the_power_of_its_board(tmp_path: Path) -> None:
    sensor = "sys/class/hwmon/hwmon1"
    rails = {"in1_label": "VDD_IN", "in1_input": 5000, "curr1_input": 1400}
    rails |= {"in2_label": "VDD_CPU_GPU_CV", "in2_input": 5000, "curr2_input": 600, "name": "ina3221"}
    write(write_orin(tmp_path), {f"{sensor}/{name}": value for name, value in rails.items()})
    write(tmp_path, {"sys/class/hwmon/hwmon2/name": "nvme", "sys/class/hwmon/hwmon2/in1_label": "other"})
    found = read(tmp_path)
    assert found["power_w"] == pytest.approx({"VDD_IN": 7.0})  # not 10: the other rail is a part of it
    assert found["jetson"]["power_mode"] == "25W"
    (tmp_path / sensor / "in1_label").write_text("VDD_GPU_SOC")
    assert read(tmp_path)["power_w"] == pytest.approx({"VDD_GPU_SOC": 7.0, "VDD_CPU_GPU_CV": 3.0})


def test_a_package_counter_and_its_throttling(tmp_path: Path) -> None:
    cpus = "sys/devices/system/cpu/cpu{}/thermal_throttle/package_throttle_count"
    files: dict[str, str | int] = {cpus.format(k): 7 for k in range(4)}
    rapl = {"intel-rapl:0/name": "package-0", "intel-rapl:0/energy_uj": 2_500_000, "intel-rapl:0:0/name": "core"}
    write(tmp_path, files | {f"sys/class/powercap/{name}": value for name, value in rapl.items()})
    found = read(tmp_path)
    assert found["energy_j"] == {"CPU package 0": 2.5}
    assert found["cpu"]["throttle_events"] == 7
    assert throttling(state(events=5), state(events=7)) == ["CPU: 2 throttle events"]
    assert throttling(state(events=7), state(events=7)) == []


def test_throttling_of_a_jetson() -> None:
    before = state(jetson={"throttled": [], "over_current": {"oc1": 2, "oc3": 0}})
    after = state(jetson={"throttled": ["cpu-throttle-alert"], "over_current": {"oc1": 2, "oc3": 1}})
    assert throttling(before, after) == ["Jetson: cpu-throttle-alert", "Jetson: over-current oc3"]


def test_energy_of_a_counter_and_of_readings() -> None:
    counted = [state(0, energy_j={"CPU": 10.0}), state(4, energy_j={"CPU": 90.0})]
    assert energy(counted) == {"CPU": {"joules": 80.0, "how": "counter"}}
    # 10 W rising to 30 W within 4 s: the area below the line
    readings = [state(t, power_w={"VDD_IN": 10 + 5.0 * t}) for t in (0, 1, 4)]
    assert energy(readings)["VDD_IN"]["joules"] == pytest.approx(80)
    assert frames_per_joule(160, readings) == pytest.approx({"VDD_IN": 2.0})
    assert energy([state(0, energy_j={"CPU": 90.0}), state(4, energy_j={"CPU": 1.0})]) == {}
    assert frames_per_joule(100, [state(0), state(9)]) == {}


def test_what_a_result_keeps() -> None:
    before = read()
    kept = around(before, frames=10)
    assert kept["before"] == before
    assert kept["after"]["time_s"] >= before["time_s"]
    assert kept["throttling"] == throttling(before, kept["after"])
