"""Layer times of a TensorRT engine by its own profiler, which waits for each frame. Untested on a GPU."""

from __future__ import annotations

import json
import re
from typing import Any

from rpfm_edge.core.runtime import LayerTime
from rpfm_edge.core.signature import Feeds
from runtimes import profiling
from runtimes.trt.api import Library
from runtimes.trt.run import TensorRTSession

METADATA = re.compile(r"\[ONNX Layer: ([^\]]+)\]")  # how the parser marks what it made from a node
NO_NODE = ("CopyNode", "ForeignNode[", "__my")  # a copy that TensorRT added; a fused part that names a range, or none


def layer_times(library: Library, session: TensorRTSession, feeds: Feeds, runs: int) -> list[LayerTime]:
    """Every layer of an engine that was opened without a CUDA graph, whose launch would be all that is timed."""
    trt, reports = library.module, list[tuple[str, float]]()

    class Profiler(trt.IProfiler):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)  # TensorRT's classes refuse super()

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            reports.append((layer_name, ms / 1e3))

    engine = session.observe(Profiler())
    for _ in range(profiling.WARM_UP + runs):
        session.run(feeds)
    known = _described(library, engine)
    entries = ((layer, *_told(layer, known.get(layer, {})), seconds) for layer, seconds in reports)
    return profiling.medians(entries)


def _described(library: Library, engine: Any) -> dict[str, dict[str, Any]]:
    """What the engine says about its layers, by name: nothing unless it was built with detailed verbosity."""
    trt = library.module
    text = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    layers = json.loads(text or "{}").get("Layers", [])
    return {layer["Name"]: layer for layer in layers if isinstance(layer, dict)}


def _told(layer: str, described: dict[str, Any]) -> tuple[tuple[str, ...], str]:
    """ONNX nodes and kind of a layer: its metadata, or else its name, "/conv1/Conv + PWN(/Relu)"."""
    kind = str(described.get("TacticName") or described.get("LayerType") or layer)
    if marked := METADATA.findall(str(described.get("Metadata", ""))):
        return tuple(dict.fromkeys(marked)), kind
    parts = [part.removeprefix("PWN(").removesuffix(")") for part in layer.split(" + ")]
    return tuple(part for part in parts if not any(mark in part for mark in NO_NODE)), kind
