"""What the quantization of one unit alone does to a frame: to the velocity of every step, and to the picture."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import onnx

from quantize.execute import Graph
from quantize.layers import heads
from quantize.qdq import insert
from quantize.units import Unit
from rpfm_edge.core.errors import ArtifactError
from rpfm_edge.core.files import write_text
from rpfm_edge.core.progress import progress
from rpfm_edge.core.signature import Feeds
from rpfm_edge.measure.metrics import sqnr_db

ROUNDING = ("Cast", "Clip", "Round")  # what follows the picture in floats
GREY = 255.0


@dataclass(frozen=True, slots=True)
class Effect:
    """``mse``: mean squared error of the picture in grey levels, before it is rounded; ``sqnr_db``: signal to
    quantization noise of the velocity, step by step (empty where the graph shows none)."""

    name: str
    mse: float
    sqnr_db: tuple[float, ...]

    @property
    def psnr_db(self) -> float:
        """Of the picture; inf for no error."""
        return 10 * float(np.log10(GREY**2 / self.mse)) if self.mse else float("inf")


def watched(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of a frame that gives the picture before it is rounded and the velocities (``layers.heads``) instead."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    maker = {output: node for node in copy.graph.node for output in node.output}
    picture = copy.graph.output[0].name
    while maker[picture].op_type in ROUNDING:
        picture = maker[picture].input[0]
    if picture == copy.graph.output[0].name:
        raise ArtifactError("the frame rounds no picture", expected="a picture in uint8", fix="export it again")
    found = heads(model)
    known = {value.name: value for value in onnx.shape_inference.infer_shapes(copy).graph.value_info}
    del copy.graph.output[:]
    copy.graph.output.extend(known[name] for name in (picture, *found))
    return copy


Outputs = Sequence[np.ndarray]  # of a ``watched`` graph for one sample


def compared(reference: Sequence[Outputs], outputs: Sequence[Outputs], name: str) -> Effect:
    """The effect that the outputs of a ``watched`` graph show against those of the float one, over all samples."""
    couples = list(zip(reference, outputs, strict=True))
    mse = np.mean([np.mean((a[0].clip(0, GREY) - b[0].clip(0, GREY)) ** 2) for a, b in couples])
    velocities = range(1, len(reference[0]))
    ratios = (sqnr_db([exact[k] for exact, _ in couples], [found[k] for _, found in couples]) for k in velocities)
    return Effect(name, float(mse), tuple(ratios))


class Probe:
    """A float frame and what it makes of a few samples, to compare its quantized forms with."""

    def __init__(self, frame: onnx.ModelProto, feeds: Sequence[Feeds]) -> None:
        self.frame, self.feeds = watched(frame), feeds
        exact = Graph(self.frame)
        self._reference = [exact.all(sample) for sample in feeds]

    def effect(
        self,
        name: str,
        products: Collection[str],
        ranges: Mapping[str, float],
        activations: Literal["signed", "unsigned"],
        feeds: Sequence[Feeds] | None = None,
    ) -> Effect:
        """Of ``products`` in INT8 (``qdq.insert``), on the probe's samples or on ``feeds``, as many that differ."""
        graph = Graph(insert(self.frame, products, ranges, activations=activations))
        return compared(self._reference, [graph.all(sample) for sample in feeds or self.feeds], name)


def sensitivity(
    probe: Probe,
    units: Sequence[Unit],
    ranges: Mapping[str, float],
    activations: Literal["signed", "unsigned"],
    work: Path,
) -> list[Effect]:
    """The effect of every unit of a frame by itself, all else in float.

    Args:
        probe: with samples of other people than those that gave ``ranges``.
        work: a JSON file in which finished units are kept, and from which they are taken.
    """
    seen = _recorded(work)
    with progress("sensitivity", len(units)) as advance:
        for done, unit in enumerate(units, 1):
            if unit.name not in seen:
                seen[unit.name] = probe.effect(unit.name, unit.products, ranges, activations)
                write_text(work, json.dumps([asdict(effect) for effect in seen.values()]))
            advance(done, unit.name)
    return [seen[unit.name] for unit in units]


def _recorded(work: Path) -> dict[str, Effect]:
    try:
        rows = json.loads(work.read_text(encoding="utf-8"))
        return {row["name"]: Effect(row["name"], row["mse"], tuple(row["sqnr_db"])) for row in rows}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
