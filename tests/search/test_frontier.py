"""The frontier at toy size: figures against direct computation, what is kept, what fails; its table and its mark."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from distill.reference import student_images, teacher_images
from rpfm_edge import api, cli
from rpfm_edge.bundle import engines
from rpfm_edge.core import artifact
from rpfm_edge.core.artifact import Artifact
from rpfm_edge.core.errors import BackendError, ConfigError
from rpfm_edge.core.stages import Stages
from rpfm_edge.measure import metrics
from rpfm_edge.people.held_out import draw_pairs
from rpfm_edge.people.splits import open_splits
from rpfm_edge.report.frontier import BEGIN, COLUMNS, END, lines, markdown, put_between, put_in_file
from rpfm_edge.search import frontier
from rpfm_edge.search.candidates import pareto
from runtimes import ov
from tests.distill.tiny import SIZE
from tests.toy import make_teacher

SMALL: dict[str, Any] = {"pairs": 2, "samples": 8, "runs": 2, "seconds": 0.01}


@pytest.fixture(scope="module")
def made(tiny_student: Artifact, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A whole measurement of the tiny student: 1 and 2 steps, float precisions, two backends."""
    folder = tmp_path_factory.mktemp("frontier")
    teacher, out = make_teacher(folder / "teacher"), folder / "out"
    options = {**SMALL, "steps": (2, 1), "precisions": ("fp32", "fp16")}
    result = frontier.measure_frontier(tiny_student.path, teacher, "sample", out, **options)
    return {"result": result, "out": out, "teacher": teacher, "student": tiny_student.path, "options": options}


def test_every_combination_is_a_row(made: dict[str, Any]) -> None:
    rows = made["result"]["rows"]
    found = {(row["steps"], row["precision"], row["backend"]) for row in rows}
    engines = {(n, p, b) for n in (1, 2) for p in ("fp32", "fp16") for b in ("openvino", "onnxruntime")}
    assert found == engines | {(n, "fp32", b) for n in (1, 2) for b in ("torch", "teacher")}
    assert len(rows) == len(found)
    for row in rows:
        assert "reason" not in row
        assert len(row["against_truth"]["psnr_db"]["values"]) == 2
        if row["backend"] != "teacher":
            assert row["frame"]["runs"] == made["result"]["rounds"] >= 2
            assert row["frame"]["fps"] == pytest.approx(1 / np.median(row["frame"]["values_s"]))
            assert row["engine_bytes"] > 0


def test_qualities_are_those_of_the_pictures(made: dict[str, Any]) -> None:
    student = artifact.load(made["student"]).config["network"]
    latent = (student["latent_channels"], *student["latent_size"])
    pairs = draw_pairs(open_splits("sample").test, 2, SIZE, latent, seed=0)
    slow = teacher_images(made["teacher"], *pairs.inputs, [(8, "heun"), (1, "euler")])
    fast = student_images(made["student"], *pairs.inputs, [1, 2])
    rows = {row["name"]: row for row in made["result"]["rows"]}
    assert rows["1-teacher"]["against_teacher"] == metrics.compare(slow[8, "heun"], slow[1, "euler"])
    for steps in (1, 2):
        expected = [metrics.psnr_db(a, b) for a, b in zip(slow[8, "heun"], fast[steps], strict=True)]
        for engine in ("fp32-torch", "fp32-openvino", "fp32-onnxruntime", "fp16-onnxruntime"):
            found = rows[f"{steps}-{engine}"]["against_teacher"]["psnr_db"]["values"]
            assert found == pytest.approx(expected, abs=0.05)


def test_the_files_hold_the_result(made: dict[str, Any]) -> None:
    out, result = made["out"], made["result"]
    assert {path.name for path in out.iterdir()} == {"frontier.json", "frontier.md", "frontier.png", "work"}
    assert json.loads((out / "frontier.json").read_text()) == json.loads(json.dumps(result))
    assert (out / "frontier.md").read_text() == markdown(result)
    assert cv2.imread(str(out / "frontier.png")).shape[1] == 1024


def test_a_second_run_makes_nothing_but_times(made: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: Any, **__: Any) -> None:
        pytest.fail("was made again")

    for name in ("quantize", "build", "images_of", "drift"):
        monkeypatch.setattr(frontier, name, forbidden)
    where = (made["student"], made["teacher"], "sample", made["out"])
    again = frontier.measure_frontier(*where, **made["options"])
    strip = [{k: v for k, v in row.items() if k not in ("frame", "pareto")} for row in again["rows"]]
    assert strip == [{k: v for k, v in row.items() if k not in ("frame", "pareto")} for row in made["result"]["rows"]]


def test_a_bundle_is_made_again_for_other_options_or_another_device(
    tiny_graph: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    candidate = frontier.Candidate(2, "fp32", "onnxruntime")

    def made(**options: Any) -> bool:
        """Whether ``_bundle`` builds."""
        built, build = [], frontier.build
        with monkeypatch.context() as patch:
            patch.setattr(frontier, "build", lambda *arguments: built.append(build(*arguments)))
            given = {"onnxruntime": options} if options else {}
            work = frontier._Work(Path(), "", "", 1, 0, None, Stages(tmp_path), given)  # type: ignore[arg-type]
            path = frontier._bundle(work, candidate, tiny_graph.path)
        assert artifact.load(path, "bundle").config["backends"] == {"onnxruntime": options}
        return bool(built)

    assert [made(), made(), made(threads=1), made(threads=1)] == [True, False, True, False]
    monkeypatch.setattr(engines, "where", lambda *_: {"cpu": "another one"})
    assert [made(threads=1), made(threads=1)] == [True, False]


def test_an_engine_that_fails_is_a_row_with_the_reason(
    made: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise BackendError("OpenVINO cannot read | this", expected="that", fix="give up")

    where = (made["student"], made["teacher"], "sample", tmp_path)
    options = {**SMALL, "steps": (1,), "precisions": ("fp32",)}
    with monkeypatch.context() as patch:
        patch.setattr(ov, "build", refuse)
        rows = {row["name"]: row for row in frontier.measure_frontier(*where, **options)["rows"]}
    assert rows["1-fp32-openvino"]["reason"] == "OpenVINO cannot read | this: expected that; give up."
    assert rows["1-fp32-openvino"]["pareto"] is False
    assert "frame" in rows["1-fp32-onnxruntime"]
    text = (tmp_path / "frontier.md").read_text()
    assert "- OpenVINO FP32, 1 step: OpenVINO cannot read | this: expected that; give up.\n" in text
    kept = tmp_path / "work" / "bundles" / "1-fp32-onnxruntime" / artifact.MANIFEST
    before = kept.stat().st_mtime_ns
    again = frontier.measure_frontier(*where, **options)["rows"]
    assert not [row for row in again if "reason" in row]  # what failed is tried again
    assert kept.stat().st_mtime_ns == before  # what worked is not


def test_a_precision_that_a_backend_lacks_is_a_row_with_the_reason(made: dict[str, Any], tmp_path: Path) -> None:
    where = (made["student"], made["teacher"], "sample", tmp_path)
    options = {**SMALL, "steps": (1,), "precisions": ("fp8", "fp32"), "backends": ("onnxruntime",)}
    rows = {row["name"]: row for row in frontier.measure_frontier(*where, **options)["rows"]}
    assert rows["1-fp8-onnxruntime"]["reason"].startswith("onnxruntime does not compute in fp8: expected the backend")
    assert "frame" in rows["1-fp32-onnxruntime"]
    assert not (tmp_path / "work" / "graphs" / "1-fp8").exists()  # refused before it is calibrated


def test_options_that_a_backend_refuses_are_rows_with_the_reason(made: dict[str, Any], tmp_path: Path) -> None:
    where = (made["student"], made["teacher"], "sample", tmp_path)
    options = {**SMALL, "steps": (1,), "precisions": ("fp32",), "options": {"openvino": {"thread": 1}}}
    rows = {row["name"]: row for row in frontier.measure_frontier(*where, **options)["rows"]}
    assert "'thread'" in rows["1-fp32-openvino"]["reason"]
    assert "frame" in rows["1-fp32-onnxruntime"]


def test_nothing_that_runs_is_an_error(made: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(frontier, "build", refuse)
    where = (made["student"], made["teacher"], "sample", tmp_path)
    with pytest.raises(BackendError, match="no memory: expected at least one engine that runs"):
        frontier.measure_frontier(*where, **SMALL, steps=(1,), precisions=("fp32",))
    assert not (tmp_path / "frontier.json").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"precisions": ["int3"]}, "unknown precision 'int3': expected one of"),
        ({"backends": ["onnx"]}, "unknown backend 'onnx': expected one of"),
        ({"steps": []}, r"steps \[\]: expected at least one number"),
        ({"steps": [2, 0]}, r"steps \[2, 0\]: expected"),
        ({"samples": 7}, "7 calibration samples for int8: expected at least 8"),
        ({"samples": 7, "precisions": ["fp32", "fp8"]}, "7 calibration samples for fp8"),
        ({"runs": 0}, "0 runs: expected at least 1"),
        ({"seconds": float("nan")}, "nan seconds of measuring: expected finite and at least 0"),
        ({"seconds": float("inf")}, "inf seconds"),
        ({"seconds": -1.0}, "-1 seconds"),
        ({"pairs": 0}, "0 pairs: expected at least 1"),
        (
            {"options": {"tensorrt": {}}},
            r"options of 'tensorrt', which is not measured: expected one of \['openvino', ",
        ),
    ],
)
def test_a_choice_that_cannot_be(made: dict[str, Any], tmp_path: Path, change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        api.frontier(made["student"], made["teacher"], "sample", tmp_path / "out", **change)
    assert not (tmp_path / "out").exists()


def test_the_command_prints_writes_and_fills_the_readme(made: dict[str, Any], tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"# Title\n{BEGIN}\n{END}\nrest\n")
    chosen = ("--steps", 1, "--precision", "fp32", "--target", "onnxruntime", "--pairs", 1, "--runs", 1, "--seconds", 0)
    where = (made["student"], "--against", made["teacher"], "--data", "sample", "--out", tmp_path / "out")
    arguments = [str(word) for word in ("frontier", *where, *chosen, "--readme", readme, "--json")]
    ended = CliRunner().invoke(cli.app, arguments)
    assert ended.exit_code == 0, ended.output
    record = json.loads(ended.stdout.splitlines()[-1])
    assert [row["name"] for row in record["rows"]] == ["1-teacher", "1-fp32-onnxruntime", "1-fp32-torch"]
    assert "ONNX Runtime FP32" in ended.stdout.splitlines()[-4] + ended.stdout.splitlines()[-3]
    table = (tmp_path / "out" / "frontier.md").read_text()
    assert readme.read_text() == f"# Title\n{BEGIN}\n\n{table}\n{END}\nrest\n"


scores = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=30)


@given(scores)
def test_the_frontier_is_what_a_sweep_finds(found: list[tuple[float, float]]) -> None:
    """From the fastest down, what is on the frontier is closer than everything faster than it."""
    expected, closest = set(), -1.0
    for speed in sorted({a for a, _ in found}, reverse=True):
        quality = max(b for a, b in found if a == speed)
        if quality > closest:
            expected.add((speed, quality))
            closest = quality
    assert {score for score, best in zip(found, pareto(found), strict=True) if best} == expected
    assert pareto(found) == [score in expected for score in found]


@given(scores, st.integers(1, 5))
def test_the_frontier_does_not_depend_on_order_or_scale(found: list[tuple[float, float]], scale: int) -> None:
    assert pareto(found[::-1]) == pareto(found)[::-1]
    assert pareto([(scale * a, b**3) for a, b in found]) == pareto(found)


def row(name: str, psnr: float, p50_s: float | None = None, **more: Any) -> dict[str, Any]:
    steps, precision, backend = name.split("-")
    found = {"name": name, "steps": int(steps), "precision": precision, "backend": backend, "pareto": False}
    summary = {"psnr_db": metrics.statistics([psnr])}
    found |= {"against_truth": summary, "against_teacher": summary}
    if p50_s:
        found["frame"] = {"p50_s": p50_s, "p95_s": 2 * p50_s, "fps": 1 / p50_s}
    return found | more


def test_the_table_is_sorted_by_speed_and_relative_to_torch() -> None:
    failed = {"name": "4-int8-openvino", "steps": 4, "precision": "int8", "backend": "openvino", "reason": "too large"}
    rows = [
        row("1-fp32-teacher", 22.25),
        row("1-fp32-torch", 31.0, 0.04),
        {**failed, "pareto": False},
        row("2-fp16-onnxruntime", 33.0, 0.08, engine_bytes=3 * 2**19),
        row("1-int8-openvino", 30.96, 0.008, pareto=True),
    ]
    found = lines(rows)
    assert [line.cells[0] for line in found] == [
        "OpenVINO INT8", "Student, torch FP32", "ONNX Runtime FP16", "Teacher, Euler FP32", "OpenVINO INT8"
    ]  # fmt: skip
    assert found[0].cells == ("OpenVINO INT8", "1", "125", "5.00", "8.00", "16.0", "31.0", "31.0", "–")
    assert found[2].cells == ("ONNX Runtime FP16", "2", "12.5", "–", "80.0", "160", "33.0", "33.0", "1.5")
    assert found[3].cells == ("Teacher, Euler FP32", "1", *"––––", "22.2", "22.2", "–")
    assert found[4].cells == ("OpenVINO INT8", "4", *"–––––––")
    assert [line.best for line in found] == [True, False, False, False, False]
    assert all(len(line.cells) == len(COLUMNS) for line in found)


def test_the_table_in_markdown(made: dict[str, Any]) -> None:
    table = [line for line in markdown(made["result"]).splitlines() if line.startswith("|")]
    assert len(table) == 2 + 12
    assert len({line.count("|") for line in table}) == 1
    bold = {line.split("|")[1].strip(" *") for line in table if "**" in line}
    marked = [row for row in made["result"]["rows"] if row["pareto"]]
    assert len(bold) > 0
    assert {line.cells[0] for line in lines(marked)} == bold


@given(
    st.text(st.characters(exclude_characters="<\r")), st.text(st.characters(exclude_characters="<\r")), st.text("ab|")
)
def test_what_is_around_the_markers_stays(before: str, after: str, table: str) -> None:
    text = f"{before}{BEGIN}\nold\n{END}{after}"
    once = put_between(text, table)
    assert once.startswith(f"{before}{BEGIN}\n")
    assert once.endswith(f"{END}{after}")
    assert once[len(f"{before}{BEGIN}") : -len(f"{END}{after}")].strip() == table
    assert put_between(once, table) == once


@pytest.mark.parametrize("text", ["", BEGIN, f"{END}\n{BEGIN}\n", f"{BEGIN}\n{BEGIN}\n{END}", f"{BEGIN}\n{END}{END}"])
def test_a_text_without_a_place_for_the_table(text: str, tmp_path: Path) -> None:
    file = tmp_path / "README.md"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"README\.md has no place for the table: expected one line <!-- "):
        put_in_file(file, None)
    assert file.read_text() == text


def test_a_readme_that_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.md cannot be read"):
        api.frontier("student:xs", "teacher:xs", "sample", tmp_path / "out", tmp_path / "none.md")
    assert not (tmp_path / "out").exists()
