"""The benchmark of a frame with a pipeline and a meter that the test drives."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import test_frame as module
from rpfm_edge.measure import device_state


class Benchmark:
    """As pytest-benchmark's fixture: every round calls once, after those that warm up."""

    def __init__(self) -> None:
        self.extra_info: dict[str, Any] = {}
        self.stats = SimpleNamespace(stats=SimpleNamespace(data=[]))

    def pedantic(self, call: Callable[..., object], args: Any, rounds: int, warmup_rounds: int = 0) -> None:
        for _ in range(warmup_rounds + rounds):
            call(*args)
        self.stats.stats.data = [0.01] * rounds


def test_the_energy_is_that_of_the_counted_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each frame costs 2 J, so that half a frame is made per joule, whatever ran before the reading."""
    rendered: list[object] = []
    cpu = {"throttle_events": None}

    def read() -> dict[str, Any]:
        known: dict[str, Any] = {"cpu": cpu, "gpus": [], "jetson": None, "power_w": {}}
        return {"time_s": float(len(rendered)), "energy_j": {"package": 2.0 * len(rendered)}, **known}

    pipe = SimpleNamespace(render=lambda person, pose: rendered.append(pose))
    monkeypatch.setattr(device_state, "read", read)
    monkeypatch.setattr(module, "opened", lambda stack, *_: (stack.enter_context(nullcontext(pipe)), None, None))
    monkeypatch.setattr(module, "peak_memory_bytes", lambda *_: 0)
    monkeypatch.setattr(module, "roofline", lambda *_: {})
    case = SimpleNamespace(bundle=Path("bundle"), backend="openvino", precision="fp32", steps=1)
    benchmark = Benchmark()
    module.test_frame(benchmark, case, SimpleNamespace(data="sample", rounds=10), None)  # type: ignore[arg-type]
    assert benchmark.extra_info["state"]["frames_per_joule"] == {"package": pytest.approx(0.5)}
    assert len(rendered) == module.WARMUP + 10
