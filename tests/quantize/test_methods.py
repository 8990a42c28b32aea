"""Estimators against numpy, the sweep against its graphs run here, and accuracy control against what it promises."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper
from typer.testing import CliRunner

from quantize import apply, calibrate, methods
from quantize.calibrate import Samples
from quantize.int8 import OUTLIERS, Int8Config, to_int8
from rpfm_edge import api
from rpfm_edge.cli import app
from rpfm_edge.core.artifact import Artifact, Stage
from rpfm_edge.core.errors import ConfigError, InputError, ParityError
from rpfm_edge.core.precisions import LEAST_SAMPLES
from rpfm_edge.measure.metrics import psnr_db
from rpfm_edge.people.data import Split
from rpfm_edge.recipe.load import load_recipe


@pytest.fixture(scope="module")
def recorded(samples: Path) -> Samples:
    return calibrate.load(samples)


def people(samples: Samples, indices: np.ndarray) -> set[str]:
    """The packaged sample names its pictures person_view."""
    return {samples.facts["sources"][index].partition("_")[0] for index in indices}


def test_nobody_calibrates_and_judges(recorded: Samples) -> None:
    calibrating, judging = methods.divide(recorded)
    assert not people(calibrating, calibrating.index) & people(judging, judging.index)
    assert len(calibrating.index) + len(judging.index) == len(recorded.index)
    assert len(people(judging, judging.index)) == max(round(len(people(recorded, recorded.index)) / 4), 1)
    for part in (calibrating, judging):
        assert part.facts["count"] == len(part.index) == len(part.pose) == len(part.noise)
        assert len(part.facts["sources"]) == len(part.source) == len(part.tensors["source_kv"])
    whole = list(recorded.feeds("frame"))
    for feed in judging.feeds("frame"):
        place = next(k for k, other in enumerate(whole) if np.array_equal(other["noise"], feed["noise"]))
        assert all(np.array_equal(feed[name], whole[place][name]) for name in feed)


def test_samples_of_one_person(recorded: Samples) -> None:
    names = [f"anna_{k}.jpg" for k in range(len(recorded.source))]
    with pytest.raises(InputError, match="the calibration samples show only one person: expected two or more"):
        methods.divide(replace(recorded, facts=recorded.facts | {"sources": names}))


def test_samples_that_are_too_few_to_divide(tiny_graph: Artifact, people: Split, tmp_path: Path) -> None:
    few = calibrate.load(calibrate.record(tiny_graph, people, tmp_path / "s", LEAST_SAMPLES))
    with pytest.raises(InputError, match=r"\d of 8 calibration samples are left .*: expected at least 8; ask for more"):
        methods.divide(few)


def test_pictures_are_those_of_the_whole_chain(tiny_graph: Artifact, recorded: Samples) -> None:
    _, judging = methods.divide(recorded)
    files = [tiny_graph.file(f"{name}.onnx") for name in ("prepare", "frame")]
    prepare, frame = (onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"]) for file in files)
    made = methods.pictures(*files, judging)
    for place, index in enumerate(judging.index):
        source_kv = prepare.run(None, {"source": judging.source[index][None]})[0]
        feeds = {"pose": judging.pose[place][None], "noise": judging.noise[place][None], "source_kv": source_kv}
        assert np.array_equal(made[place], frame.run(None, feeds)[0][0])


def seen(model: onnx.ModelProto, tensor: str, samples: Samples) -> list[np.ndarray]:
    """The values of a tensor in every sample, as ONNX Runtime gives them."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    copy.graph.output.append(helper.make_empty_tensor_value_info(tensor))
    session = onnxruntime.InferenceSession(copy.SerializeToString(), providers=["CPUExecutionProvider"])
    return [session.run([tensor], dict(feed))[0] for feed in samples.feeds("prepare")]


def rounding_error(values: np.ndarray, scale: float) -> float:
    return float(np.square(np.clip(np.round(values / scale), -128, 127) * scale - values).mean())


EXPECTED: dict[str, Callable[[list[np.ndarray]], float]] = {
    "mean": lambda found: float(np.mean([np.abs(values).max() for values in found])),
    "minmax": lambda found: max(float(np.abs(values).max()) for values in found),
    "percentile": lambda found: float(np.mean([np.quantile(np.abs(values), 1 - OUTLIERS) for values in found])),
}


def test_ranges_are_what_they_say(tiny_graph: Artifact, recorded: Samples) -> None:
    """Every signed activation; "histogram" has about the least error that any range has in the float graph."""
    model = onnx.load(tiny_graph.file("prepare.onnx"))
    scales: dict[str, dict[str, float]] = {}
    for ranges in ("mean", "minmax", "percentile", "histogram"):
        quantized, _ = to_int8(model, recorded.feeds("prepare"), Int8Config(ranges=ranges))  # type: ignore[arg-type]
        stored = {tensor.name: tensor for tensor in quantized.graph.initializer}
        scales[ranges] = {
            node.input[0]: float(numpy_helper.to_array(stored[node.input[1]]))
            for node in quantized.graph.node
            if node.op_type == "QuantizeLinear"
        }
    activations = sorted(set(scales["mean"]) - {n.output[0] for n in model.graph.node if n.op_type == "Relu"})
    assert len(activations) > 3
    for tensor in activations:
        found = seen(model, tensor, recorded)
        for ranges, expected in EXPECTED.items():
            assert scales[ranges][tensor] * 127 == pytest.approx(expected(found), rel=1e-3), (ranges, tensor)
        together = np.concatenate([values.ravel() for values in found])
        trials = np.abs(together).max() / 127 * np.geomspace(1, 0.1, 200)
        best = min(rounding_error(together, scale) for scale in trials)
        assert rounding_error(together, scales["histogram"][tensor]) <= 1.25 * best, tensor


def test_options_that_do_not_go_together() -> None:
    with pytest.raises(ConfigError, match=r"INT8 option ranges is 'median': expected one of \('mean', 'minmax', "):
        Int8Config(ranges="median")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="smooth_quant_alpha and least_psnr_db are both given: expected one of them"):
        Int8Config(smooth_quant_alpha=0.5, least_psnr_db=40)


def test_sweep_measures_sorts_and_resumes(
    tiny_graph: Artifact, samples: Path, recorded: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs, kept = [Int8Config(), Int8Config(weights="full", activations="unsigned")], []
    calibrating, judging = methods.divide(recorded)

    def spy(model: onnx.ModelProto, feeds: Any, config: Int8Config) -> Any:
        feeds = list(feeds)
        assert len(feeds) in (len(calibrating.source), len(calibrating.index))
        kept.append(to_int8(model, feeds, config))
        return kept[-1]

    monkeypatch.setattr(methods, "to_int8", spy)
    rows = methods.sweep(tiny_graph, samples, tmp_path, configs)
    assert [row["psnr_db"] for row in rows] == sorted((row["psnr_db"] for row in rows), reverse=True)
    exact = methods.pictures(*(tiny_graph.file(f"{name}.onnx") for name in ("prepare", "frame")), judging)
    for place, config in enumerate(configs):
        row = next(row for row in rows if row["config"] == asdict(config))
        made = [model for model, _ in kept[2 * place : 2 * place + 2]]
        drift = [psnr_db(*couple) for couple in zip(exact, methods.pictures(*made, judging), strict=True)]
        assert row["psnr_db"] == pytest.approx(np.median(drift), abs=0.01)
        assert row["psnr_db_min"] == pytest.approx(min(drift), abs=0.01)
        assert row["pairs"] == len(judging.index)
        assert row["bytes"] == sum(model.ByteSize() for model in made)
    monkeypatch.setattr(methods, "to_int8", lambda *_: pytest.fail("measured again"))
    assert methods.sweep(tiny_graph, samples, tmp_path, configs) == rows


def measured(config: Int8Config) -> dict[str, Any]:
    """As if the histogram were best, and SmoothQuant no better, in larger graphs."""
    level = {"mean": 41.0, "minmax": 40.0, "percentile": 30.0, "histogram": 42.0}[config.ranges]
    size = 100 if config.smooth_quant_alpha is None else 300
    gain = 0.05 * (config.smooth_quant_alpha == 0.5)
    return {"config": asdict(config), "psnr_db": level + gain, "psnr_db_min": 1.0, "ssim": 1.0, "bytes": size}


def test_sweep_smooths_with_the_best_ranges(
    tiny_graph: Artifact, samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(methods._Sweep, "_measured", lambda _, config: measured(config))
    rows = methods.sweep(tiny_graph, samples, tmp_path)
    alphas = [(row["config"]["ranges"], row["config"]["smooth_quant_alpha"]) for row in rows]
    assert sorted(alpha for ranges, alpha in alphas if alpha is not None and ranges == "histogram") == [*methods.ALPHAS]
    assert sorted(ranges for ranges, alpha in alphas if alpha is None) == ["histogram", "mean", "minmax", "percentile"]
    assert alphas[0] == ("histogram", 0.5)
    best, facts = methods.choose("sweep", None, tiny_graph, samples, tmp_path)
    assert best == methods.best_config(rows) == Int8Config(ranges="histogram")  # a tie goes to the smaller graphs
    assert facts == {"method": "sweep", "sweep": rows}


def test_a_damaged_row_is_measured_again(
    tiny_graph: Artifact, samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(methods._Sweep, "_measured", lambda _, config: measured(config))
    rows = methods.sweep(tiny_graph, samples, tmp_path, [Int8Config()])
    (file,) = tmp_path.iterdir()
    for content in ("{", "[1]", '{"psnr_db": 99}'):
        file.write_text(content)
        assert methods.sweep(tiny_graph, samples, tmp_path, [Int8Config()]) == rows


def test_methods_that_are_refused(tiny_graph: Artifact, tmp_path: Path) -> None:
    def quantize(precision: str = "int8", **options: Any) -> None:
        api.quantize(tiny_graph.path, "sample", tmp_path / "out", precision, samples=16, **options)

    with pytest.raises(ConfigError, match="unknown method 'qat': expected one of"):
        quantize(method="qat")
    with pytest.raises(ConfigError, match="method sweep for fp16: expected int8; leave the method out"):
        quantize("fp16", method="sweep")
    with pytest.raises(ConfigError, match="a least PSNR for method ptq: expected method accuracy-control"):
        quantize(least_psnr_db=40)
    with pytest.raises(
        ParityError, match=r"the float frame behind an int8 prepare comes to .* expected at least 120 dB"
    ):
        quantize(method="accuracy-control", least_psnr_db=120)
    assert not (tmp_path / "out").exists()


def test_the_command_prints_a_sweep(tiny_graph: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = measured(Int8Config(ranges="histogram", smooth_quant_alpha=0.5)) | {"seconds": 61.0, "bytes": 3 * 2**20}
    made = replace(tiny_graph, lineage=(Stage("quantize", {"sweep": [row]}, {}, {}),))
    monkeypatch.setattr(api, "quantize", lambda *_, method, **__: made if method == "sweep" else pytest.fail(method))
    arguments = ["quantize", "g", "--data", "sample", "--out", str(tmp_path), "--method", "sweep"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "histogram 0.5 42.0 1.0 1.0000 3.0 61" in " ".join(result.output.split())


@pytest.mark.slow
def test_accuracy_control_keeps_its_promise(
    tiny_graph: Artifact, samples: Path, recorded: Samples, tmp_path: Path
) -> None:
    """More than plain INT8 reaches, halfway to what the frame in float would; judged as it is stored."""
    _, judging = methods.divide(recorded)
    exact = [tiny_graph.file(f"{name}.onnx") for name in ("prepare", "frame")]
    expected = methods.pictures(*exact, judging)

    def mean_db(prepare: Path, frame: Path) -> float:
        made = methods.pictures(prepare, frame, judging)
        return float(np.mean([min(psnr_db(*couple), methods.CAP_DB) for couple in zip(expected, made, strict=True)]))

    plain = apply.quantize(tiny_graph, "int8", tmp_path / "plain", samples)
    prepare = plain.file("prepare.onnx")
    ends = mean_db(prepare, plain.file("frame.onnx")), mean_db(prepare, exact[1])
    least = sum(ends) / 2
    made = apply.quantize(tiny_graph, "int8", tmp_path / "made", samples, Int8Config(least_psnr_db=least))
    assert mean_db(made.file("prepare.onnx"), made.file("frame.onnx")) >= least - 0.1
    layers = [sum(graph.config["int8_layers"]["frame"].values()) for graph in (plain, made)]
    assert 0 < layers[1] < layers[0]
    assert made.config["int8_layers"]["prepare"] == plain.config["int8_layers"]["prepare"]
    assert made.lineage[-1].config["least_psnr_db"] == least


def test_a_recipe_whose_method_does_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    head = 'out = "runs/x"\n[student]\nartifact = "student:xs"\n[quantize]\n'
    path.write_text(head + 'method = "accuracy-control"\nleast_psnr_db = 46\n')
    assert load_recipe(path).quantize.least_psnr_db == 46
    path.write_text(head + 'method = "sweep"\nprecision = "fp16"\nalso = ["fp32"]\n')
    with pytest.raises(ConfigError, match="method sweep for fp16: expected int8"):
        load_recipe(path)
    path.write_text(head + "least_psnr_db = 46\n")
    with pytest.raises(ConfigError, match="a least PSNR for method ptq"):
        load_recipe(path)
