"""Effects of units: against a comparison by hand, and continued where they stopped."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from quantize import calibrate
from quantize.layers import heads
from quantize.qdq import insert
from quantize.ranges import observe
from quantize.sensitivity import Effect, Probe, compared, sensitivity, watched
from quantize.units import units
from rpfm_edge.core.artifact import Artifact
from rpfm_edge.core.errors import ArtifactError
from rpfm_edge.core.signature import Feeds
from rpfm_edge.measure.metrics import psnr_db
from tests.conftest import TINY_STEPS


@pytest.fixture(scope="module")
def frame(tiny_graph: Artifact) -> onnx.ModelProto:
    return onnx.load(tiny_graph.file("frame.onnx"))


@pytest.fixture(scope="module")
def feeds(samples: Path) -> list[Feeds]:
    return list(islice(calibrate.load(samples).feeds("frame"), 4))


@pytest.fixture(scope="module")
def ranges(frame: onnx.ModelProto, feeds: list[Feeds]) -> dict[str, float]:
    return {name: one.range("minmax") for name, one in observe(frame, feeds, len(feeds)).items()}


def test_the_picture_and_a_velocity_for_every_step_are_watched(frame: onnx.ModelProto, feeds: list[Feeds]) -> None:
    model = watched(frame)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    picture, *velocities = session.run(None, dict(feeds[0]))
    exact = onnxruntime.InferenceSession(frame.SerializeToString(), providers=["CPUExecutionProvider"])
    image = exact.run(None, dict(feeds[0]))[0]
    np.testing.assert_array_equal(np.clip(np.round(picture), 0, 255).astype(np.uint8), image)
    noise = feeds[0]["noise"]
    assert [velocity.size for velocity in velocities] == [noise.size] * TINY_STEPS


def test_a_prepare_graph_has_no_velocity_and_no_picture(tiny_graph: Artifact) -> None:
    prepare = onnx.load(tiny_graph.file("prepare.onnx"))
    assert heads(prepare) == ()
    with pytest.raises(ArtifactError, match="rounds no picture"):
        watched(prepare)


def test_effects_are_the_errors_of_the_pictures(
    frame: onnx.ModelProto, feeds: list[Feeds], ranges: dict[str, float]
) -> None:
    products = [product for unit in units(frame) for product in unit.products]
    ranges = {name: 4 * value for name, value in ranges.items()}  # errors beyond those of rounding to grey levels
    effect = Probe(frame, feeds).effect("all", products, ranges, "signed")
    sessions = [
        onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        for model in (frame, insert(frame, products, ranges))
    ]
    images = [np.concatenate([session.run(None, dict(one))[0][0] for one in feeds]) for session in sessions]
    assert effect.psnr_db == pytest.approx(psnr_db(*images), abs=1)
    assert len(effect.sqnr_db) == TINY_STEPS
    assert all(0 < value < 100 for value in effect.sqnr_db)


def test_the_decoder_has_no_effect_on_velocities(
    frame: onnx.ModelProto, feeds: list[Feeds], ranges: dict[str, float]
) -> None:
    unit = next(unit for unit in units(frame) if unit.name == "decoder.conv2")
    effect = Probe(frame, feeds).effect(unit.name, unit.products, ranges, "signed")
    assert effect.mse > 0
    assert set(effect.sqnr_db) == {float("inf")}


def test_sqnr_and_mse_of_known_outputs() -> None:
    reference = [[np.full((2, 2), 100.0), np.array([3.0, 4.0])]]
    shifted = [[np.full((2, 2), 102.0), np.array([3.0, 4.5])]]
    effect = compared(reference, shifted, "x")
    assert effect.mse == 4
    assert effect.sqnr_db == (pytest.approx(20.0),)
    assert Effect("x", 0.0, ()).psnr_db == float("inf")


def test_finished_units_are_not_measured_again(
    frame: onnx.ModelProto, feeds: list[Feeds], ranges: dict[str, float], tmp_path: Path
) -> None:
    some, work, probe = units(frame)[:3], tmp_path / "units.json", Probe(frame, feeds)
    first = sensitivity(probe, some[:2], ranges, "signed", work)
    rows = json.loads(work.read_text())
    rows[0]["mse"] = 12345.0  # a mark that only a reader of the file can know
    work.write_text(json.dumps(rows))
    again = sensitivity(probe, some, ranges, "signed", work)
    assert [effect.mse for effect in again[:2]] == [12345.0, first[1].mse]
    assert len(json.loads(work.read_text())) == 3
    work.write_text("{")
    assert sensitivity(probe, some[:2], ranges, "signed", work) == first
