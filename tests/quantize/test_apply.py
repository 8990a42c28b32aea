"""Graph artifacts in another precision: what they keep, what they leave behind, and what is refused."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import runtimes
from quantize import apply, calibrate
from quantize.execute import Graph
from quantize.int8 import Int8Config
from rpfm_edge.core import artifact
from rpfm_edge.core.artifact import Artifact
from rpfm_edge.core.errors import ArtifactError, BackendError, ConfigError, ParityError
from rpfm_edge.core.files import file_digest
from rpfm_edge.core.precisions import ROWS
from rpfm_edge.measure.metrics import psnr_db


@pytest.fixture(scope="module")
def tiny_fp16(tiny_graph: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return apply.quantize(tiny_graph, "fp16", tmp_path_factory.mktemp("fp16") / "graph")


@pytest.fixture(params=["fp16", "int8"])
def quantized(request: pytest.FixtureRequest) -> Artifact:
    found: Artifact = request.getfixturevalue(f"tiny_{request.param}")
    return found


def test_what_is_kept_and_what_is_left_behind(tiny_graph: Artifact, quantized: Artifact) -> None:
    assert quantized.kind == "graph"
    assert quantized.signatures == tiny_graph.signatures
    assert quantized.files["noise.npy"] == tiny_graph.files["noise.npy"]
    graphs = {"prepare.onnx", "frame.onnx"}
    typed = {f"typed/{name}" for name in graphs} if quantized.config["precision"] == "int8" else set()
    assert set(quantized.files) == graphs | typed | {"noise.npy"}
    for key in ("steps", "size", "latent_shape"):
        assert quantized.config[key] == tiny_graph.config[key]
    assert not {"factory", "student", "parity_max_abs"} & set(quantized.config)
    sizes = [graph.file("frame.onnx").stat().st_size for graph in (quantized, tiny_graph)]
    assert sizes[0] < sizes[1]


def test_lineage(tiny_graph: Artifact, tiny_fp16: Artifact, tiny_int8: Artifact, samples: Path) -> None:
    assert tiny_int8.lineage[:-1] == tiny_fp16.lineage[:-1] == tiny_graph.lineage
    stage = tiny_int8.lineage[-1]
    assert stage.inputs == {"graph": tiny_graph.digest, "samples": file_digest(samples)}
    assert stage.config["precision"] == tiny_int8.config["precision"] == "int8"
    assert stage.config["weights"] == "half"
    assert {"nncf", "onnx", "onnxruntime"} <= set(stage.tools)
    assert tiny_fp16.lineage[-1].inputs == {"graph": tiny_graph.digest}


def test_the_float_student_cannot_stand_in(quantized: Artifact, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="has no student and factory"):
        runtimes.load("torch").build(quantized, "frame", tmp_path, {})


def test_recorded_drift_is_that_of_the_whole_chain(tiny_graph: Artifact, tiny_int8: Artifact, samples: Path) -> None:
    """Least PSNR from source to image over the first and the last sample, run here graph by graph."""
    loaded, drift = calibrate.load(samples), []
    for place in (0, -1):
        images = []
        for graph in (tiny_graph, tiny_int8):
            prepare, frame = (Graph(graph.file(f"{name}.onnx")) for name in ("prepare", "frame"))
            source_kv = prepare({"source": loaded.source[loaded.index[place]][None]})
            feeds = {"pose": loaded.pose[place][None], "noise": loaded.noise[place][None], "source_kv": source_kv}
            images.append(frame(feeds)[0])
        drift.append(psnr_db(*images))
    assert tiny_int8.lineage[-1].config["psnr_db"] == pytest.approx(min(drift), abs=0.01)


def test_fp16_is_nearer_than_int8(tiny_fp16: Artifact, tiny_int8: Artifact) -> None:
    assert tiny_fp16.lineage[-1].config["psnr_db"] > tiny_int8.lineage[-1].config["psnr_db"] + 6


def test_fp32_is_a_copy(tiny_graph: Artifact, tmp_path: Path) -> None:
    copy = apply.quantize(tiny_graph, "fp32", tmp_path / "copy")
    assert copy.digest == tiny_graph.digest
    assert copy.files == tiny_graph.files
    assert artifact.load(copy.path / "student", "student")


def test_the_same_samples_give_the_same_graph(
    tiny_graph: Artifact, tiny_int8: Artifact, samples: Path, tmp_path: Path
) -> None:
    again = apply.quantize(tiny_graph, "int8", tmp_path / "again", samples)
    assert again.digest == tiny_int8.digest


def test_requests_that_make_no_sense(
    tiny_graph: Artifact, tiny_student: Artifact, quantized: Artifact, samples: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match="unknown precision 'int4'"):
        apply.quantize(tiny_graph, "int4", out)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="int8 without calibration samples"):
        apply.quantize(tiny_graph, "int8", out)
    with pytest.raises(ArtifactError, match="is a student: expected a graph"):
        apply.quantize(tiny_student, "fp16", out)
    with pytest.raises(ArtifactError, match=r"is in (fp16|int8) already: expected an fp32 graph"):
        apply.quantize(quantized, "int8", out, samples)
    with pytest.raises(ArtifactError, match="were recorded with graph"):
        apply.quantize(replace(tiny_graph, config={**tiny_graph.config, "steps": 9}), "int8", out, samples)
    assert not out.exists()


def altered(graph: Artifact, folder: Path, file: str, suffix: str, factor: float) -> Artifact:
    """A copy of ``graph`` with a bias of ``file`` multiplied."""
    shutil.copytree(graph.path, folder)
    model = onnx.load(folder / file)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name.endswith(suffix))
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(factor), tensor.name))
    onnx.save(model, folder / file)
    artifact.seal(folder, "graph", graph.config, graph.signatures, graph.lineage)
    return artifact.load(folder)


def test_values_beyond_fp16_are_refused(tiny_graph: Artifact, tmp_path: Path) -> None:
    """A source latent of some 10^7 is harmless in FP32, where LayerNorm follows, and infinite in FP16."""
    graph = altered(tiny_graph, tmp_path / "graph", "prepare.onnx", "encoder.10.weight", 1e9)
    with pytest.raises(ParityError, match="the fp16 graph gives values that are not finite"):
        apply.quantize(graph, "fp16", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["graph"]


def test_drift_beyond_the_floor_is_refused(
    tiny_graph: Artifact, samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The floor is raised until an ordinary INT8 graph is below it."""
    monkeypatch.setitem(ROWS, "int8", replace(ROWS["int8"], graph_db=90.0))
    with pytest.raises(
        ParityError, match=r"the int8 graph is \d\d\.\d dB from the float graph: expected at least 90 dB"
    ):
        apply.quantize(tiny_graph, "int8", tmp_path / "out", samples, Int8Config())
    assert not list(tmp_path.iterdir())
