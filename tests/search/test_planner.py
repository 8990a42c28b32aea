"""Plans of precisions on the tiny graph: what is chosen, kept, refused and continued."""

from __future__ import annotations

import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from typer.testing import CliRunner

import runtimes
from quantize import mixed
from quantize.int8 import int8_products
from quantize.layers import load
from quantize.order import divided_by_work
from quantize.units import units
from rpfm_edge import api
from rpfm_edge.chain import build
from rpfm_edge.cli import app
from rpfm_edge.core import artifact
from rpfm_edge.core.artifact import Artifact
from rpfm_edge.core.errors import ArtifactError, BackendError, ConfigError, ParityError
from rpfm_edge.judge import quality
from rpfm_edge.measure.budget import Budget
from rpfm_edge.measure.clock import Latency
from rpfm_edge.measure.metrics import psnr_db
from rpfm_edge.people import held_out
from rpfm_edge.people.splits import open_splits
from rpfm_edge.report.plan import COLUMNS, plan_lines, verdict
from rpfm_edge.search.candidates import Candidates, PlanConfig
from rpfm_edge.search.planner import choose, plan_precision

SMALL = {"samples": 8, "pairs": 3, "probes": 2, "points": 2, "rounds": 2}


@pytest.fixture(scope="module")
def planned(tiny_graph: Artifact, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Planned with times that fall with every INT8 unit, as real ones of so small a frame do not."""
    out = tmp_path_factory.mktemp("plan") / "graph"
    config = PlanConfig("openvino", Budget(psnr_db_min=30), **SMALL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Candidates, "frame_times", falling_times)
        return out, plan_precision(tiny_graph, "sample", out, config)


def falling_times(_: Candidates, rows: list[dict[str, Any]]) -> dict[str, Latency]:
    return {row["name"]: Latency((1 / (10 + len(row["units"])),) * 3) for row in rows}


def test_the_chosen_graph_is_the_plan(tiny_graph: Artifact, planned: tuple[Path, dict[str, Any]]) -> None:
    out, result = planned
    graph = artifact.load(out, "graph")
    quantized = {unit["name"] for unit in result["units"] if unit["precision"] == "int8"} - {"prepare"}
    assert result["chosen"] == f"int8-{len(result['units'])}"  # all pass 30 dB, and all is fastest
    plan = graph.config["plan"]["frame"]
    assert {name for name, precision in plan.items() if precision == "int8"} == quantized
    found = int8_products(onnx.load(graph.file("frame.onnx")))
    assert len(found) == sum(graph.config["int8_layers"]["frame"].values())
    assert graph.signatures == tiny_graph.signatures


@pytest.mark.slow
def test_a_plan_of_a_graph_that_aligns_leaves_places_alone(
    aligned_graph: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Candidates, "frame_times", falling_times)
    config = PlanConfig("openvino", Budget(psnr_db_min=25), **(SMALL | {"points": 1}))
    result = plan_precision(aligned_graph, "sample", tmp_path / "graph", config)
    assert result["chosen"] == f"int8-{len(result['units'])}"
    plan = artifact.load(tmp_path / "graph", "graph").config["plan"]["frame"]
    mapped = {unit.name: unit.quantizable for unit in units(load(aligned_graph.file("frame.onnx")))}
    fixed = {name for name, free in mapped.items() if name.startswith("align.") and not free}
    assert {"align.linear0", "align.conv0"} <= fixed
    assert {plan[name] for name in fixed} == {"fp32"}
    assert {plan[name] for name in mapped if name.startswith("align.") and name not in fixed} == {"int8"}
    assert not fixed & {unit["name"] for unit in result["units"]}
    assert {plan[name] for name in plan if name.startswith("block")} == {"int8"}


def test_its_figures_are_those_of_its_bundle(
    tiny_graph: Artifact, planned: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """Rendered again from the float graph and the kept one, on the same people."""
    out, result = planned
    row = next(row for row in result["frontier"] if row["name"] == result["chosen"])
    size, shape = tuple(tiny_graph.config["size"]), tiny_graph.config["latent_shape"]
    pairs = held_out.draw_pairs(open_splits("sample").validation, SMALL["pairs"], size, shape, 0)
    images = []
    for name, graph in (("float", tiny_graph.path), ("kept", out)):
        made = build.build(graph, tmp_path / name, ["openvino"])
        images.append(quality.images_of(made.path, "openvino", pairs))
    found = np.median([psnr_db(a, b) for a, b in zip(*images, strict=True)])
    assert found == pytest.approx(row["against_float"]["psnr_db"]["median"], abs=1e-6)
    assert pairs.names == [tuple(names) for names in result["pairs"]]


def test_the_frontier_covers_float_and_int8(planned: tuple[Path, dict[str, Any]]) -> None:
    out, result = planned
    names = [row["name"] for row in result["frontier"]]
    assert names[:2] == ["fp32", "fp16"]
    counts = [len(row["units"]) for row in result["frontier"][2:]]
    assert counts == sorted(set(counts))
    assert counts[-1] == len(result["units"])
    assert result["frontier"][0]["against_float"]["psnr_db"]["median"] == float("inf")
    kept = json.loads((out.parent / "graph.plan" / "frontier.json").read_text())
    assert kept["chosen"] == result["chosen"]
    assert json.loads((artifact.load(out).path / "evidence" / "plan.json").read_text()) == kept
    assert "Infinity" not in (out.parent / "graph.plan" / "frontier.json").read_text()
    page = (out.parent / "graph.plan" / "report.html").read_text()
    assert "block0.qkv" in page
    assert "squared error of the picture" in page


def test_finished_work_is_not_done_again(
    tiny_graph: Artifact, planned: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out, result = planned

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("made again")

    made = ("rpfm_edge.search.candidates.images_of", "rpfm_edge.chain.build.build", "quantize.study.observe")
    made += ("rpfm_edge.search.candidates.compare",)  # nor are pictures compared again
    for target in (*made, "quantize.mixed.write", "quantize.sensitivity.write_text"):
        monkeypatch.setattr(target, never)
    monkeypatch.setattr(Candidates, "frame_times", falling_times)
    monkeypatch.setattr("quantize.study.Study._error", lambda self, name: result["estimators"][name])
    config = PlanConfig("openvino", Budget(psnr_db_min=30), **SMALL)
    again = plan_precision(tiny_graph, "sample", out, config)
    assert result["unmeasured"] is None
    assert [row["against_float"] for row in again["frontier"]] == [row["against_float"] for row in result["frontier"]]
    assert again["units"] == result["units"]


def test_a_budget_that_nothing_meets_keeps_the_frontier_and_writes_no_graph(
    tiny_graph: Artifact, tmp_path: Path
) -> None:
    budget = tmp_path / "budget.toml"
    budget.write_text("[drift]\nssim_min = 1.5\n")
    command = ["plan", str(tiny_graph.path), "--data", "sample", "--out", str(tmp_path / "out")]
    command += ["--target", "openvino", "--budget", str(budget), "--pairs", "2"]
    result = CliRunner().invoke(app, [*command, "--samples", "8", "--points", "1", "--json"])
    assert result.exit_code == 1
    assert not (tmp_path / "out").exists()
    printed = json.loads(result.stdout.splitlines()[-1])
    assert printed["chosen"] is None
    assert printed["best"] == "fp32"
    kept = json.loads((tmp_path / "out.plan" / "frontier.json").read_text())
    assert all("ssim median" in row["violations"][0] for row in kept["frontier"])
    assert "Nothing meets the budget; the nearest is fp32: ssim median" in verdict(kept)


def test_kept_units_stay_float_and_tensorrt_keeps_attention(tiny_graph: Artifact, tmp_path: Path) -> None:
    from quantize.study import Study, StudyConfig
    from rpfm_edge.core.stages import Stages

    splits, size = open_splits("sample"), tuple(tiny_graph.config["size"])
    pairs = held_out.draw_pairs(splits.validation, 2, size, tiny_graph.config["latent_shape"], 0)
    config = StudyConfig(8, 2, ("block0.*", "decoder.conv0"), fused=True)
    study = Study(tiny_graph, splits.training, pairs, config, Stages(tmp_path))
    names = {unit.name for unit in study.units}
    assert not {name for name in names if name.startswith("block0.") or name.endswith((".qk", ".av"))}
    assert "decoder.conv0" not in names
    assert "block1.qkv" in names
    assert study.activations == "signed"
    assert study.estimators[study.estimator] == min(study.estimators.values())


def test_a_backend_without_a_profile_divides_the_time_by_work(
    tiny_graph: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise BackendError("no profile here", expected="one", fix="none")

    monkeypatch.setattr(runtimes.load("openvino"), "profile", refused)
    result = plan_precision(tiny_graph, "sample", tmp_path / "out", PlanConfig("openvino", Budget(), **SMALL))
    saved = [unit["saved_s"] for unit in result["units"] if unit["name"] != "prepare"]
    assert len({value > 0 for value in saved}) == 1  # shares of one difference


def test_an_int8_graph_that_is_refused_leaves_the_others(
    tiny_graph: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All in INT8 cannot be made, so units count by their work, and what can be made is planned."""
    write = mixed.write

    def refuse_all(graph: Artifact, assignment: mixed.Assignment, *rest: Any) -> Artifact:
        if len(assignment.int8["frame"]) == most:
            raise ParityError("all in INT8 overflows", expected="finite values", fix="keep some in float")
        return write(graph, assignment, *rest)

    frame = onnx.load(tiny_graph.file("frame.onnx"))
    most, work = len(units(frame)), divided_by_work(frame, units(frame), 1.0)
    monkeypatch.setattr(mixed, "write", refuse_all)
    monkeypatch.setattr(Candidates, "frame_times", falling_times)
    result = plan_precision(
        tiny_graph, "sample", tmp_path / "out", PlanConfig("openvino", Budget(psnr_db_min=30), **SMALL)
    )
    everything = f"int8-{most + 1}"  # with the prepare graph
    assert "all in INT8 overflows" in result["unmeasured"]
    assert everything in [row["name"] for row in result["refused"]]
    assert result["chosen"] not in (None, "fp32", everything)
    saved = {unit["name"]: unit["saved_s"] for unit in result["units"] if unit["name"] != "prepare"}
    total = sum(saved.values())
    assert {name: saved[name] / total for name in saved} == pytest.approx(work)
    assert "was not measured (all in INT8 overflows" in (tmp_path / "out.plan" / "report.html").read_text()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"target": "abacus"}, "unknown backend 'abacus'"),
        ({"target": "torch"}, "runs the float student only"),
        ({"target": "torch-tensorrt"}, "runs the float student only"),
        ({"budget": {"pck_min": 0.9}}, "pck_min"),
        ({"budget": {"lpips_max": 0.1}}, "lpips_max, which cannot be measured here"),
        ({"probes": 0}, "0 probes"),
        ({"target": ""}, "no target"),
        ({"budget": {"flicker_max": 1.0}}, "flicker_max"),
        ({"keep": ("block7.*",)}, r"'block7.\*' matches no layer"),
        ({"options": {"onnxruntime": {"threads": 1}}}, "options of 'onnxruntime'"),
        ({"options": {"openvino": {"threads": 1}, "tensorrt": {}}}, "options of 'tensorrt'"),
        ({"steps": 2}, "2 steps for a graph"),
        ({"samples": 4}, "4 calibration samples"),
        ({"points": 0}, "0 points"),
    ],
)
def test_faults_are_one_sentence(tiny_graph: Artifact, tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    arguments = {"target": "openvino", "pairs": 2, "samples": 8, **changes}
    with pytest.raises((ConfigError, BackendError), match=words):
        api.plan(tiny_graph.path, "sample", tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_a_quantized_graph_is_refused(planned: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out, _ = planned
    with pytest.raises(ArtifactError, match="already"):
        api.plan(out, "sample", tmp_path / "out", "openvino")


def test_without_scikit_image_the_graph_is_written_and_the_column_of_ssim_holds_dashes(
    tiny_graph: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "skimage" else find_spec(name))
    budget = tmp_path / "budget.toml"
    budget.write_text("[drift]\npsnr_db_min = 15\n")
    command = ["plan", str(tiny_graph.path), "--data", "sample", "--out", str(tmp_path / "out"), "--pairs", "2"]
    command += ["--target", "openvino", "--budget", str(budget), "--samples", "8"]
    result = CliRunner().invoke(app, [*command, "--points", "1"])
    assert result.exit_code == 0, result.output
    chosen = json.loads((artifact.load(tmp_path / "out", "graph").path / "evidence" / "plan.json").read_text())
    assert all("ssim" not in row["against_float"] for row in chosen["frontier"])
    assert {line.cells[COLUMNS.index("SSIM")] for line in plan_lines(chosen)} == {"–"}
    assert "<td>–</td>" in (tmp_path / "out.plan" / "report.html").read_text()


def test_a_report_that_fails_does_not_lose_the_graph(
    tiny_graph: Artifact, planned: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise KeyError("ssim")

    shutil.copytree(planned[0].with_name("graph.plan"), tmp_path / "out.plan")  # finished work
    monkeypatch.setattr(Candidates, "frame_times", falling_times)
    monkeypatch.setattr("rpfm_edge.report.page.write_report", fail)
    config = PlanConfig("openvino", Budget(psnr_db_min=30), **SMALL)
    with pytest.raises(KeyError):
        plan_precision(tiny_graph, "sample", tmp_path / "out", config)
    assert artifact.load(tmp_path / "out", "graph").config["precision"] == "int8"


def row(name: str, ms: float, db: float, violations: tuple[str, ...] = (), units: int = 3) -> dict[str, Any]:
    drift = {"psnr_db": {"median": db}, "ssim": {"median": 0.99}}
    frame = {"p50_s": ms / 1e3, "fps": 1e3 / ms}
    rest = {"units": ["u"] * units, "engine_bytes": 1, "speedup": 1.0}
    return {"name": name, "frame": frame, "against_float": drift, "violations": list(violations), **rest}


def test_the_fastest_that_passes_is_chosen_and_float_if_int8_is_slower() -> None:
    exact = row("fp32", 20, float("inf"), units=0)
    assert choose([exact, row("a", 10, 45), row("b", 8, 40), row("c", 6, 35, ("too far",))]) == "b"
    assert choose([exact, row("a", 8.05, 45), row("b", 8, 40)]) == "a"  # equal within the tie
    assert choose([exact, row("a", 25, 45)]) == "fp32"
    assert choose([row("a", 5, 20, ("too far",))]) is None


def test_the_verdict_says_that_int8_is_not_faster() -> None:
    frontier = [row("fp32", 20, float("inf"), units=0), row("a", 25, 45)]
    result = {"frontier": frontier, "chosen": "fp32", "best": "fp32", "units": ["u"] * 4, "rest": "fp32"}
    assert verdict(result) == "INT8 is not faster here, so the graph stays in FP32."
    assert [line.best for line in plan_lines(result)] == [False, True]


def test_the_verdict_says_that_what_is_faster_fails() -> None:
    frontier = [row("fp32", 20, float("inf"), units=0), row("a", 10, 30, ("too far",))]
    result = {"frontier": frontier, "chosen": "fp32", "best": "fp32", "units": ["u"] * 4, "rest": "fp32"}
    assert verdict(result) == "No INT8 graph that is faster meets the budget, so the graph stays in FP32."


def test_a_candidate_that_cannot_be_made_is_a_row_with_the_reason(
    tiny_graph: Artifact, planned: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, _ = planned

    def refused(self: Candidates) -> None:
        raise ParityError("FP16 overflows", expected="finite values", fix="stay with fp32")

    monkeypatch.setattr(Candidates, "half", refused)
    monkeypatch.setattr(Candidates, "frame_times", falling_times)
    result = plan_precision(tiny_graph, "sample", out, PlanConfig("openvino", Budget(psnr_db_min=30), **SMALL))
    assert [(row["name"], row["violations"][0][:14]) for row in result["refused"]] == [("fp16", "FP16 overflows")]
    assert "fp16" not in [row["name"] for row in result["frontier"]]


def test_other_pictures_under_the_same_names_are_rendered_again(tiny_graph: Artifact) -> None:
    size, shape = tuple(tiny_graph.config["size"]), tiny_graph.config["latent_shape"]
    pairs = held_out.draw_pairs(open_splits("sample").validation, 2, size, shape, 0)
    changed = [replace(pairs, **{name: 255 - getattr(pairs, name)}) for name in ("sources", "poses", "truths")]
    assert len({pairs.digest, *(other.digest for other in changed)}) == 4
