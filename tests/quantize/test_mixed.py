"""Graphs with some units in INT8, as a plan writes them: run by ONNX Runtime against the float graph."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import onnxruntime
import pytest

from quantize import calibrate, mixed
from quantize.layers import load
from quantize.ranges import observe
from quantize.typed import FOLDER as TYPED
from quantize.units import units
from rpfm_edge.core.artifact import Artifact
from rpfm_edge.measure.metrics import psnr_db

Kind = Literal["signed", "unsigned"]


def picture(path: Path, feeds: dict[str, np.ndarray]) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, feeds)[0])


@pytest.mark.parametrize("kind", ["signed", "unsigned"])
def test_some_units_in_int8_keep_the_picture(tiny_graph: Artifact, samples: Path, tmp_path: Path, kind: Kind) -> None:
    stored, ranges, names = calibrate.load(samples), {}, {}
    for graph in ("prepare", "frame"):
        model = load(tiny_graph.file(f"{graph}.onnx"))
        feeds = list(islice(stored.feeds(graph), 8))
        ranges[graph] = {name: seen.range("mse") for name, seen in observe(model, feeds, len(feeds)).items()}
        names[graph] = tuple(unit.name for unit in units(model))[:2]
    made = mixed.write(tiny_graph, mixed.Assignment(names, activations=kind), ranges, tmp_path / "out", {})
    [feed] = islice(stored.feeds("frame"), 1)
    float_picture = picture(tiny_graph.file("frame.onnx"), feed)
    files = [made.path / "frame.onnx"] + ([made.path / TYPED / "frame.onnx"] if kind == "signed" else [])
    for file in files:
        operators = [node.op_type for node in onnx.load(file).graph.node]
        assert "QuantizeLinear" in operators
        assert not np.array_equal(picture(file, feed), float_picture)
        assert psnr_db(picture(file, feed)[0], float_picture[0]) > 30
    assert (made.path / TYPED).exists() == (kind == "signed")
    planned = made.config["plan"]["frame"]
    assert [unit for unit, precision in planned.items() if precision == "int8"] == list(names["frame"])
