"""A program for an environment with torch-tensorrt-rtx: builds the engines of a graph artifact where there is no GPU.

TensorRT for RTX builds for a GPU that is not there, but torch-tensorrt asks for one all the same. So what a driver
would answer is answered here, and the engine is not loaded at the end; nothing else of the libraries is changed.

    python build_without_gpu.py GRAPH PRECISION FEEDS OUT

FEEDS/NAME.npz are inputs of graph NAME. Written are OUT/NAME.plan, the engine; OUT/NAME.npz, what the program that was
turned into the network computes from the inputs, in torch; OUT/report.json, what the network holds.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

TARGET = (8, 6)
MEMORY_BYTES = 8 << 30


def answer_for_the_driver() -> None:
    """What torch-tensorrt asks about the GPU, at its import and during a build."""
    properties = SimpleNamespace(name="none", major=TARGET[0], minor=TARGET[1], total_memory=MEMORY_BYTES)
    torch.cuda.get_device_capability = lambda *device: TARGET
    torch.cuda.get_device_properties = lambda *device: properties
    torch.cuda.current_device = lambda: 0
    torch.cuda.mem_get_info = lambda *device: (MEMORY_BYTES, MEMORY_BYTES)
    torch.cuda.synchronize = torch.cuda.empty_cache = lambda *device: None


def build_for_target(feeds: dict[str, np.ndarray], found: dict[str, Any]) -> None:
    """Aim the next build at ``TARGET``, note network and results in ``found``, and keep its engine serialized."""
    from torch_tensorrt.dynamo.conversion import _TRTInterpreter as interpreter

    trt, populate = interpreter.trt, interpreter.TRTInterpreter._populate_trt_builder_config

    def populate_for_target(self: Any, *args: Any, **kwargs: Any) -> Any:
        config = populate(self, *args, **kwargs)
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, "SM{}{}".format(*TARGET)), 0)
        found["network"] = described(self.ctx.net)
        with torch.no_grad():
            found["results"] = self.module(*(torch.from_numpy(value) for value in feeds.values()))
        return config

    class Runtime:
        def __init__(self, logger: Any) -> None: ...

        def deserialize_cuda_engine(self, plan: Any) -> Any:
            return SimpleNamespace(serialize=lambda: plan, get_aliased_input_tensor=lambda name: None)

    interpreter.TRTInterpreter._populate_trt_builder_config = populate_for_target
    interpreter.trt = SimpleNamespace(**{name: getattr(trt, name) for name in dir(trt)} | {"Runtime": Runtime})


def described(network: Any) -> dict[str, Any]:
    """Boundary of a network definition, and its layers by kind and type."""

    def tensor(value: Any) -> list[Any]:
        return [value.name, value.dtype.name, list(value.shape)]

    layers = [network.get_layer(place) for place in range(network.num_layers)]
    return {
        "inputs": [tensor(network.get_input(place)) for place in range(network.num_inputs)],
        "outputs": [tensor(network.get_output(place)) for place in range(network.num_outputs)],
        "layers": Counter(f"{layer.type.name} {layer.get_output(0).dtype.name}" for layer in layers),
    }


def main(graph: Path, precision: str, feeds: Path, out: Path) -> None:
    """Build both graphs as the backend does."""
    answer_for_the_driver()
    from rpfm_edge.core import artifact
    from runtimes import torch_trt

    torch_trt.library()
    loaded, report, found = artifact.load(graph, "graph"), {}, {}
    kept: dict[str, np.ndarray] = {}
    build_for_target(kept, found)
    for name, signature in loaded.signatures.items():
        given = np.load(feeds / f"{name}.npz")
        kept.clear()
        kept |= {spec.name: given[spec.name] for spec in signature.inputs}
        started = time.perf_counter()
        plan = torch_trt.compile_plan(loaded, name, torch_trt.checked_options({"precision": precision}))
        report[name] = {**found["network"], "seconds": time.perf_counter() - started, "bytes": len(plan)}
        (out / f"{name}.plan").write_bytes(plan)
        results = {spec.name: value.numpy() for spec, value in zip(signature.outputs, found["results"], strict=True)}
        np.savez(out / f"{name}.npz", **results)
    (out / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))
